"""The batches of an epoch: images or their cached features, with all captions of each image."""

import random
import re
import signal
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captioner.images import Preprocessing, load_image
from captioner.vocabulary import PAD, Vocabulary
from training.datasets import CaptionedImage
from training.words import tokenize


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


class Source(Protocol):
    """Where a batch's images come from."""

    def load(self, indices: Sequence[int], epoch: int) -> Tensor:
        """The images of these indices as the model reads them in this epoch."""
        ...


class FeatureSource:
    """Features of a frozen encoder, (images, regions, channels) float16, read from the cache."""

    def __init__(self, features: np.ndarray) -> None:
        self.features = features

    def load(self, indices: Sequence[int], epoch: int) -> Tensor:
        """Features in float32; they are the same in every epoch."""
        return torch.from_numpy(self.features[list(indices)]).float()


class MapSource:
    """Maps from below the encoder's tuned blocks, for several fixed views of each image, read from the cache.

    Args:
        views: each (images, rows, columns, channels) float16; epochs take them in turn.
    """

    def __init__(self, views: Sequence[np.ndarray]) -> None:
        self.views = views

    def load(self, indices: Sequence[int], epoch: int) -> Tensor:
        """Maps of the epoch's view in float32, (batch, channels, rows, columns), channels last in memory."""
        maps = self.views[epoch % len(self.views)]
        return torch.from_numpy(maps[list(indices)]).float().permute(0, 3, 1, 2)


class BlankSource:
    """No pictures: for captions alone, an image of one region whose features are all zero."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def load(self, indices: Sequence[int], epoch: int) -> Tensor:
        """Zeros, (batch, 1, channels)."""
        return torch.zeros(len(indices), 1, self.channels)


class ImageSource:
    """Photographs from the disk, augmented in training, the same way whenever the same epoch comes again."""

    def __init__(
        self,
        items: Sequence[CaptionedImage],
        preprocessing: Preprocessing,
        augment: bool,
        seed: int = 0,
        crop_area: float = 0.6,
        colour_change: float = 0.2,
    ) -> None:
        self.items, self.preprocessing, self.augment = items, preprocessing, augment
        self.augmentation = (seed, crop_area, colour_change)

    def load(self, indices: Sequence[int], epoch: int) -> Tensor:
        """Normalised images, (batch, 3, rows, columns)."""
        return torch.from_numpy(self.preprocessing([self.one(index, epoch) for index in indices]))

    def one(self, index: int, epoch: int) -> Image.Image:
        """One image, augmented if this source augments."""
        image = load_image(self.items[index].path)
        if not self.augment:
            return image
        seed, crop_area, colour_change = self.augmentation
        chance = random.Random(f"{seed} {epoch} {index}")
        may_flip = names_no_side(self.items[index].captions)
        return augment(image, self.preprocessing.size, may_flip, chance, crop_area, colour_change)


def names_no_side(captions: Sequence[str]) -> bool:
    """Whether the captions stay true of the mirrored image."""
    return not any(re.search(r"\b(left|right)\b", caption, re.IGNORECASE) for caption in captions)


def augment(
    image: Image.Image,
    size: tuple[int, int],
    may_flip: bool,
    chance: random.Random,
    crop_area: float = 0.6,
    colour_change: float = 0.2,
) -> Image.Image:
    """A random crop, maybe mirrored, with its light and colours a little changed.

    Args:
        size: rows and columns of the result.
        may_flip: whether the image may be mirrored left to right.
        chance: where the randomness comes from.
        crop_area: smallest share of the area that is kept.
        colour_change: brightness, contrast and saturation are multiplied by 1 plus or minus at most this.
    """
    share, stretch = chance.uniform(crop_area, 1.0), chance.uniform(0.85, 1.18)
    width = min(image.width, image.width * (share * stretch) ** 0.5)
    height = min(image.height, image.height * (share / stretch) ** 0.5)
    left, top = chance.uniform(0, image.width - width), chance.uniform(0, image.height - height)
    image = image.resize(size[::-1], Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    if may_flip and chance.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(chance.uniform(1 - colour_change, 1 + colour_change))
    return image


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
