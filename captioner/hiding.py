"""Hiding regions from attention: those that a caller names, or one neighbourhood after the other to measure evidence.

Regions are hidden through the decoder's mask. Their attention weights are zero, and where a caller names them, the
LSTM's first state comes from the mean of the annotation vectors that are left. The encoder does not run again, so the
vectors of other regions still describe what their receptive fields share with the hidden ones.
"""

from typing import Any

import numpy as np

from captioner.arrays import Array, moved, of_images, to_numpy, without_gradients
from captioner.heatmap import cell_edges
from captioner.options import Regions, check_option
from captioner.search import log_probability, start

EVIDENCE_WINDOW = 3
MAX_NUMBERS = 2**22  # of annotation vectors in one batch of variants: 16 MiB


def measure_evidence(
    decoder: Any,
    annotations: Array,
    words: Array,
    grid: tuple[int, int],
    window: int = EVIDENCE_WINDOW,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """How far the log-probability of each word falls when the neighbourhood of a region is hidden while it is chosen.

    Each caption is read under teacher forcing as it is. The step before each word is then computed again for each
    region, from the same state of the decoder, with the window around that region hidden from attention: what the
    words before rested on stays as it was. These variants are images of one batch, or of a few where memory would not
    hold one. A window that leaves attention nothing is replaced by annotation vectors of zero: no picture.

    Args:
        decoder: an engine, or the decoder of a network in evaluation mode.
        annotations: (images, regions, channels).
        words: (images, steps) ids, without `START`; `PAD` after a caption's end.
        grid: rows and columns of regions.
        window: rows and columns that are hidden together, an odd number; 1 is the region alone. At the edges of the
            grid a window has fewer regions.
        mask: (images, regions), True where attention may look anyway; None for everywhere. Other regions have no
            evidence.

    Returns:
        float32 (images, steps, rows, columns), in nats. The value of a region is the fall for the window centred on it.
        Where a word becomes likelier instead, and on padding, it is 0.
    """
    images, regions, channels = annotations.shape
    usable = np.ones((images, regions), dtype=bool) if mask is None else mask
    variants = (usable[:, None] & ~windows(grid, window)).reshape(-1, regions)
    something = variants.any(axis=1)
    captions = words[:, None]  # one row of each image
    before: list[tuple[Any, Array]] = []

    def read(memory: Any, owners: np.ndarray) -> np.ndarray:
        """The log-probabilities of the words of the images named, (steps, owners), as `memory` has their regions."""
        steps = (decoder.step(memory, *of_images(each, owners)) for each in before)
        found = [log_probability(step, captions[owners], t) for t, step in enumerate(steps)]
        return np.array([to_numpy(values)[:, 0] for values in found])

    with without_gradients(annotations):
        memory, state, tokens, _ = start(decoder, annotations, moved(usable, like=annotations), 1)
        whole = np.empty((words.shape[1], images), dtype=np.float32)
        for t in range(words.shape[1]):
            before.append((state, tokens))
            step = decoder.step(memory, state, tokens)
            whole[t] = to_numpy(log_probability(step, captions, t))[:, 0]
            state, tokens = step.state, captions[..., t]
        without = np.empty((words.shape[1], len(variants)), dtype=np.float32)
        if not something.all():
            everything = moved(np.ones_like(usable), like=annotations)
            blank = read(decoder.encode(0 * annotations, everything), np.arange(images))
            without[:] = blank.repeat(regions, axis=1)
        batch, left = max(1, MAX_NUMBERS // (regions * channels)), np.flatnonzero(something)
        for first in range(0, len(left), batch):
            some = left[first : first + batch]
            owners = some // regions
            shown = with_mask(of_images(memory, owners), moved(variants[some], like=annotations))
            without[:, some] = read(shown, owners)
    falls = whole[..., None] - without.reshape(-1, images, regions)
    return np.ascontiguousarray((falls.clip(0) * usable).swapaxes(0, 1)).reshape(images, -1, *grid)


def with_mask(memory: Any, mask: Array) -> Any:
    """What a decoder's `encode` gave, with another mask: the annotation vectors and their keys do not depend on it."""
    if isinstance(memory, dict):
        return {**memory, "mask": mask}
    if hasattr(memory, "_replace"):
        return memory._replace(mask=mask)
    return tuple(with_mask(each, mask) for each in memory)  # a transformer has one for each layer


def windows(grid: tuple[int, int], size: int) -> np.ndarray:
    """The square window of `size` regions a side around each region, Boolean (regions, regions)."""
    places = np.indices(grid).reshape(2, -1)
    return np.abs(places[:, :, None] - places[:, None]).max(axis=0) <= size // 2


def check_window(value: object) -> int:
    """Check the option `evidence_window`. Raises ValueError where it cannot be used."""
    window = int(check_option("evidence_window", value))
    if window % 2 == 0:
        raise ValueError(f"evidence_window must be odd, not {window}")
    return window


def check_regions(name: str, value: Regions | None, grid: tuple[int, int]) -> np.ndarray | None:
    """What a caller gives for `hide` or `attend`: a Boolean array (rows, columns), or boxes (n, 4), or None.

    Raises:
        ValueError: it is something else; the message says what is expected.
    """
    if value is None:
        return None
    try:
        array = np.asarray(value)
        if array.dtype == bool and array.shape == grid:
            return array
        boxes = array.astype(float).reshape(-1, 4) if array.ndim < 3 and array.shape[-1] in (0, 4) else None
    except (TypeError, ValueError, IndexError):  # of other types, or ragged
        boxes = None
    if boxes is None or array.dtype == bool or not (np.isfinite(boxes).all() and (boxes[:, 2:] > 0).all()):
        raise ValueError(
            f"{name} must be a Boolean grid of {grid[0]} x {grid[1]} regions, or boxes in pixels "
            f"(left, top, width, height), not {value!r:.100}"
        )
    return boxes


def usable_regions(
    size: tuple[int, int],
    grid: tuple[int, int],
    displacement: tuple[float, float],
    hide: np.ndarray | None,
    attend: np.ndarray | None,
) -> np.ndarray | None:
    """The regions of one photograph that attention may use, Boolean (rows, columns); None for all.

    Args:
        size: width and height of the photograph, upright, in pixels.
        grid: rows and columns of regions.
        displacement: see `captioner.heatmap.upsample`.
        hide: regions not to use, as `check_regions` gives them.
        attend: the only regions to use, likewise.

    Raises:
        ValueError: a box lies outside the photograph, or no region is left.
    """
    if hide is None and attend is None:
        return None
    usable = np.ones(grid, dtype=bool)
    for regions, keep in ((attend, True), (hide, False)):
        if regions is not None:
            named = regions
            if regions.dtype != bool:
                covered = [covered_by(box, size, grid, displacement) for box in regions]
                named = np.any([np.zeros(grid, dtype=bool), *covered], axis=0)
            usable &= named if keep else ~named
    if not usable.any():
        raise ValueError(f"hide and attend leave attention none of the {grid[0]} x {grid[1]} regions")
    return usable


def covered_by(
    box: np.ndarray, size: tuple[int, int], grid: tuple[int, int], displacement: tuple[float, float]
) -> np.ndarray:
    """The regions whose cells a box covers by at least half, Boolean (rows, columns).

    Cells lie where heatmaps show them; see `captioner.heatmap.cell_edges`.
    A box that covers no cell by half stands for the cell of which it covers most.

    Args:
        box: (left, top, width, height) in pixels.
        size, grid, displacement: see `usable_regions`.

    Raises:
        ValueError: the box lies outside the photograph.
    """
    left, top, width, height = box
    shares = []
    for begin, length, side, count, shift in (
        (top, height, size[1], grid[0], displacement[0]),
        (left, width, size[0], grid[1], displacement[1]),
    ):
        edges = cell_edges(count, side, shift)
        overlap = np.minimum(edges[1:], begin + length) - np.maximum(edges[:-1], begin)
        shares.append(overlap.clip(0) / np.maximum(np.diff(edges), 1e-6))
    share = np.outer(*shares)
    if not share.any():
        sides = ", ".join(f"{number:g}" for number in box)
        raise ValueError(f"the box ({sides}) lies outside the photograph of {size[0]} x {size[1]} pixels")
    return share >= min(0.5 - 1e-6, share.max())
