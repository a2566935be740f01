"""Images with their captions, and data sets of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from captioner.images import NamedBytes

SPLITS = ("train", "dev", "test")


class DatasetError(RuntimeError):
    """A data set cannot be read; the message says what was looked for and how to get it."""


class Member(NamedTuple):
    """An image in a shard: the name of its file in the data set, and where its bytes lie in the shard."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image file with its reference captions, in the order and the spelling of the data set.

    path: the image's file, or the shard that holds it.
    dataset: name of the data set that it belongs to.
    member: where it lies in a shard; None for an image in a file of its own.
    """

    path: Path
    captions: tuple[str, ...]
    dataset: str = ""
    member: Member | None = None

    @property
    def name(self) -> str:
        """The name of the image's file."""
        return self.member.name if self.member else self.path.name

    @property
    def key(self) -> str:
        """A name that no other image has."""
        return f"{self.path}@{self.member.offset}" if self.member else str(self.path)

    def source(self) -> Path | bytes:
        """What `load_image` reads the image from: its path, or its bytes where it lies in a shard.

        Raises:
            OSError: the shard cannot be read.
        """
        if self.member is None:
            return self.path
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.member.offset)
            data = NamedBytes(file.read(self.member.size))
        data.name = f"{self.path}: {self.member.name}"
        return data

    def version(self) -> tuple[str | int, ...]:
        """Name, size and date of the file, and the image's place in a shard: a changed image has another version.

        Raises:
            OSError: there is no such file.
        """
        status = self.path.stat()
        if self.member is None:
            return self.path.name, status.st_size, status.st_mtime_ns
        return *self.member, status.st_mtime_ns


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
