"""The layouts in which Flickr8k, Flickr30k and COCO are distributed, and the readers of their caption files."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from .items import SPLITS, DatasetError


class Listed(NamedTuple):
    """One image of a split.

    where: "file:line" of the entry.
    split: "train", "dev" or "test".
    image: path relative to an image folder.
    """

    where: str
    split: str
    image: str


class Row(NamedTuple):
    """One caption.

    where: "file:line" of the entry.
    image: path relative to an image folder.
    number: distinguishes the captions of an image; None where the data do not number them.
    """

    where: str
    image: str
    number: str | None
    caption: str


class Contents(NamedTuple):
    """The contents of a layout's files.

    listed: the images of the splits.
    rows: all captions.
    origin: in words, where the splits come from.
    """

    listed: Sequence[Listed]
    rows: Iterable[Row]
    origin: str


@dataclass(frozen=True)
class Layout:
    """The files and folders in which a data set is stored; all paths are relative to its root.

    Args:
        title: its name in messages.
        markers: caption files; the layout is recognised by any one of them.
        images: folders that images may be in.
        read: reads the caption files, adding to the list of problems.
    """

    title: str
    markers: tuple[str, ...]
    images: tuple[str, ...]
    read: Callable[["Layout", Path, list[str]], Contents]

    def found(self, root: Path) -> list[Path]:
        """The caption files that exist."""
        return [root / marker for marker in self.markers if (root / marker).is_file()]


# Text files: one caption a line


def text_lines(path: Path, root: Path, problems: list[str]) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, each with its "file:line"."""
    name = path.relative_to(root).as_posix()
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode("utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            problems.append(f"{name}:{number}: byte {error.start + 1} is not UTF-8")
            continue
        if text.strip():
            yield f"{name}:{number}", text


def _token_line(line: str) -> tuple[str, str, str]:
    """`NAME.jpg#K<TAB>caption`, of the public releases."""
    key, tab, caption = line.partition("\t")
    image, _, number = key.rpartition("#")
    if not (image and number and tab):
        raise ValueError("expected NAME.jpg#NUMBER, a tab and a caption")
    return image, number, caption


def _comma_line(line: str) -> tuple[str, None, str]:
    """`image,caption`, of Flickr8k on Kaggle; captions have no numbers, and two people may write the same one."""
    try:
        image, caption = next(csv.reader([line], strict=True))
    except (ValueError, csv.Error):
        raise ValueError("expected an image, a comma and a caption, in quotes if it has commas") from None
    return image, None, caption


def _pipe_line(line: str) -> tuple[str, str, str]:
    """`image_name| comment_number| comment`, of Flickr30k on Kaggle; one of its lines lacks the second bar."""
    fields = line.split("|", 2)
    if len(fields) != 3:
        raise ValueError("expected an image, a number and a caption with | between them")
    return fields[0].strip(), fields[1].strip(), fields[2]


def _read_text(
    parse: Callable[[str], tuple[str, str | None, str]],
    header: str | None,
    lists: Mapping[str, Sequence[str]],
    proportions: tuple[int, int, int],
) -> Callable[[Layout, Path, list[str]], Contents]:
    """A reader of caption files with one caption on each line.

    Args:
        parse: splits a line into image, number and caption; raises ValueError with the reason where it cannot.
        header: beginning of the first line, where that holds the names of the columns.
        lists: for each split, the files that may list its images.
        proportions: of the sizes of train, dev and test, where no list is found.
    """

    def rows(path: Path, root: Path, problems: list[str]) -> Iterator[Row]:
        for count, (where, line) in enumerate(text_lines(path, root, problems)):
            if count == 0 and header is not None and line.startswith(header):
                continue
            try:
                yield Row(where, *parse(line))
            except ValueError as reason:
                problems.append(f"{where}: {reason}")

    def read(layout: Layout, root: Path, problems: list[str]) -> Contents:
        found = list(rows(layout.found(root)[0], root, problems))
        listed = list(_listed(root, lists, problems))
        if listed:
            return Contents(listed, found, "splits from the official lists")
        return Contents(_cut(found, proportions), found, "no split lists found, split by sorted name")

    return read


def _listed(root: Path, lists: Mapping[str, Sequence[str]], problems: list[str]) -> Iterator[Listed]:
    for split, names in lists.items():
        for path in [root / name for name in names if (root / name).is_file()][:1]:
            for where, line in text_lines(path, root, problems):
                image = line.strip()
                # Flickr30k Entities lists its images without the ending.
                yield Listed(where, split, image if Path(image).suffix else f"{image}.jpg")


def _cut(rows: Iterable[Row], proportions: tuple[int, int, int]) -> list[Listed]:
    """Split the images by their sorted names: the first share for training, the next for dev, the rest for test.

    The same files always give the same splits. They are not the official ones, so scores on them cannot be compared
    with published scores.
    """
    where = {row.image: row.where for row in reversed(list(rows))}
    images = sorted(where)
    train = len(images) * proportions[0] // sum(proportions)
    dev = len(images) * (proportions[0] + proportions[1]) // sum(proportions)
    splits = chain(["train"] * train, ["dev"] * (dev - train), ["test"] * (len(images) - dev))
    return [Listed(where[image], split, image) for image, split in zip(images, splits, strict=True)]


# JSON files


def _json(path: Path, keys: Sequence[str]) -> dict[str, list[Any]]:
    """A JSON object that has lists under the given keys."""
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not JSON, or was cut short: {error}") from error
    if not isinstance(document, dict) or not all(isinstance(document.get(key), list) for key in keys):
        raise DatasetError(f"{path} is not a caption file: it needs lists under {' and '.join(keys)}")
    return document


def _text(entry: dict[str, Any], key: str) -> str:
    if not isinstance(entry[key], str):
        raise TypeError(f"{key} is not text")
    return entry[key]


def _malformed(where: str, error: Exception) -> str:
    reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    return f"{where}: malformed: {reason}"


def _read_karpathy(layout: Layout, root: Path, problems: list[str]) -> Contents:
    """Karpathy and Fei-Fei's splits; "restval", the part of COCO's val outside dev and test, is for training."""
    path = layout.found(root)[0]
    names = {"train": "train", "restval": "train", "val": "dev", "test": "test"}
    listed: list[Listed] = []
    rows: list[Row] = []
    for index, entry in enumerate(_json(path, ["images"])["images"]):
        where = f"{path.name}:images[{index}]"
        try:
            split = names.get(_text(entry, "split"))
            image = "/".join(_text(entry, key) for key in ("filepath", "filename") if key in entry)
            captions = [Row(where, image, None, _text(item, "raw")) for item in entry["sentences"]]
        except (KeyError, TypeError) as error:
            problems.append(_malformed(where, error))
            continue
        if split is None:
            problems.append(f"{where}: {image} is in an unknown split {entry['split']!r}")
            continue
        listed.append(Listed(where, split, image))
        rows += captions
    return Contents(listed, rows, "Karpathy's splits")


def _read_coco(layout: Layout, root: Path, problems: list[str]) -> Contents:
    """COCO's own captions: its train, and its val as dev. Captions of its test images are not public."""
    listed: list[Listed] = []
    rows: list[Row] = []
    for path in layout.found(root):
        folder = path.stem.removeprefix("captions_")
        split = "train" if folder.startswith("train") else "dev"
        name = path.relative_to(root).as_posix()
        document = _json(path, ["images", "annotations"])
        images: dict[Any, str] = {}
        for index, entry in enumerate(document["images"]):
            where = f"{name}:images[{index}]"
            try:
                images[entry["id"]] = f"{folder}/{_text(entry, 'file_name')}"
                listed.append(Listed(where, split, images[entry["id"]]))
            except (KeyError, TypeError) as error:
                problems.append(_malformed(where, error))
        for index, entry in enumerate(document["annotations"]):
            where = f"{name}:annotations[{index}]"
            try:
                image = images.get(entry["image_id"])
                if image is None:
                    problems.append(f"{where}: there is no image with the id {entry['image_id']!r}")
                else:
                    rows.append(Row(where, image, str(entry["id"]), _text(entry, "caption")))
            except (KeyError, TypeError) as error:
                problems.append(_malformed(where, error))
    return Contents(listed, rows, "COCO's train and val")


def _karpathy(name: str, images: tuple[str, ...]) -> Layout:
    return Layout("Karpathy's splits", (f"dataset_{name}.json",), images, _read_karpathy)


_FLICKR8K_IMAGES = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images")
_FLICKR8K_SPLITS = {
    split: (f"Flickr8k_text/Flickr_8k.{split}Images.txt", f"Flickr_8k.{split}Images.txt") for split in SPLITS
}
_FLICKR8K_SIZES = (6000, 1000, 1000)
_FLICKR30K_IMAGES = (
    "flickr30k-images",
    "flickr30k_images/flickr30k_images",
    "flickr30k_images",
    "Images",
    "images",
)
_FLICKR30K_SPLITS = {"train": ("train.txt",), "dev": ("val.txt",), "test": ("test.txt",)}
_FLICKR30K_SIZES = (29000, 1014, 1000)
_COCO_IMAGES = (".", "images")

# The layouts of each data set, in the order in which they are looked for.
DATASETS: dict[str, tuple[Layout, ...]] = {
    "flickr8k": (
        _karpathy("flickr8k", _FLICKR8K_IMAGES),
        Layout(
            "the public release",
            ("Flickr8k_text/Flickr8k.token.txt", "Flickr8k.token.txt"),
            _FLICKR8K_IMAGES,
            _read_text(_token_line, None, _FLICKR8K_SPLITS, _FLICKR8K_SIZES),
        ),
        Layout(
            "Kaggle's",
            ("captions.txt",),
            _FLICKR8K_IMAGES,
            _read_text(_comma_line, "image,", _FLICKR8K_SPLITS, _FLICKR8K_SIZES),
        ),
    ),
    "flickr30k": (
        _karpathy("flickr30k", _FLICKR30K_IMAGES),
        Layout(
            "the public release",
            ("results_20130124.token",),
            _FLICKR30K_IMAGES,
            _read_text(_token_line, None, _FLICKR30K_SPLITS, _FLICKR30K_SIZES),
        ),
        Layout(
            "Kaggle's",
            ("results.csv", "flickr30k_images/results.csv"),
            _FLICKR30K_IMAGES,
            _read_text(_pipe_line, "image_name|", _FLICKR30K_SPLITS, _FLICKR30K_SIZES),
        ),
    ),
    "coco": (
        _karpathy("coco", _COCO_IMAGES),
        *(
            Layout(
                f"COCO {year}",
                (f"annotations/captions_train{year}.json", f"annotations/captions_val{year}.json"),
                _COCO_IMAGES,
                _read_coco,
            )
            for year in (2017, 2014)
        ),
    ),
}
