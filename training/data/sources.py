"""The values of `--data`: public data sets in their folders, files of your own captions, and shards.

A file of captions follows the ImageFolder convention of Hugging Face datasets. A CSV file has the columns `file_name`
and `text`, a JSON Lines file has an object with these keys on each line, where `text` may also be a list of captions.
Several lines may name the same picture. Paths are relative to the file; they may be absolute or lead out of its folder.
`split` is optional: train, dev (or val, validation) or test.
"""

import csv
import hashlib
import json
import logging
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..distributed import ALONE, Distributed
from .datasets import read_dataset
from .features import cache_folder
from .items import SPLITS, CaptionDataset, CaptionedImage, DatasetError
from .layouts import text_lines

log = logging.getLogger("training")

Items = Sequence[CaptionedImage]
OWN_CAPTIONS = (".csv", ".jsonl")
SPLIT_NAMES = {"train": "train", "dev": "dev", "val": "dev", "validation": "dev", "test": "test"}
DEV_SHARE = TEST_SHARE = 0.1
# CIDEr weights words by inverse document frequency; with a single picture it is 0 for any caption.
MINIMUM_DEV = 2


def read_sources(sources: Sequence[str], cache: str = "", processes: Distributed = ALONE) -> list[CaptionDataset]:
    """Read the data sets that `--data` names.

    Args:
        sources: as in `parse_source` and `shard_source`. Shards of one name, given separately, are one data set.
        cache: where copies and indexes of shards are kept; see `cache_folder`.
        processes: that read the same data sets.

    Raises:
        DatasetError: one cannot be read, or two have the same name.
        OSError: the cache cannot be written.
    """
    datasets = []
    shards = [found for source in sources if (found := shard_source(source))]
    for name, place in (parse_source(source) for source in sources if not shard_source(source)):
        own = place.suffix.lower() in OWN_CAPTIONS
        datasets.append(read_captions(name, place) if own else read_dataset(name, place))
    if shards:
        from .shards import read_shards  # webdataset takes half a second to import

        datasets += read_shards(shards, cache_folder(cache), processes)
    names = [dataset.name for dataset in datasets]
    if twice := {name for name in names if names.count(name) > 1}:
        raise DatasetError(f"two data sets have the name {', '.join(sorted(twice))}; name each with NAME=...")
    return datasets


def read_split(datasets: Sequence[CaptionDataset], split: str, limit: int | None = None) -> dict[str, Items]:
    """The images of one split of each data set, by its name; at most `limit` of each. Skipped entries are logged.

    Raises:
        DatasetError: a data set has none.
    """
    for dataset in datasets:
        if dataset.problems:
            log.warning("skipped %d in %s, the first: %s", len(dataset.problems), dataset.name, dataset.problems[0])
        if not dataset.splits[split]:
            raise DatasetError(f"{dataset.name} has no image in its {split} split ({dataset.layout})")
    return {dataset.name: dataset.splits[split][:limit] for dataset in datasets}


def parse_source(source: str) -> tuple[str, Path]:
    """The name of a data set and its path.

    Args:
        source: "NAME=FOLDER" with a name of `DATASETS`, "NAME" alone for the folder data/NAME, or a file of your own
            captions, "NAME=FILE" or "FILE" alone, whose name is then the file's without its ending.
    """
    name, equals, place = source.partition("=")
    if not equals and Path(source).suffix.lower() in OWN_CAPTIONS:
        return Path(source).stem, Path(source)
    return name, Path(place or f"data/{name}")


def shard_source(source: str) -> tuple[str, str] | None:
    """The name of a data set in shards, perhaps empty, and their files or addresses; None if it is not in shards.

    Args:
        source: "SHARDS" or "NAME=SHARDS", where SHARDS ends in .tar, has a scheme as in "https://", or is a command
            after "pipe:"; see `shards.expand`.
    """
    match = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", source)
    name, place = match.groups("") if match else ("", source)
    return (name, place) if place.endswith(".tar") or re.match(r"pipe:|\w+://", place) else None


def source_name(source: str) -> str:
    """The name of a data set, whose files may move; empty for shards that have none."""
    return (shard_source(source) or parse_source(source))[0]


class _Row(NamedTuple):
    """One caption as it is in the file, and its "file:line"; `split` is empty where the file names none."""

    where: str
    image: str
    text: str
    split: str


def read_captions(name: str, path: str | os.PathLike[str]) -> CaptionDataset:
    """Read a file of your own captions, CSV or JSON Lines.

    Where the file names no splits, `split_by_hash` decides by the picture's path as written in the file. Lines that
    cannot be used are skipped: those with a missing picture, an empty caption, an unknown split, a second split for the
    same picture or the same caption again, and malformed ones.

    Args:
        name: the data set's name in scores and messages.
        path: the file.

    Raises:
        DatasetError: the file cannot be read, lacks the columns, or no picture can be used.
    """
    path = Path(path)
    problems: list[str] = []
    try:
        lines = list(text_lines(path, path.parent, problems))
    except OSError as error:
        raise DatasetError(f"cannot read the captions in {path}: {error.strerror}") from error
    rows = _csv_rows(path, lines, problems) if path.suffix.lower() == ".csv" else _jsonl_rows(lines, problems)
    captions, named = _by_picture(rows, path.parent, problems)
    splits = named or split_by_hash(captions)
    if not splits:
        raise DatasetError(f"no picture of {path} can be used{_first_of(problems)}")
    items = {image: CaptionedImage(path.parent / image, tuple(captions[image]), name) for image in splits}
    by_split = {split: tuple(items[image] for image in items if splits[image] == split) for split in SPLITS}
    origin = "splits as the file names them" if named else "no splits named, split by a hash of the file names"
    return CaptionDataset(name, by_split, tuple(problems), f"captions in {path.name}; {origin}")


def _by_picture(rows: Iterable[_Row], root: Path, problems: list[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The captions of each picture, and the splits of those for which one is named: of all, or of none."""
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    first: dict[str, str] = {}
    for row in rows:
        image, caption = posixpath.normpath(row.image.strip()), " ".join(row.text.split())
        split = SPLIT_NAMES.get(row.split.strip().lower())
        if not row.image.strip():
            problems.append(f"{row.where}: file_name is empty")
        elif not any(map(str.isalnum, caption)):
            problems.append(f"{row.where}: the caption of {image} is empty")
        elif row.split.strip() and not split:
            problems.append(f"{row.where}: {image} is in an unknown split {row.split!r}; there are train, dev and test")
        elif not os.path.isfile(root / image):
            problems.append(f"{row.where}: there is no picture {root / image}")
        elif split and splits.setdefault(image, split) != split:
            problems.append(f"{row.where}: {image} is in {split} here, and was in {splits[image]} before")
        elif caption in captions.setdefault(image, []):
            problems.append(f"{row.where}: {image} has the same caption before; the first is kept")
        else:
            captions[image].append(caption)
            first.setdefault(image, row.where)
    if splits:
        for image in [image for image in captions if image not in splits]:
            problems.append(f"{first[image]}: {image} has no split, but others have; name it for all or for none")
            del captions[image]
    return captions, splits


def _first_of(problems: Sequence[str]) -> str:
    return f"; the first of {len(problems)} problems: {problems[0]}" if problems else ""


def split_by_hash(images: Iterable[str]) -> dict[str, str]:
    """The split of each picture by a hash of its name: about 80 % train, 10 % dev, 10 % test.

    A picture stays in its split when others are added, with one exception: as long as fewer than `MINIMUM_DEV` hashes
    are in the range of dev, the pictures with the smallest hashes are taken.
    """
    hashes = {image: int(hashlib.sha256(image.encode()).hexdigest()[:8], 16) / 2**32 for image in images}
    smallest = sorted(hashes, key=lambda image: hashes[image])[: min(MINIMUM_DEV, len(hashes) // 2)]
    return {
        image: "dev" if value < DEV_SHARE or image in smallest else "test" if value >= 1 - TEST_SHARE else "train"
        for image, value in hashes.items()
    }


def _csv_rows(path: Path, lines: Sequence[tuple[str, str]], problems: list[str]) -> Iterator[_Row]:
    records = _csv_records(lines, problems)
    columns = [column.strip() for column in next(records, ("", []))[1]]
    if not {"file_name", "text"} <= set(columns):
        raise DatasetError(
            f"{path} needs the columns file_name and text in its first line, which has {columns}{_first_of(problems)}"
        )
    for where, record in records:
        if len(record) == len(columns):
            row = dict(zip(columns, record, strict=True))
            yield _Row(where, row["file_name"], row["text"], row.get("split", ""))
        else:
            problems.append(
                f"{where}: expected {len(columns)} columns, found {len(record)}; a caption with commas needs quotes"
            )


def _csv_records(lines: Sequence[tuple[str, str]], problems: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The records that are not blank, each with the "file:line" of its first line.

    After a malformed record reading goes on at the next line: a quote that is never closed costs one line, not all.
    """
    start = 0
    while start < len(lines):
        reader = csv.reader((lines[index][1] + "\n" for index in range(start, len(lines))), strict=True)
        first = start
        try:
            for record in reader:
                if any(map(str.strip, record)):
                    yield lines[first][0], record
                first = start + reader.line_num
            return
        except csv.Error as error:
            problems.append(f"{lines[first][0]}: malformed: {error}")
            start = first + 1


def _jsonl_rows(lines: Sequence[tuple[str, str]], problems: list[str]) -> Iterator[_Row]:
    for where, line in lines:
        try:
            rows = list(_json_rows(where, line))
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: malformed: {error}")
        else:
            yield from rows


def _json_rows(where: str, line: str) -> Iterator[_Row]:
    """The captions of one line. Raises ValueError with what is wrong with it."""
    row = json.loads(line)
    if not isinstance(row, dict) or not {"file_name", "text"} <= row.keys():
        raise ValueError("expected an object with file_name and text")
    image, split = row["file_name"], row.get("split") or ""
    texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
    if not all(isinstance(value, str) for value in (image, split, *texts)):
        raise ValueError("file_name and split should be strings, text a string or a list of strings")
    "".join([image, *texts]).encode()  # half of a surrogate pair, written as an escape, cannot be saved as UTF-8
    for text in texts or [""]:
        yield _Row(where, image, text, split)
