"""Measure whether maps tell the truth about words:
`python -m training.truth --model runs/flickr8k --data flickr8k=data/flickr8k`.

If a map says what a word rests on, the word becomes less likely as the pixels of its largest regions are replaced by
the mean colour of the picture, and more so than with other regions (deletion; Petsiuk et al. 2018, section 3.3). Here
the encoder sees the changed picture too, which `captioner.hiding` leaves out. Insertion begins with a picture of the
mean colour and shows the largest regions first.
"""

import argparse
import itertools
import logging
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from captioner.api import Captioner
from captioner.arrays import to_numpy
from captioner.captions import Caption
from captioner.cli import positive
from captioner.images import load_image
from captioner.network.model import ShowAttendTell
from captioner.search import follow
from captioner.vocabulary import PAD, START, UNKNOWN

from . import command
from .checks import Check, add_check_flags, run_check
from .data.items import CaptionedImage
from .metrics import rank_correlation

log = logging.getLogger("training")

# Common nouns of captions. A tagger would need data that has to be downloaded.
NOUNS = frozenset(
    "man men woman women boy boys girl girls child children kid kids baby toddler people person crowd guy lady player "
    "players team rider skier skiers snowboarder skateboarder surfer biker hiker climber cyclist adult couple bride "
    "dog dogs puppy puppies cat cats kitten bird birds horse horses sheep cow cows cattle elephant elephants giraffe "
    "giraffes zebra zebras bear bears duck ducks animal animals ball frisbee bat racket racquet toy toys stick bone "
    "hurdle skateboard snowboard surfboard skis kite kites bike bikes bicycle bicycles motorcycle motorcycles scooter "
    "car cars truck bus train plane airplane jet boat boats kayak canoe raft wheel tire water pool ocean lake river "
    "stream pond waterfall fountain wave waves beach shore sand grass lawn field snow ice dirt mud rock rocks "
    "mountain mountains hill cliff tree trees forest woods leaves flower flowers plant plants sky cloud clouds sunset "
    "street road sidewalk path trail track tracks bridge building buildings house church tower wall fence gate stairs "
    "steps ramp rail railing pole sign signs hydrant bench city town yard park playground court room kitchen bathroom "
    "bedroom table desk chair chairs couch sofa bed counter shelf floor window windows door mirror sink toilet "
    "bathtub shower tub oven stove refrigerator microwave clock lamp television tv laptop computer keyboard phone "
    "cellphone camera guitar microphone book books umbrella umbrellas bag bags backpack suitcase luggage hat helmet "
    "cap shirt jacket coat shorts pants jeans dress suit tie costume bikini scarf gloves shoes boots glasses "
    "sunglasses goggles leash collar face head hair eyes mouth nose ears tongue hand hands arm arms legs feet body "
    "plate bowl cup glass bottle vase tray food pizza sandwich cake bread fruit apple apples banana bananas oranges "
    "vegetables broccoli carrots salad meat cheese donuts wine beer rope swing slide trampoline tent flag wagon cart "
    "carriage".split()
)
# Shares of the regions that are hidden, beside none and all of them.
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
MAPS = ("attention", "evidence", "another picture's attention", "random")
COMPARED = ("attention", "evidence", "input gradient", "another picture's attention")
BATCH = 16  # changed pictures that go through the network together


@dataclass(frozen=True)
class Truth:
    """The result of the check: of each figure its mean over the pictures and the standard error of that mean.

    An area is that under a curve over the share of regions, 0 to 1, in nats: a mean over all shares.

    images: number of pictures with a noun in their caption.
    words: number of nouns.
    deletion: of each of `MAPS`, the fall of the log-probability when its largest regions are hidden first.
    smallest: the same when its smallest regions are hidden first.
    excess: `deletion` less that of the random map, word by word.
    insertion: the rise of the log-probability over that of a picture of the mean colour, when the map's largest
        regions are shown first.
    correlations: of each two maps of a word, Spearman's over the regions.
    """

    images: int
    words: int
    deletion: dict[str, tuple[float, float]]
    smallest: dict[str, tuple[float, float]]
    excess: dict[str, tuple[float, float]]
    insertion: dict[str, tuple[float, float]]
    correlations: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        """Two Markdown tables."""
        lines = [
            f"| {self.words} nouns, {self.images} pictures | deletion, largest first | less random's | smallest first "
            "| insertion, largest first |",
            "|---" + "|--:" * 4 + "|",
        ]
        for name in self.deletion:
            cells = (figures[name] for figures in (self.deletion, self.excess, self.smallest, self.insertion))
            lines.append(f"| {name} | " + " | ".join(map(with_error, cells)) + " |")
        lines += ["", "| rank correlation over the regions | |", "|---|--:|"]
        lines += [f"| {pair} | {with_error(value)} |" for pair, value in self.correlations.items()]
        return "\n".join(lines)


def with_error(figure: tuple[float, float]) -> str:
    """A mean and its standard error as text."""
    return f"{figure[0]:.2f} ± {figure[1]:.2f}"


def check_truth(
    captioner: Captioner, network: ShowAttendTell, items: Sequence[CaptionedImage], images: int = 50, seed: int = 0
) -> Truth:
    """Caption photographs, and measure how well the maps of the nouns in the captions say what these rest on.

    Args:
        captioner: the model, computed by any engine.
        network: the same in torch, for the gradient.
        items: photographs; those that cannot be read are left out.
        images: number of them to choose.
        seed: decides which, and the random maps.

    Raises:
        ValueError: fewer than two captions have a noun.
    """
    chosen = random.Random(seed).sample(list(items), min(images, len(items)))
    captions = []
    for result in captioner.stream((item.source() for item in chosen), alternatives=0, evidence=True):
        if isinstance(result, Caption):
            captions.append(result)
        else:
            log.warning("skipped: %s", result)
    captions = [caption for caption in captions if nouns_of(caption)]
    if len(captions) < 2:
        raise ValueError(f"of {len(chosen)} captions {len(captions)} have a noun, and two are needed")
    numbers = np.random.default_rng(seed)
    measured = []
    for caption in tqdm(captions, "truth", disable=not sys.stderr.isatty()):
        others = [other for other in captions if other is not caption]
        strangers = [others[i].attention for i in numbers.integers(len(others), size=len(nouns_of(caption)))]
        other_maps = [maps[numbers.integers(len(maps))].ravel() for maps in strangers]
        measured.append(measure(captioner, network, caption, other_maps, numbers))
    return Truth(
        len(captions),
        sum(len(nouns_of(caption)) for caption in captions),
        **{kind: over_pictures([figures[kind] for figures in measured]) for kind in measured[0]},
    )


def nouns_of(caption: Caption) -> list[int]:
    """The positions of the nouns in a caption."""
    return [position for position, word in enumerate(caption.words) if word in NOUNS]


def over_pictures(figures: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """The mean of each figure over the pictures, and its standard error."""
    found = {}
    for name in figures[0]:
        values = np.array([of_picture[name] for of_picture in figures])
        found[name] = (float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))
    return found


def measure(
    captioner: Captioner,
    network: ShowAttendTell,
    caption: Caption,
    other_maps: Sequence[np.ndarray],
    numbers: np.random.Generator,
) -> dict[str, dict[str, float]]:
    """The figures of one picture, means over the nouns of its caption; the fields of `Truth` without errors.

    Args:
        captioner, network: see `check_truth`.
        caption: of the picture, with evidence.
        other_maps: a map of another picture for each noun, (regions,).
        numbers: for random maps, and to order regions of equal weight.
    """
    assert caption.evidence is not None
    pixels = captioner.preprocessing([load_image(str(caption.source))])[0]
    cells = cells_of(pixels.shape[1:], captioner.config.grid, caption.displacement)
    # The end has a probability only where the model said it.
    ids = captioner.vocabulary.encode(caption.words)[1 : len(caption.word_log_probabilities) + 1]
    places = nouns_of(caption)
    gradients = input_gradients(network, pixels, ids, places, cells)
    rows: list[dict[str, dict[str, float]]] = []
    for place, other, gradient in zip(places, other_maps, gradients, strict=True):
        maps = {
            "attention": caption.attention[place].ravel(),
            "evidence": caption.evidence[place].ravel(),
            "another picture's attention": other,
            "random": numbers.random(other.size),
            "input gradient": gradient,
        }
        largest_first = [np.lexsort((numbers.random(other.size), -maps[name])) for name in MAPS]
        orders = [order[::direction] for order in largest_first for direction in (1, -1)]
        falls = deletion_curves(captioner, pixels, cells, orders, ids, place)
        areas = dict(zip(MAPS, area(falls).reshape(-1, 2).tolist(), strict=True))
        whole = float(falls[0, -1])  # with every region hidden
        rows.append(
            {
                "deletion": {name: largest for name, (largest, _) in areas.items()},
                "smallest": {name: smallest for name, (_, smallest) in areas.items()},
                "excess": {name: largest - areas["random"][0] for name, (largest, _) in areas.items()},
                # To show the largest first is to hide the smallest first, read from the other end.
                "insertion": {name: whole - smallest for name, (_, smallest) in areas.items()},
                "correlations": {
                    f"{a}, {b}": rank_correlation(maps[a], maps[b]) for a, b in itertools.combinations(COMPARED, 2)
                },
            }
        )
    return {
        kind: {name: float(np.mean([row[kind][name] for row in rows])) for name in figures}
        for kind, figures in rows[0].items()
    }


def cells_of(size: tuple[int, ...], grid: tuple[int, int], displacement: tuple[float, float]) -> np.ndarray:
    """The region to whose cell each pixel belongs, where heatmaps show it: integers (height, width).

    Args:
        size: height and width in pixels.
        grid: rows and columns of regions.
        displacement: see `captioner.heatmap.upsample`.
    """
    row, column = (
        (((np.arange(side) + 0.5) / side + shift) * count).astype(int).clip(0, count - 1)
        for side, count, shift in zip(size, grid, displacement, strict=True)
    )
    return row[:, None] * grid[1] + column


def deletion_curves(
    captioner: Captioner,
    pixels: np.ndarray,
    cells: np.ndarray,
    orders: Sequence[np.ndarray],
    ids: Sequence[int],
    place: int,
) -> np.ndarray:
    """How far a word's log-probability falls as regions are hidden from the whole network.

    Args:
        captioner: the model.
        pixels: the picture as the model's input, (3, height, width).
        cells: the region of each pixel, as in `cells_of`.
        orders: the regions in the orders in which they are hidden.
        ids: of the caption's words, without `START`; it is read under teacher forcing.
        place: of the word.

    Returns:
        Float (orders, 2 + shares), in nats: none hidden, each of `SHARES`, all hidden.
    """
    regions = len(orders[0])
    hidden = np.zeros((len(orders) * len(SHARES) + 2, regions), dtype=bool)  # whole, then changed, then empty
    for mask, (order, share) in zip(hidden[1:], itertools.product(orders, SHARES), strict=False):
        mask[order[: round(share * regions)]] = True
    hidden[-1] = True
    mean = pixels.mean(axis=(1, 2), keepdims=True)
    found = []
    for some in np.array_split(hidden, math.ceil(len(hidden) / BATCH)):
        annotations = captioner.engine.annotate(np.where(some[:, cells][:, None], mean, pixels))
        words = captioner.engine.array(np.tile(np.array(ids), (len(some), 1, 1)))
        found.append(to_numpy(follow(captioner.engine, annotations, words).log_probabilities)[:, 0, place])
    falls = np.concatenate([log_probabilities.astype(float) for log_probabilities in found])
    falls = falls[0] - falls
    ends = np.tile(falls[[0, -1]], (len(orders), 1))
    return np.concatenate([ends[:, :1], falls[1:-1].reshape(len(orders), -1), ends[:, 1:]], axis=1)


def area(curves: np.ndarray) -> np.ndarray:
    """The area under curves (..., 2 + shares) over the share of hidden regions, by the trapezoidal rule."""
    widths = np.diff([0, *SHARES, 1])
    return ((curves[..., 1:] + curves[..., :-1]) / 2 * widths).sum(axis=-1)


def input_gradients(
    network: ShowAttendTell, pixels: np.ndarray, ids: Sequence[int], places: Sequence[int], cells: np.ndarray
) -> np.ndarray:
    """The gradient of words' log-probabilities with respect to the picture, by region.

    Args:
        network: in evaluation mode.
        pixels, ids, cells: as in `deletion_curves`.
        places: of the words.

    Returns:
        Float (words, regions): the mean over a region's pixels of the gradient's absolute values, summed over colours.
    """
    image = torch.from_numpy(pixels[None]).to(network.device).requires_grad_()
    output = network(image, torch.tensor([[[START, *ids]]], device=network.device))
    log_probabilities = output.log_probabilities((PAD, START, UNKNOWN))[0, 0]
    found = []
    for place in places:
        (gradient,) = torch.autograd.grad(log_probabilities[place], image, retain_graph=True)
        found.append(np.bincount(cells.ravel(), to_numpy(gradient[0].abs().sum(dim=0)).ravel()))
    return np.stack(found) / np.bincount(cells.ravel())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog=command("truth"),
        description="Hide the regions of words' maps from the whole network and measure how far the words fall.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_check_flags(parser)
    parser.add_argument("--images", type=positive, default=50, help="pictures to choose from each data set")
    parser.add_argument("--seed", type=int, default=0, help="decides which pictures, and the random maps")
    options = parser.parse_args(arguments)

    def prepare() -> Check:
        captioner = Captioner.from_pretrained(options.model, options.device)
        network = Captioner.from_pretrained(options.model, options.device, engine="torch").model

        def check(name: str, items: Sequence[CaptionedImage]) -> str:
            found = check_truth(captioner, network, items, options.images, options.seed)
            return f"{name}, {options.split}\n\n{found}"

        return check

    return run_check(options, prepare)


if __name__ == "__main__":
    sys.exit(main())
