"""Files that are written whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Temporary files beside `paths` to write; on success all are flushed to the disk, then take their places."""
    temporary = [path.with_name(f".{path.name}.{secrets.token_hex(4)}") for path in paths]
    try:
        modes = []
        for path in temporary:
            path.touch()
            modes.append(path.stat().st_mode)  # as the umask has it; some libraries write files for their owner only
        yield temporary
        for path, mode in zip(temporary, modes, strict=True):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.chmod(mode)
        swap(temporary, paths)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def swap(temporary: Sequence[Path], paths: Sequence[Path]) -> None:
    """Rename each temporary file to its path; where that is interrupted, put back what stood there before."""
    before = [path.with_name(f"{new.name}.old") for new, path in zip(temporary, paths, strict=True)]
    done: list[tuple[Path, Path]] = []
    try:
        for new, old, path in zip(temporary, before, paths, strict=True):
            with contextlib.suppress(OSError):  # nothing stood there, or the file system has no hard links
                os.link(path, old)
            done.append((old, path))
            os.replace(new, path)
    except BaseException:
        for old, path in done:
            if old.exists():
                os.replace(old, path)
        raise
    else:
        for path in paths:  # also what a killed save left
            for old in path.parent.glob(f".{path.name}.*.old"):
                old.unlink(missing_ok=True)
    finally:
        for old in before:
            old.unlink(missing_ok=True)
