"""Images with their captions, and data sets of them."""

from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "dev", "test")


class DatasetError(RuntimeError):
    """A data set cannot be read; the message says what was looked for and how to get it."""


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
        problems: the entries that were skipped, each "file:line: reason", or "file:images[index]: reason" in JSON.
        layout: in words, which files were read and where the splits come from.
    """

    name: str
    splits: dict[str, tuple[CaptionedImage, ...]]
    problems: tuple[str, ...]
    layout: str = ""
