"""Reading shards: tar files of pictures in the layout of WebDataset, and Parquet tables with a column of pictures.

The standard library's `tarfile` reads them, so that captioning needs no further package. What the package `webdataset`
adds, shuffling and splitting samples for training, is not needed to caption a shard from its beginning to its end.
"""

import importlib
import io
import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from captioner.files import SUFFIXES, is_shard, is_table
from captioner.images import MAX_BYTES, ImageError, ImageSource, NamedBytes, reason

COLUMN = "image"  # of a table, as Hugging Face datasets name it
TABLE_ROWS = 32  # that are read at a time
MAX_SHARDS = 1_000_000
BRACES = re.compile(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}")
RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
# WebDataset's rule: the key of a sample ends before the first dot of a file's name. Hidden files have none.
SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


class ShardError(ValueError):
    """A shard that cannot be read, or not to its end. The message names it and gives the reason."""


class Unreadable(io.BytesIO):
    """In the place of a picture that is known to be unreadable: an open file that raises an ImageError when read."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = message

    def read(self, size: int | None = -1, /) -> NoReturn:
        """Raise the error."""
        raise ImageError(self.message)


class Sample(NamedTuple):
    """One picture of a shard.

    key: of the sample in a tar file; of a table the number of the row, from 0.
    path: the picture's name in the tar file, or its path in the table; None where there is none.
    name: what messages call it.
    image: the picture.
    """

    key: str
    path: str | None
    name: str
    image: ImageSource


def expand(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for, as in Bash: `{000..099}`, and `{a,b}`; not one in another.

    A name that exists as it is stands for itself.

    Raises:
        ShardError: there are more than `MAX_SHARDS`.
    """
    if os.path.lexists(pattern):
        return [pattern]
    parts = [choices(part) if number % 2 else [part] for number, part in enumerate(BRACES.split(pattern))]
    names = list(itertools.islice(map("".join, itertools.product(*parts)), MAX_SHARDS + 1))
    if len(names) > MAX_SHARDS:
        raise ShardError(f"{pattern} stands for more than {MAX_SHARDS:,} shards")
    return names


def choices(braces: str) -> list[str]:
    """What may stand in the place of a pair of braces. With a leading zero, all numbers of a range are of one width."""
    found = RANGE.fullmatch(braces)
    if not found:
        return braces.split(",")
    first, last = map(int, found.groups())
    padded = any(len(end) > 1 and end.startswith("0") for end in found.groups())
    width = max(map(len, found.groups())) if padded else 0
    numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
    return [f"{number:0{width}d}" for number in numbers[: MAX_SHARDS + 1]]


def shard_names(given: Sequence[str]) -> list[str]:
    """The shards that names and patterns with braces stand for, in order.

    Raises:
        ShardError: there are too many, or one of them is no shard.
    """
    names = [name for pattern in given for name in expand(pattern)]
    for name in names:
        if not is_shard(name):
            raise ShardError(f"{name} is no shard; give names that end in .tar or .parquet")
    return names


def read_shard(path: str, column: str = COLUMN) -> Iterator[Sample]:
    """The pictures of a shard, in order. One is in memory at a time; of a table, `TABLE_ROWS`.

    Args:
        path: a tar file, or a table, whose name ends in ".parquet".
        column: of a table, the column of pictures: bytes, paths, which are relative to the folder of the table, or
            structs of `bytes` and `path`, as Hugging Face datasets write them.

    Raises:
        ImportError: Parquet needs the package pyarrow.
        ShardError: the shard is missing or damaged, or has no such column. The samples before the damage come first.
    """
    try:
        yield from read_table(path, column) if is_table(path) else read_tar(path)
    except (ShardError, ImportError):
        raise
    except FileNotFoundError as error:
        raise ShardError(f"{path} does not exist") from error
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {reason(error)}") from error
    except Exception as error:  # whatever a decoder raises for damaged bytes
        raise ShardError(f"{path} is damaged or cut short: {reason(error)}") from error


def read_tar(path: str) -> Iterator[Sample]:
    """The pictures of a tar file: members of the same key that follow one another are a sample."""
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for key, members in itertools.groupby(files_in(archive), key=sample_key):
            found = False
            for member in members:
                if os.path.splitext(member.name)[1].lower() in SUFFIXES:
                    found = True
                    yield Sample(key, member.name, f"{path}: {member.name}", read_member(archive, member, path))
            if not found:
                yield Sample(key, None, f"{path}: {key}", Unreadable(f"{path}: the sample {key} has no picture"))
        # `tarfile` takes whatever is not the header of a member for the end of the archive.
        file.seek(archive.offset)
        if any(end := file.read(tarfile.BLOCKSIZE)) or not end:
            raise ShardError(f"{path} is damaged or cut short: it does not end as a tar file does")


def files_in(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The regular files of an archive that belong to a sample."""
    while member := archive.next():
        archive.members = []  # type: ignore[attr-defined]  # otherwise it keeps all that it has seen
        if member.isfile() and SAMPLE.fullmatch(member.name):
            yield member


def sample_key(member: tarfile.TarInfo) -> str:
    """The key of the sample to which a file belongs."""
    return SAMPLE.fullmatch(member.name)[1]  # type: ignore[index]  # files without a key have been left out


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> ImageSource:
    """The bytes of a picture in an archive."""
    name = f"{path}: {member.name}"
    if member.size > MAX_BYTES:
        return Unreadable(f"{name} has more than {MAX_BYTES >> 20} MiB")
    data = NamedBytes(archive.extractfile(member).read())  # type: ignore[union-attr]  # it is a regular file
    data.name = name
    return data


def read_table(path: str, column: str) -> Iterator[Sample]:
    """The pictures of a column of a Parquet table."""
    parquet = import_pyarrow("pyarrow.parquet")
    folder = os.path.dirname(path)
    # Without these two, a row group's whole column would be in memory.
    with open(path, "rb") as file, parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False) as table:
        check_column(path, table.schema_arrow, column)
        number = 0
        for batch in table.iter_batches(TABLE_ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                name = f"{path}: row {number}"
                shown, image = picture(value, name, folder)
                yield Sample(str(number), shown, name, image)
                number += 1


def check_column(path: str, schema: Any, column: str) -> None:
    """Raise ShardError where a table has no such column, or not one of pictures."""
    types = import_pyarrow("pyarrow.types")
    if column not in schema.names:
        raise ShardError(f"{path} has no column {column!r}; it has {', '.join(schema.names)}")
    kind = schema.field(column).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    data = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    text = (types.is_string, types.is_large_string, types.is_string_view)
    fields = {field.name for field in kind} if types.is_struct(kind) else set()
    if not fields & {"bytes", "path"} and not any(test(kind) for test in (*data, *text)):
        raise ShardError(f"{path}: the column {column!r} holds {kind}, and should hold the bytes or paths of pictures")


def picture(value: Any, name: str = "", folder: str = "") -> tuple[str | None, ImageSource]:
    """The path of a picture, and the picture, of a value in a table.

    Args:
        value: bytes, a path, a dictionary with one of these under "bytes" or "path", or whatever else is an image.
        name: what messages call it.
        folder: from which relative paths lead.
    """
    path = None
    if isinstance(value, dict):
        path, value = value.get("path"), value.get("bytes")
        value = path if value is None else value
    if isinstance(value, str):
        return value, os.path.join(folder, value)
    if value is None:
        return path, Unreadable(f"{name or 'a row'} has no picture")
    if isinstance(value, bytes):
        value = NamedBytes(value)
        value.name = name
    return path, value


def import_pyarrow(name: str) -> Any:
    """A module of the package pyarrow.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError("Parquet needs the package pyarrow: pip install 'captioner[parquet]'") from error
