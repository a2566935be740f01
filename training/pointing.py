"""Does attention look at the right place? A check on pictures in which the place of a word is known.

Two photographs are set side by side in one picture. A word that people used of the one and nobody of the other is
then to be found in one half, and its attention map should fall on that half. Chance is one half of the weight.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from captioner.api import Captioner
from captioner.heatmap import upsample
from captioner.images import load_image
from training.datasets import CaptionedImage
from training.words import tokenize

# Things with a place, and the words for them.
THINGS = {
    "dog": frozenset("dog dogs puppy puppies".split()),
    "person": frozenset(
        "man men guy guys male person people adult adults woman women lady ladies female boy boys girl girls child "
        "children kid kids toddler baby player players".split()
    ),
}


@dataclass(frozen=True)
class Pointing:
    """What the check found.

    words: how many maps were looked at.
    weight: mean share of a map's weight that falls on the half where the thing is; 0.5 by chance.
    hits: share of maps with more than half of their weight there; 0.5 by chance.
    """

    words: int
    weight: float
    hits: float

    def __str__(self) -> str:
        return f"{self.hits:.0%} of {self.words} words, {self.weight:.0%} of the weight; by chance 50%"


def check_pointing(captioner: Captioner, items: Sequence[CaptionedImage], pairs: int = 200, seed: int = 0) -> Pointing:
    """Caption pairs of photographs set side by side, and see on which half the maps of the words fall.

    Only words that the model says by itself are looked at: a decoder looks before it knows its word, so the map of
    a word that was put into its mouth tells little.

    Args:
        captioner: the model.
        items: photographs with people's captions.
        pairs: how many pictures to make.
        seed: which ones.

    Raises:
        ValueError: the photographs do not make pairs of different things, or no caption named one of them.
    """
    by_thing: dict[str, list[CaptionedImage]] = {}
    for item in items:
        thing = only_thing(item.captions)
        if thing is not None:
            by_thing.setdefault(thing, []).append(item)
    kinds = [(a, b) for a in by_thing for b in by_thing if a != b]
    if not kinds:
        raise ValueError("these photographs show no two different things that can be told apart")
    chance = random.Random(seed)
    halves = [chance.choice(kinds) for _ in range(pairs)]
    photos = [[load_image(chance.choice(by_thing[thing]).path) for thing in both] for both in halves]
    pictures = [side_by_side(left, right) for left, right in photos]
    shares = []
    for (left, right), caption in zip(halves, captioner.caption(pictures, alternatives=0), strict=True):
        for word, weights in zip(caption.words, caption.attention, strict=True):
            on_the_left = left_share(weights, caption.displacement)
            if word in THINGS[left]:
                shares.append(on_the_left)
            elif word in THINGS[right]:
                shares.append(1 - on_the_left)
    if not shares:
        raise ValueError(f"none of {pairs} captions named what is in the picture")
    return Pointing(len(shares), float(np.mean(shares)), float(np.mean([share > 0.5 for share in shares])))


def only_thing(captions: Sequence[str]) -> str | None:
    """Which of `THINGS` most of the captions name and none names another beside it; None where that is not so."""
    counts = Counter(
        thing for caption in captions for thing, words in THINGS.items() if not words.isdisjoint(tokenize(caption))
    )
    if len(counts) != 1:
        return None
    ((thing, count),) = counts.items()
    return thing if count > len(captions) / 2 else None


def side_by_side(left: Image.Image, right: Image.Image, size: int = 224) -> Image.Image:
    """The middle of each photograph, half as wide as it was, beside the other: together as wide as high."""
    picture = Image.new("RGB", (size, size))
    for number, photo in enumerate((left, right)):
        x = photo.width / 4
        half = photo.resize((size // 2, size), Image.Resampling.LANCZOS, (x, 0, photo.width - x, photo.height))
        picture.paste(half, (number * size // 2, 0))
    return picture


def left_share(weights: np.ndarray, displacement: tuple[float, float]) -> float:
    """The share of a map's weight on the left half of the picture, drawn as heatmaps are."""
    lit = upsample(weights, (64, 64), displacement)
    return float(lit[:, :32].sum() / lit.sum())
