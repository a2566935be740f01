"""The batches of an epoch: images or their cached features, with all captions of each image."""

import signal
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captioner.vocabulary import PAD, Vocabulary

from ..words import tokenize
from .images import Source
from .items import CaptionedImage


class Batch(NamedTuple):
    """One process's share of a batch.

    images: (share, 3, height, width), or features (share, regions, channels), float32.
    captions: (share, rows, length) ids, each image's captions from the longest to the shortest, then `PAD`.
    weight: 1, or 0 where this process has no share and only keeps the others company.
    words, whole, size: words to predict, captions and images in the whole batch, over all processes; each image's
        words and captions are counted as often as its data set's weight says.
    indices: which images they are.
    image_weights: (share,), the weight of each image's data set.
    """

    images: Tensor
    captions: Tensor
    weight: float
    words: float
    whole: float
    size: int
    indices: list[int]
    image_weights: Tensor


def encode_captions(item: CaptionedImage, vocabulary: Vocabulary, max_length: int) -> list[list[int]]:
    """Ids of an image's captions, the longest first; a caption of over `max_length` words is cut, with no end."""
    encoded = [vocabulary.encode(tokenize(caption)) for caption in item.captions]
    cut = [ids if len(ids) <= max_length + 2 else ids[: max_length + 1] for ids in encoded]
    return sorted(cut, key=len, reverse=True)


class EpochBatches(Dataset[Batch]):
    """The batches of one epoch; every image comes once, and each process gets its share of each batch.

    Args:
        source: where images come from.
        captions: ids of each image's captions, from `encode_captions`.
        batch_size: images in a batch over all processes.
        seed, epoch: they decide the order.
        rank, size: which process of how many this is.
        weights: of each image in the loss; None for 1.
    """

    def __init__(
        self,
        source: Source,
        captions: Sequence[Sequence[Sequence[int]]],
        batch_size: int,
        seed: int,
        epoch: int,
        rank: int = 0,
        size: int = 1,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.source, self.captions = source, captions
        self.weights = weights or [1.0] * len(captions)
        self.epoch, self.rank, self.size = epoch, rank, size
        chance = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)
        order = torch.randperm(len(captions), generator=chance).tolist()
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
    """Let a signal that reaches every process of the run be answered by the training loop alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def pad_captions(captions: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Captions of several images as one tensor of ids, (images, rows, length), filled up with `PAD`."""
    rows = max(len(of_image) for of_image in captions)
    length = max(len(caption) for of_image in captions for caption in of_image)
    padded = torch.full((len(captions), rows, length), PAD)
    for i, of_image in enumerate(captions):
        for j, caption in enumerate(of_image):
            padded[i, j, : len(caption)] = torch.tensor(caption)
    return padded
