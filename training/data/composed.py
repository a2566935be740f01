"""Composed pictures: two photographs in one picture, whose layout is known, with captions of each.

Half of a composed picture shows one photograph, the other half another. A word such as "dog" in a caption of the first
can only come from its half, so attention should lie there: supervision without annotations (Liu et al. 2017 supervise
attention with boxes drawn by people). `composed_loss` is the loss on them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from captioner.vocabulary import PAD

ROWS = 2  # captions of each of the two photographs


class Composed(NamedTuple):
    """Pictures made of two photographs each, with captions of both.

    images: (pictures, ...), of the same kind as the photographs they are made of.
    captions: (pictures, 2 * ROWS, length) ids; the first half of the rows describes the first photograph.
    own: (pictures, 2 * ROWS, regions), the share of each region that shows the caption's own photograph.
    """

    images: Tensor
    captions: Tensor
    own: Tensor


def compose(
    images: Tensor, captions: Tensor, count: int, grid: tuple[int, int], generator: torch.Generator
) -> Composed:
    """Pair the first `count` photographs with the next `count`, side by side or one above the other.

    Args:
        images: (batch, channels, rows, columns), pixels or feature maps; or features (batch, regions, channels).
        captions: (batch, rows, length) ids, `PAD` after the end and in missing rows.
        count: pictures to make, at most half of the batch.
        grid: rows and columns of regions.
        generator: decides which captions are taken, and whether the halves lie side by side.
    """
    beside = bool(torch.rand((), generator=generator) < 0.5)
    maps = images.unflatten(1, grid).permute(0, 3, 1, 2) if images.dim() == 3 else images
    pictures = join(maps[:count], maps[count : 2 * count], -1 if beside else -2)
    if images.dim() == 3:
        pictures = pictures.permute(0, 2, 3, 1).flatten(1, 2)
    rows = (captions[: 2 * count, :, 0] != PAD).sum(dim=1, keepdim=True)
    picked = (torch.randint(1 << 30, (2 * count, 1), generator=generator) + torch.arange(ROWS)) % rows
    texts = captions[torch.arange(2 * count)[:, None], picked]
    # A photograph with a single caption gets it once.
    texts = torch.where((torch.arange(ROWS) < rows)[..., None], texts, PAD)
    first = join(torch.ones(grid), torch.zeros(grid), -1 if beside else -2).flatten()
    own = torch.stack([first] * ROWS + [1 - first] * ROWS)
    return Composed(pictures, torch.cat([texts[:count], texts[count:]], dim=1), own.expand(count, -1, -1))


def add_composed(images: Tensor, captions: Tensor, composed: Composed) -> tuple[Tensor, Tensor]:
    """The batch followed by the composed pictures; captions are padded to the same numbers of rows and words."""
    rows, length = (max(sizes) for sizes in zip(captions.shape[1:], composed.captions.shape[1:], strict=True))
    padded = [
        nn.functional.pad(ids, (0, length - ids.shape[2], 0, rows - ids.shape[1]), value=PAD)
        for ids in (captions, composed.captions)
    ]
    return torch.cat([images, composed.images]), torch.cat(padded)


def join(first: Tensor, second: Tensor, axis: int) -> Tensor:
    """The middle halves of two batches of maps, concatenated along an axis to the size of one map."""
    size = first.shape[axis]
    lengths = (size - size // 2, size // 2)
    parts = [
        maps.narrow(axis, (size - length) // 2, length) for maps, length in zip((first, second), lengths, strict=True)
    ]
    return torch.cat(parts, dim=axis)
