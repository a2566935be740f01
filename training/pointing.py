"""Measure whether maps point at what a word names, on pictures where its place is known:
`python -m training.pointing --model runs/flickr8k --data flickr8k=data/flickr8k --of evidence`.

Two photographs are placed side by side in one picture. A thing that only one of them shows is in one half of the
picture, so the map of its word, of attention or of evidence, should lie on that half. Chance is one half of the weight.
"""

import argparse
import logging
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from captioner.api import Captioner
from captioner.captions import Caption
from captioner.cli import positive
from captioner.heatmap import KINDS, upsample
from captioner.images import ImageError, load_image

from . import command
from .checks import Check, add_check_flags, run_check
from .data.items import CaptionedImage
from .metrics import all_maps, attention_entropy
from .words import tokenize

log = logging.getLogger("training")

# Kinds of things, and the words for them.
THINGS = {
    "dog": frozenset("dog dogs puppy puppies".split()),
    "person": frozenset(
        "man men guy guys male person people adult adults woman women lady ladies female boy boys girl girls child "
        "children kid kids toddler baby player players".split()
    ),
}


@dataclass(frozen=True)
class Pointing:
    """The result of the check.

    words: number of words whose maps were measured.
    weight: mean share of a map's weight on the half that shows the thing; 0.5 by chance, and for a map without any.
    hits: share of maps with more than half of their weight there; 0.5 by chance.
    entropy: mean entropy of the maps of all generated words, each with a sum of 1, as a share of its maximum.
    """

    words: int
    weight: float
    hits: float
    entropy: float

    def __str__(self) -> str:
        return (
            f"{self.hits:.0%} of {self.words} words have most of their weight on the right photograph (by chance 50%), "
            f"which gets {self.weight:.0%} of all weight; entropy {self.entropy:.0%} of its maximum"
        )


def check_pointing(
    captioner: Captioner, items: Sequence[CaptionedImage], pairs: int = 200, seed: int = 0, of: str = "attention"
) -> Pointing:
    """Caption pairs of photographs placed side by side, and measure on which half the maps of the words lie.

    Only words that the model generates are measured: a decoder attends before it chooses a word, so the map of a word
    that it was given says little.

    Args:
        captioner: the model.
        items: photographs with people's captions.
        pairs: number of pictures to compose.
        seed: decides which photographs are paired.
        of: which maps to measure, "attention" or "evidence".

    Raises:
        ValueError: the photographs do not make pairs of different things, or no caption named one of them. Pairs with
            a photograph that cannot be read are left out.
    """
    by_thing: dict[str, list[CaptionedImage]] = {}
    for item in items:
        thing = only_thing(item.captions)
        if thing is not None:
            by_thing.setdefault(thing, []).append(item)
    kinds = [(a, b) for a in by_thing for b in by_thing if a != b]
    if not kinds:
        raise ValueError("these photographs show no two different things that can be told apart")
    generator = random.Random(seed)
    halves = [generator.choice(kinds) for _ in range(pairs)]
    chosen = [[generator.choice(by_thing[thing]) for thing in both] for both in halves]
    shown: list[tuple[str, str]] = []

    def pictures() -> Iterator[Image.Image]:
        for both, pair in zip(halves, chosen, strict=True):
            try:
                left, right = (load_image(item.source()) for item in pair)
            except ImageError as error:
                log.warning("skipped: %s", error)
            else:
                shown.append(both)
                yield side_by_side(left, right)

    results = captioner.stream(pictures(), alternatives=0, evidence=of == "evidence")
    captions = [result for result in results if isinstance(result, Caption)]
    shares = []
    for (left_thing, right_thing), caption in zip(shown, captions, strict=True):
        for word, weights in zip(caption.words, caption.maps(of=of), strict=True):
            on_the_left = left_share(weights, caption.displacement)
            if word in THINGS[left_thing]:
                shares.append(on_the_left)
            elif word in THINGS[right_thing]:
                shares.append(1 - on_the_left)
    if not shares:
        raise ValueError(f"none of {len(captions)} captions named what is in the picture")
    hits = float(np.mean([share > 0.5 for share in shares]))
    maps = all_maps(captions)
    if of == "evidence":
        falls = np.concatenate([caption.maps(of=of) for caption in captions])
        falls = falls[falls.any(axis=(1, 2))]
        maps = [falls / falls.sum(axis=(1, 2), keepdims=True)]
    return Pointing(len(shares), float(np.mean(shares)), hits, attention_entropy(maps)[1])


def only_thing(captions: Sequence[str]) -> str | None:
    """The kind of `THINGS` that most of the captions name while none names another kind; None if there is none."""
    counts = Counter(
        thing for caption in captions for thing, words in THINGS.items() if not words.isdisjoint(tokenize(caption))
    )
    if len(counts) != 1:
        return None
    ((thing, count),) = counts.items()
    return thing if count > len(captions) / 2 else None


def side_by_side(left: Image.Image, right: Image.Image, size: int = 224) -> Image.Image:
    """A square picture of the middle halves of two photographs, each `size` / 2 pixels wide."""
    picture = Image.new("RGB", (size, size))
    for number, photo in enumerate((left, right)):
        x = photo.width / 4
        half = photo.resize((size // 2, size), Image.Resampling.LANCZOS, (x, 0, photo.width - x, photo.height))
        picture.paste(half, (number * size // 2, 0))
    return picture


def left_share(weights: np.ndarray, displacement: tuple[float, float]) -> float:
    """The share of a map's weight on the left half of the picture, upsampled as for heatmaps; 0.5 without any."""
    if not weights.any():
        return 0.5
    lit = upsample(weights, (64, 64), displacement)
    return float(lit[:, :32].sum() / lit.sum())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog=command("pointing"),
        description="Place photographs side by side and measure on which of them the map of a word lies.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_check_flags(parser)
    parser.add_argument("--pairs", type=positive, default=200, help="pictures to compose from each data set")
    parser.add_argument("--of", default="attention", choices=KINDS, help="which maps to measure")
    parser.add_argument("--seed", type=int, default=0, help="decides which photographs are paired")
    options = parser.parse_args(arguments)

    def prepare() -> Check:
        captioner = Captioner.from_pretrained(options.model, options.device)
        return lambda name, items: (
            f"{name}: {check_pointing(captioner, items, options.pairs, options.seed, options.of)}"
        )

    return run_check(options, prepare)


if __name__ == "__main__":
    sys.exit(main())
