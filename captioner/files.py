"""The names of images and shards, and files that are written whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .jp2 .ppm .pgm .pbm .tga".split())


def is_shard(name: str) -> bool:
    """Whether that is the name of a shard: of a tar file or of a Parquet table."""
    return is_table(name) or name.lower().endswith(".tar")


def is_table(name: str) -> bool:
    """Whether that is the name of a Parquet table."""
    return name.lower().endswith(".parquet")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; without an error it then takes the place of `path`.

    It is flushed to the disk before it is renamed. After an error, or when the disk is full, the file that was there
    before is unchanged. The new file has the permissions that the umask gives.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # some libraries write files that only their owner can read
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
