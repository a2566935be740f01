"""Flickr8k, Flickr30k and COCO as images with their captions, read from whichever layout is on the disk.

Nothing is downloaded here (see `prepare`), and no image is opened: it is enough that the file exists. Entries that
cannot be used are skipped and listed in `CaptionDataset.problems`, one line each, "file:line: reason".
"""

import os
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from .. import command
from .items import SPLITS, CaptionDataset, CaptionedImage, DatasetError
from .layouts import DATASETS, Contents, Layout, Row


def read_dataset(name: str, root: str | os.PathLike[str]) -> CaptionDataset:
    """Read a data set in the first of its layouts that is found in a folder.

    Layouts are tried in the order of `DATASETS`. Karpathy's `dataset_NAME.json` comes first, because published scores
    are on its splits.

    Args:
        name: one of `DATASETS`.
        root: the folder that holds the caption files and the image folders.

    Raises:
        DatasetError: there is no such data set or folder, no layout is found, a file cannot be read, or no image can
            be used.
    """
    if name not in DATASETS:
        raise DatasetError(
            f"there is no data set {name!r}; there are {', '.join(DATASETS)}, "
            "files of your own captions, which end in .csv or .jsonl, and shards, which end in .tar"
        )
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder; {command('prepare')} {name} --root {root} makes it")
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


def _find_layout(name: str, root: Path) -> Layout:
    for layout in DATASETS[name]:
        if layout.found(root):
            return layout
    looked_for = "; ".join(f"{layout.title} ({' or '.join(layout.markers)})" for layout in DATASETS[name])
    raise DatasetError(
        f"{root} holds no {name} in a known layout. Looked for {looked_for}. "
        f"{command('prepare')} {name} --root {root} downloads it, or says where to ask for it"
    )


class _ImageFinder:
    """Finds images in folders. Each folder is listed once: a look-up for each image is slow on network disks."""

    def __init__(self, root: Path, folders: Sequence[str]) -> None:
        possible = [root / folder for folder in folders]
        self.folders = [folder for folder in possible if folder.is_dir()] or possible
        self.description = " or ".join(map(str, self.folders))
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


def _join(contents: Contents, images: _ImageFinder, problems: list[str]) -> dict[str, tuple[CaptionedImage, ...]]:
    captions = _captions_by_image(contents.rows, {item.image for item in contents.listed}, problems)
    splits: dict[str, list[CaptionedImage]] = {split: [] for split in SPLITS}
    first: dict[str, str] = {}
    for where, split, image in contents.listed:
        path = images.find(image)
        if image in first:
            problems.append(f"{where}: {image} is listed before, at {first[image]}")
        elif path is None:
            problems.append(f"{where}: {image} is not in {images.description}")
        elif image not in captions:
            problems.append(f"{where}: {image} has no caption")
        else:
            splits[split].append(CaptionedImage(path, tuple(captions[image])))
        first.setdefault(image, where)
    return {split: tuple(items) for split, items in splits.items()}


def _captions_by_image(rows: Iterable[Row], wanted: Container[str], problems: list[str]) -> dict[str, list[str]]:
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
