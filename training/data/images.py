"""The images of a batch: photographs, augmented in training, or cached features of them."""

import random
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from captioner.images import Preprocessing, load_image

from .items import CaptionedImage


class Source(Protocol):
    """Gives the images of a batch."""

    def load(self, indices: Sequence[int], epoch: int) -> Tensor:
        """The images with these indices, as the model reads them in this epoch."""
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
    """No images: for captions alone, an image of one region whose features are all zero."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def load(self, indices: Sequence[int], epoch: int) -> Tensor:
        """Zeros, (batch, 1, channels)."""
        return torch.zeros(len(indices), 1, self.channels)


class ImageSource:
    """Photographs from the disk, augmented or not.

    Augmentation depends only on the seed, the epoch and the index, so a resumed run sees the same images.

    Args:
        items: the photographs.
        preprocessing: the model's.
        augment: whether to augment.
        seed, crop_area, colour_change: of the augmentation; see `augment`.
    """

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
        image = load_image(self.items[index].source())
        if not self.augment:
            return image
        seed, crop_area, colour_change = self.augmentation
        generator = random.Random(f"{seed} {epoch} {index}")
        may_flip = names_no_side(self.items[index].captions)
        return augment(image, self.preprocessing.size, may_flip, generator, crop_area, colour_change)


def names_no_side(captions: Sequence[str]) -> bool:
    """Whether the captions stay true when the image is mirrored."""
    return not any(re.search(r"\b(left|right)\b", caption, re.IGNORECASE) for caption in captions)


def augment(
    image: Image.Image,
    size: tuple[int, int],
    may_flip: bool,
    generator: random.Random,
    crop_area: float = 0.6,
    colour_change: float = 0.2,
) -> Image.Image:
    """A random crop, mirrored with probability one half, with brightness, contrast and saturation changed a little.

    Args:
        size: rows and columns of the result.
        may_flip: whether the image may be mirrored left to right.
        generator: source of the random numbers.
        crop_area: smallest share of the area that a crop keeps.
        colour_change: brightness, contrast and saturation are multiplied by 1 plus or minus at most this.
    """
    share, stretch = generator.uniform(crop_area, 1.0), generator.uniform(0.85, 1.18)
    width = min(image.width, image.width * (share * stretch) ** 0.5)
    height = min(image.height, image.height * (share / stretch) ** 0.5)
    left, top = generator.uniform(0, image.width - width), generator.uniform(0, image.height - height)
    image = image.resize(size[::-1], Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    if may_flip and generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(generator.uniform(1 - colour_change, 1 + colour_change))
    return image
