"""Flickr8k, Flickr30k and COCO as images with their captions, read from whichever layout is on the disk.

Nothing is downloaded here (see `training.prepare`), and no image is opened: a file in the folder is enough.
What cannot be used is skipped and told in `CaptionDataset.problems`, one line each, "file:line: reason".
"""

import csv
import json
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

SPLITS = ("train", "dev", "test")


class DatasetError(RuntimeError):
    """There is no data set to read; the message says what was looked for and how to get it."""


@dataclass(frozen=True)
class CaptionedImage:
    """An image file with its reference captions, in the order and the spelling of the data set.

    dataset: name of the data set that it belongs to.
    """

    path: Path
    captions: tuple[str, ...]
    dataset: str = ""


@dataclass(frozen=True)
class CaptionDataset:
    """A data set as read from the disk.

    Args:
        name: "flickr8k", "flickr30k", "coco", or what a file of your own captions is called.
        splits: the images of "train", "dev" and "test"; a split that the data do not have is empty.
        problems: what was skipped, each "file:line: reason", or "file:images[index]: reason" in JSON.
        layout: in words, which files were read and where the splits come from.
    """

    name: str
    splits: dict[str, tuple[CaptionedImage, ...]]
    problems: tuple[str, ...]
    layout: str = ""


def read_dataset(name: str, root: str | os.PathLike[str]) -> CaptionDataset:
    """Read a data set in the first of its layouts that is found in a folder.

    Karpathy's `dataset_NAME.json` wins over everything else, because published scores are on its splits; then
    come the layouts in the order of `DATASETS`.

    Args:
        name: one of `DATASETS`.
        root: the folder that holds the caption files and the image folders.

    Raises:
        DatasetError: the name or the folder is unknown, no layout is there, a file cannot be read at all, or
            not one image could be used.
    """
    if name not in DATASETS:
        raise DatasetError(
            f"there is no data set {name!r}; there are {', '.join(DATASETS)}, "
            "and files of your own captions, which end in .csv or .jsonl"
        )
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder; python -m training.prepare {name} --root {root} makes it")
    problems: list[str] = []
    try:
        layout = _find_layout(name, root)
        contents = layout.read(layout, root, problems)
        splits = _join(contents, _ImageFinder(root, layout.images), problems)
    except OSError as error:
        raise DatasetError(f"cannot read {error.filename}: {error.strerror}") from error
    splits = {split: tuple(replace(item, dataset=name) for item in items) for split, items in splits.items()}
    if not any(splits.values()):
        first = f"; the first of {len(problems)} problems: {problems[0]}" if problems else ""
        raise DatasetError(f"no image of {name} in {root} can be used{first}")
    return CaptionDataset(name, splits, tuple(problems), f"{layout.title}; {contents.origin}")


class _Listed(NamedTuple):
    """One image of a split, and the line that says so. `image` is relative to an image folder."""

    where: str
    split: str
    image: str


class _Row(NamedTuple):
    """One caption and the line it is on. `number` tells the captions of an image apart, where the data do."""

    where: str
    image: str
    number: str | None
    caption: str


class _Contents(NamedTuple):
    """What the files of a layout say: the images of the splits, all captions, and where the splits come from."""

    listed: Sequence[_Listed]
    rows: Iterable[_Row]
    origin: str


@dataclass(frozen=True)
class _Layout:
    """A way in which a data set lies on the disk; all paths are relative to its root.

    Args:
        title: its name in messages.
        markers: caption files; one of them is enough to recognise the layout.
        images: folders that images may be in.
        read: reads the caption files, adding to the list of problems.
    """

    title: str
    markers: tuple[str, ...]
    images: tuple[str, ...]
    read: Callable[["_Layout", Path, list[str]], _Contents]

    def found(self, root: Path) -> list[Path]:
        """The caption files that are there."""
        return [root / marker for marker in self.markers if (root / marker).is_file()]


def _find_layout(name: str, root: Path) -> _Layout:
    for layout in DATASETS[name]:
        if layout.found(root):
            return layout
    looked_for = "; ".join(f"{layout.title} ({' or '.join(layout.markers)})" for layout in DATASETS[name])
    raise DatasetError(
        f"{root} holds no {name} in a known layout. Looked for {looked_for}. "
        f"python -m training.prepare {name} --root {root} downloads it, or says where to ask for it"
    )


# Joining splits, captions and files


class _ImageFinder:
    """Finds images in folders, each listed only once: a question for each image is slow on a network disk."""

    def __init__(self, root: Path, folders: Sequence[str]) -> None:
        possible = [root / folder for folder in folders]
        self.folders = [folder for folder in possible if folder.is_dir()] or possible
        self.told = " or ".join(map(str, self.folders))
        self.names = cache(self._names)

    @staticmethod
    def _names(folder: Path) -> frozenset[str]:
        try:
            return frozenset(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return frozenset()

    def find(self, image: str) -> Path | None:
        """The path of an image, which may be in a folder of its own ("val2014/x.jpg"), or None."""
        inner, _, file = image.rpartition("/")
        for folder in self.folders:
            if file in self.names(folder / inner):
                return folder / image
        return None


def _join(contents: _Contents, images: _ImageFinder, problems: list[str]) -> dict[str, tuple[CaptionedImage, ...]]:
    captions = _captions_by_image(contents.rows, {item.image for item in contents.listed}, problems)
    splits: dict[str, list[CaptionedImage]] = {split: [] for split in SPLITS}
    first: dict[str, str] = {}
    for where, split, image in contents.listed:
        path = images.find(image)
        if image in first:
            problems.append(f"{where}: {image} is listed before, at {first[image]}")
        elif path is None:
            problems.append(f"{where}: {image} is not in {images.told}")
        elif image not in captions:
            problems.append(f"{where}: {image} has no caption")
        else:
            splits[split].append(CaptionedImage(path, tuple(captions[image])))
        first.setdefault(image, where)
    return {split: tuple(items) for split, items in splits.items()}


def _captions_by_image(rows: Iterable[_Row], wanted: Container[str], problems: list[str]) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    seen: set[tuple[str, str | None]] = set()
    for where, image, number, text in rows:
        if image not in wanted:
            continue
        caption = " ".join(text.split())
        if not any(map(str.isalnum, caption)):
            problems.append(f"{where}: the caption of {image} is empty")
        elif number is not None and (image, number) in seen:
            problems.append(f"{where}: caption {number} of {image} is there twice; the first is kept")
        else:
            captions.setdefault(image, []).append(caption)
        seen.add((image, number))
    return captions


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
    """`image,caption`, of Flickr8k on Kaggle; two people may well write the same, so nothing tells twins apart."""
    try:
        image, caption = next(csv.reader([line], strict=True))
    except (ValueError, csv.Error):
        raise ValueError("expected an image, a comma and a caption, in quotes if it has commas") from None
    return image, None, caption


def _pipe_line(line: str) -> tuple[str, str, str]:
    """`image_name| comment_number| comment`, of Flickr30k on Kaggle; one line of it lacks its second bar."""
    fields = line.split("|", 2)
    if len(fields) != 3:
        raise ValueError("expected an image, a number and a caption with | between them")
    return fields[0].strip(), fields[1].strip(), fields[2]


def _read_text(
    parse: Callable[[str], tuple[str, str | None, str]],
    header: str | None,
    lists: Mapping[str, Sequence[str]],
    proportions: tuple[int, int, int],
) -> Callable[[_Layout, Path, list[str]], _Contents]:
    """A reader of caption files with a caption a line.

    Args:
        parse: a line to image, number and caption; raises ValueError with the reason.
        header: what the first line starts with if it holds the names of the columns.
        lists: for each split the files that may list its images.
        proportions: sizes of train, dev and test where no list is found.
    """

    def rows(path: Path, root: Path, problems: list[str]) -> Iterator[_Row]:
        for count, (where, line) in enumerate(text_lines(path, root, problems)):
            if count == 0 and header is not None and line.startswith(header):
                continue
            try:
                yield _Row(where, *parse(line))
            except ValueError as reason:
                problems.append(f"{where}: {reason}")

    def read(layout: _Layout, root: Path, problems: list[str]) -> _Contents:
        found = list(rows(layout.found(root)[0], root, problems))
        listed = list(_listed(root, lists, problems))
        if listed:
            return _Contents(listed, found, "splits from the official lists")
        return _Contents(_cut(found, proportions), found, "no split lists found, split by sorted name")

    return read


def _listed(root: Path, lists: Mapping[str, Sequence[str]], problems: list[str]) -> Iterator[_Listed]:
    for split, names in lists.items():
        for path in [root / name for name in names if (root / name).is_file()][:1]:
            for where, line in text_lines(path, root, problems):
                image = line.strip()
                # Flickr30k Entities lists its images without the ending.
                yield _Listed(where, split, image if Path(image).suffix else f"{image}.jpg")


def _cut(rows: Iterable[_Row], proportions: tuple[int, int, int]) -> list[_Listed]:
    """Split the images by their sorted names: the first share for training, the next for dev, the rest for test.

    The same files always give the same splits. They are not the official ones, and scores on them compare with
    nobody else's.
    """
    where = {row.image: row.where for row in reversed(list(rows))}
    images = sorted(where)
    train = len(images) * proportions[0] // sum(proportions)
    dev = len(images) * (proportions[0] + proportions[1]) // sum(proportions)
    splits = chain(["train"] * train, ["dev"] * (dev - train), ["test"] * (len(images) - dev))
    return [_Listed(where[image], split, image) for image, split in zip(images, splits, strict=True)]


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


def _read_karpathy(layout: _Layout, root: Path, problems: list[str]) -> _Contents:
    """Karpathy and Fei-Fei's splits; "restval", the part of COCO's val that nobody tests on, is for training."""
    path = layout.found(root)[0]
    names = {"train": "train", "restval": "train", "val": "dev", "test": "test"}
    listed: list[_Listed] = []
    rows: list[_Row] = []
    for index, entry in enumerate(_json(path, ["images"])["images"]):
        where = f"{path.name}:images[{index}]"
        try:
            split = names.get(_text(entry, "split"))
            image = "/".join(_text(entry, key) for key in ("filepath", "filename") if key in entry)
            captions = [_Row(where, image, None, _text(item, "raw")) for item in entry["sentences"]]
        except (KeyError, TypeError) as error:
            problems.append(_malformed(where, error))
            continue
        if split is None:
            problems.append(f"{where}: {image} is in an unknown split {entry['split']!r}")
            continue
        listed.append(_Listed(where, split, image))
        rows += captions
    return _Contents(listed, rows, "Karpathy's splits")


def _read_coco(layout: _Layout, root: Path, problems: list[str]) -> _Contents:
    """COCO's own captions: its train, and its val as dev. The captions of its test images are not public."""
    listed: list[_Listed] = []
    rows: list[_Row] = []
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
                listed.append(_Listed(where, split, images[entry["id"]]))
            except (KeyError, TypeError) as error:
                problems.append(_malformed(where, error))
        for index, entry in enumerate(document["annotations"]):
            where = f"{name}:annotations[{index}]"
            try:
                image = images.get(entry["image_id"])
                if image is None:
                    problems.append(f"{where}: there is no image with the id {entry['image_id']!r}")
                else:
                    rows.append(_Row(where, image, str(entry["id"]), _text(entry, "caption")))
            except (KeyError, TypeError) as error:
                problems.append(_malformed(where, error))
    return _Contents(listed, rows, "COCO's train and val")


def _karpathy(name: str, images: tuple[str, ...]) -> _Layout:
    return _Layout("Karpathy's splits", (f"dataset_{name}.json",), images, _read_karpathy)


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
DATASETS: dict[str, tuple[_Layout, ...]] = {
    "flickr8k": (
        _karpathy("flickr8k", _FLICKR8K_IMAGES),
        _Layout(
            "the public release",
            ("Flickr8k_text/Flickr8k.token.txt", "Flickr8k.token.txt"),
            _FLICKR8K_IMAGES,
            _read_text(_token_line, None, _FLICKR8K_SPLITS, _FLICKR8K_SIZES),
        ),
        _Layout(
            "Kaggle's",
            ("captions.txt",),
            _FLICKR8K_IMAGES,
            _read_text(_comma_line, "image,", _FLICKR8K_SPLITS, _FLICKR8K_SIZES),
        ),
    ),
    "flickr30k": (
        _karpathy("flickr30k", _FLICKR30K_IMAGES),
        _Layout(
            "the public release",
            ("results_20130124.token",),
            _FLICKR30K_IMAGES,
            _read_text(_token_line, None, _FLICKR30K_SPLITS, _FLICKR30K_SIZES),
        ),
        _Layout(
            "Kaggle's",
            ("results.csv", "flickr30k_images/results.csv"),
            _FLICKR30K_IMAGES,
            _read_text(_pipe_line, "image_name|", _FLICKR30K_SPLITS, _FLICKR30K_SIZES),
        ),
    ),
    "coco": (
        _karpathy("coco", _COCO_IMAGES),
        *(
            _Layout(
                f"COCO {year}",
                (f"annotations/captions_train{year}.json", f"annotations/captions_val{year}.json"),
                _COCO_IMAGES,
                _read_coco,
            )
            for year in (2017, 2014)
        ),
    ),
}
