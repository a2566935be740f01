"""Captioning shards: one file of captions for each, written whole or not at all.

A shard is done when its file of captions exists. So the same command continues a run that was stopped, and any number
of processes may share the shards, on one machine or on many with a common folder: see `plan` and `remaining`.
"""

import contextlib
import glob
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from captioner.api import Captioner
from captioner.captions import Caption
from captioner.files import replacing
from captioner.images import ImageError
from captioner.options import Options
from captioner.shards import COLUMN, Sample, ShardError, import_pyarrow, read_shard

ROWS = 4096  # of captions, in a row group of a Parquet file
BATCH_SIZES = {"cpu": 32, "cuda": 128}  # images that go through the network together, where nothing else is asked for

Row = dict[str, Any]


class Job(NamedTuple):
    """One shard to caption.

    shard: its path.
    target: the file of its captions, JSON Lines or, with the suffix .parquet, a Parquet table.
    """

    shard: str
    target: Path


class Outcome(NamedTuple):
    """What became of a shard.

    job: the shard and its file of captions.
    pictures: rows that were written.
    failed: rows of them that hold an error.
    error: why the shard could not be captioned, in a sentence; then nothing was written.
    """

    job: Job
    pictures: int = 0
    failed: int = 0
    error: str = ""

    @property
    def problem(self) -> str:
        """A sentence about what could not be captioned; empty where everything could be."""
        if self.failed:
            count = f"{self.failed} of {self.pictures} pictures"
            return f"{self.job.shard}: {count} could not be captioned; their rows in {self.job.target} say why"
        return self.error


def plan(shards: Sequence[str], output: Path, style: str, rank: int = 0, size: int = 1) -> list[Job]:
    """The shards that one of several processes captions.

    Args:
        shards: all of them, the same list on every process.
        output: the folder for the captions.
        style: "jsonl" or "parquet".
        rank: number of this process.
        size: number of processes.

    Raises:
        ValueError: two shards have the same name.
    """
    jobs = [Job(shard, output / f"{Path(shard).stem}.{style}") for shard in shards]
    first: dict[Path, str] = {}
    for shard, target in jobs:
        if target in first:
            raise ValueError(
                f"{first[target]} and {shard} would both be captioned into {target}; give each a folder of its own"
            )
        first[target] = shard
    return jobs[rank::size]


def remaining(jobs: Iterable[Job]) -> list[Job]:
    """Those of the shards that are not done."""
    return [job for job in jobs if not job.target.exists()]


def caption_jobs(
    captioner: Captioner,
    jobs: Iterable[Job],
    column: str = COLUMN,
    min_confidence: float = 0.0,
    **options: Unpack[Options],
) -> Iterator[Outcome]:
    """Caption shards one after the other; see `caption_shard`. What an option is wrong with is raised by the call."""
    captioner.stream((), **options).close()
    return (caption_shard(captioner, job, column, min_confidence, **options) for job in jobs)


def caption_shard(
    captioner: Captioner, job: Job, column: str = COLUMN, min_confidence: float = 0.0, **options: Unpack[Options]
) -> Outcome:
    """Caption the pictures of one shard, in bounded memory, and write the captions whole or not at all.

    A row of the file has `key` and `path` (see `captioner.shards.Sample`), and the fields of `Caption.to_dict`, or
    `error`.

    Args:
        captioner: the model.
        job: the shard. Where its file of captions exists already, it is written anew.
        column: of a table, the column of pictures; see `captioner.shards.read_shard`.
        min_confidence: a caption of lower confidence is replaced by an error.
        options: see `Captioner.caption`.

    Raises:
        ImportError: Parquet needs the package pyarrow.
        OSError: the captions cannot be written.
        ValueError: an option has a value that cannot be used.
    """
    pictures = failed = 0
    job.target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(job.target) as temporary, open_rows(temporary, job.target.suffix) as write:
            for row in caption_samples(captioner, read_shard(job.shard, column), min_confidence, **options):
                write(row)
                pictures += 1
                failed += "error" in row
        outcome = Outcome(job, pictures, failed)
    except ShardError as error:
        outcome = Outcome(job, error=str(error))
    for leftover in job.target.parent.glob(f".{glob.escape(job.target.name)}.*"):
        leftover.unlink(missing_ok=True)  # of processes that were killed while they were at the same shard
    return outcome


def caption_samples(
    captioner: Captioner, samples: Iterable[Sample], min_confidence: float = 0.0, **options: Unpack[Options]
) -> Iterator[Row]:
    """A row for each picture, in order, with an error in the place of a caption that there is none of."""
    reading: deque[tuple[str, str | None, str]] = deque()  # without their images

    def images() -> Iterator[Any]:
        for sample in samples:
            reading.append((sample.key, sample.path, sample.name))
            yield sample.image

    with contextlib.closing(captioner.stream(images(), **options)) as results:
        for result in results:
            key, path, name = reading.popleft()
            row = {"key": printable(key), "path": path and printable(path)}
            yield row | fields(result, name, min_confidence)


def fields(result: Caption | ImageError, name: str, min_confidence: float) -> Row:
    """The fields of a caption, or its error."""
    error = str(result) if isinstance(result, ImageError) else doubt(result, name, min_confidence)
    return {"error": printable(error)} if error else result.to_dict()  # type: ignore[union-attr]


def doubt(caption: Caption, name: str, min_confidence: float) -> str:
    """A sentence about a caption of too low confidence; empty for any other."""
    if caption.confidence >= min_confidence:
        return ""
    return f"{name}: confidence {caption.confidence:.2f} is below {min_confidence:g}"


def printable(text: str) -> str:
    """Text without the surrogates that stand for bytes of file names that are not UTF-8: Parquet refuses them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextlib.contextmanager
def open_rows(path: Path, suffix: str) -> Iterator[Callable[[Row], object]]:
    """A function that appends a row to a new file, JSON Lines or with the suffix ".parquet" a Parquet table."""
    if suffix != ".parquet":
        with open(path, "w", encoding="utf-8") as file:
            yield lambda row: file.write(json.dumps(row) + "\n")
        return
    parquet, schema = import_pyarrow("pyarrow.parquet"), row_schema()
    rows: list[Row] = []

    def flush() -> None:
        writer.write_table(import_pyarrow("pyarrow").Table.from_pylist(rows, schema))
        rows.clear()

    def write(row: Row) -> None:
        rows.append(row)
        if len(rows) == ROWS:
            flush()

    with parquet.ParquetWriter(path, schema) as writer:
        yield write
        flush()


def row_schema() -> Any:
    """The columns of a row in Parquet."""
    arrow = import_pyarrow("pyarrow")
    return arrow.schema([("key", arrow.string()), ("path", arrow.string()), *caption_columns()])


def caption_columns() -> list[tuple[str, Any]]:
    """The columns of `fields` in Parquet: their names and pyarrow's types."""
    arrow = import_pyarrow("pyarrow")
    text, number = arrow.string(), arrow.float64()

    def scored(name: str) -> Any:
        return arrow.list_(arrow.struct([(name, text), ("log_probability", number)]))

    return [
        ("caption", text),
        ("log_probability", number),
        ("words", scored("word")),
        ("alternatives", scored("caption")),
        ("error", text),
    ]
