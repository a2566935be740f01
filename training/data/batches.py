"""The batches of an epoch: images or their cached features, with all captions of each image."""

import math
import signal
from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captioner.vocabulary import PAD, Vocabulary

from ..words import tokenize
from .images import Source
from .items import CaptionedImage

SHUFFLE_BUFFER = 10_000


class Batch(NamedTuple):
    """One process's share of a batch.

    images: (share, 3, height, width), or features (share, regions, channels), float32.
    captions: (share, rows, length) ids, each image's captions from the longest to the shortest, then `PAD`.
    weight: 1; 0 where this process has no images in this batch and only joins the collective operations.
    word_count, caption_count, image_count: words to predict, captions and images in the whole batch, over all
        processes. Words and captions count as often as the weight of their data set says.
    indices: of the images in the training set.
    image_weights: (share,), the weight of each image's data set.
    """

    images: Tensor
    captions: Tensor
    weight: float
    word_count: float
    caption_count: float
    image_count: int
    indices: list[int]
    image_weights: Tensor

    def parts(self, count: int) -> list["Batch"]:
        """The share in at most `count` parts of equal size, whose losses add up to that of the share."""
        if count == 1:
            return [self]
        size = math.ceil(len(self.indices) / count)
        starts = range(0, len(self.indices), size)
        indices = [self.indices[start : start + size] for start in starts]
        tensors = zip(self.images.split(size), self.captions.split(size), self.image_weights.split(size), strict=True)
        return [
            self._replace(images=images, captions=without_padding(captions), indices=of_part, image_weights=weights)
            for of_part, (images, captions, weights) in zip(indices, tensors, strict=True)
        ]


def encode_captions(item: CaptionedImage, vocabulary: Vocabulary, max_length: int) -> list[list[int]]:
    """Ids of an image's captions, the longest first; one of more than `max_length` words is cut and has no `END`."""
    encoded = [vocabulary.encode(tokenize(caption)) for caption in item.captions]
    cut = [ids if len(ids) <= max_length + 2 else ids[: max_length + 1] for ids in encoded]
    return sorted(cut, key=len, reverse=True)


def file_numbers(items: Sequence[CaptionedImage]) -> list[int] | None:
    """The number of the file that each image lies in; None where every image has a file of its own."""
    if not any(item.member for item in items):
        return None
    numbers: dict[Path, int] = {}
    return [numbers.setdefault(item.path, len(numbers)) for item in items]


def epoch_order(
    count: int, generator: torch.Generator, files: Sequence[int] | None = None, buffer: int = SHUFFLE_BUFFER
) -> list[int]:
    """A random order of images. Of many images in few files, `buffer` images are shuffled at a time.

    The files come in random order, and within a buffer the images do. So at any time images are read from as few files
    as a buffer holds, and each file is read in one part of the epoch.

    Args:
        count: number of images.
        generator: source of the random numbers.
        files: number of the file that each image lies in; None for an order that does not depend on the files.
        buffer: images that are shuffled together.
    """
    order = torch.randperm(count, generator=generator)
    if files is None or count <= buffer:
        return order.tolist()
    place = torch.randperm(max(files) + 1, generator=generator)
    order = order[place[torch.tensor(files)[order]].argsort(stable=True)]
    blocks = (block[torch.randperm(len(block), generator=generator)] for block in order.split(buffer))
    return torch.cat(list(blocks)).tolist()


class Captions(Protocol):
    """Ids of each image's captions, by the number of the image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sequence[Sequence[int]]: ...


class CaptionTable:
    """Ids of each image's captions, kept as numbers instead of Python objects, in a third of the memory.

    Args:
        images: the captions of each image, from `encode_captions`.
    """

    def __init__(self, images: Iterable[Sequence[Sequence[int]]]) -> None:
        self.ids = array("i")
        self.caption_ends, self.image_ends = array("q", [0]), array("q", [0])
        for captions in images:
            for caption in captions:
                self.ids.extend(caption)
                self.caption_ends.append(len(self.ids))
            self.image_ends.append(len(self.caption_ends) - 1)

    def __len__(self) -> int:
        return len(self.image_ends) - 1

    def __getitem__(self, index: int, /) -> list[list[int]]:
        ends = self.caption_ends[self.image_ends[index] : self.image_ends[index + 1] + 1]
        return [self.ids[start:end].tolist() for start, end in pairwise(ends)]


class EpochBatches(Dataset[Batch]):
    """The batches of one epoch: every image once, in random order. Each process gets its share of each batch.

    Args:
        source: gives the images.
        captions: ids of each image's captions, from `encode_captions`.
        batch_size: images in a batch over all processes.
        seed, epoch: decide the order.
        rank, size: number of this process, and number of processes.
        weights: weight of each image in the loss; None for 1.
        files: number of the file that each image lies in, such as a shard; None if the order does not depend on them.
    """

    def __init__(
        self,
        source: Source,
        captions: Captions,
        batch_size: int,
        seed: int,
        epoch: int,
        rank: int = 0,
        size: int = 1,
        weights: Sequence[float] | None = None,
        files: Sequence[int] | None = None,
    ) -> None:
        self.source, self.captions = source, captions
        self.weights = weights or [1.0] * len(captions)
        self.epoch, self.rank, self.size = epoch, rank, size
        generator = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)
        order = epoch_order(len(captions), generator, files)
        self.batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> Batch:
        whole = self.batches[position]
        share = whole[self.rank :: self.size]
        weight = 1.0 if share else 0.0
        share = share or whole[:1]
        captions = [self.captions[index] for index in share]
        return Batch(
            self.source.load(share, self.epoch),
            pad_captions(captions),
            weight,
            sum(self.weights[index] * (len(caption) - 1) for index in whole for caption in self.captions[index]),
            sum(self.weights[index] * len(self.captions[index]) for index in whole),
            len(whole),
            list(share),
            torch.tensor([self.weights[index] for index in share]),
        )

    def loader(self, start: int, workers: int, pin_memory: bool) -> DataLoader[Batch]:
        """The batches from number `start` on, loaded ahead by worker processes."""
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(start, len(self)),
            num_workers=workers,
            worker_init_fn=ignore_signals,
            pin_memory=pin_memory,
        )


def ignore_signals(_: int) -> None:
    """Ignore SIGINT and SIGTERM, which reach every process of a run, in a worker: the training loop handles them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def without_padding(captions: Tensor) -> Tensor:
    """Captions, (images, rows, length), without the rows and the last columns that are padding for all images."""
    words = captions != PAD
    return captions[:, words.any(dim=2).any(dim=0)][..., words.flatten(0, 1).any(dim=0)]


def pad_captions(captions: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Captions of several images as one tensor of ids, (images, rows, length), padded with `PAD`."""
    rows = max(len(of_image) for of_image in captions)
    length = max(len(caption) for of_image in captions for caption in of_image)
    padded = torch.full((len(captions), rows, length), PAD)
    for i, of_image in enumerate(captions):
        for j, caption in enumerate(of_image):
            padded[i, j, : len(caption)] = torch.tensor(caption)
    return padded
