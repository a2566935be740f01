"""Attention supervised by pictures whose layout is known: two photographs in one picture, and captions of each.

Half of a composed picture shows one photograph, the other half another. A word such as "dog" in a caption of the first
can only rest on its half, so attention should lie there: a label that costs nothing (Liu et al. 2017 supervise
attention with boxes drawn by people).

Before its first noun a caption does not say which photograph it describes. Supervising the captions of both would
teach attention to be even there. So the decoder chooses: the photograph with more of the weight at the first content
word of its captions is the one to describe, and only its captions are learnt from.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from captioner.network.decoder import TeacherForced
from captioner.vocabulary import PAD, SPECIAL
from training.losses import word_log_probabilities

# Words that name nothing in the picture, so that no place is right for them.
FUNCTION_WORDS = frozenset(
    """a an the this that these those there here it its it's he she they them his her hers their him who which what
    one another other others each some several many few all both any something someone somebody while as where when
    is are was were be been being am has have having had do does doing done can could may might will would 's not n't
    in on at of to from with without by for into onto out up down off over under through across along around near next
    beside between behind front against above below top inside outside about after before during toward towards past
    away back and or but so than then very just also too only together like looking seems appears get gets
    getting""".split()
)
ROWS = 2  # captions of each photograph that a composed picture is given


class Composed(NamedTuple):
    """Pictures made of two photographs each, with captions of both.

    images: (pictures, ...), of the same kind as the photographs they are made of.
    captions: (pictures, 2 * ROWS, length) ids; the first half of the rows describes the first photograph.
    own: (pictures, 2 * ROWS, regions), the share of each region that shows the photograph of that caption.
    """

    images: Tensor
    captions: Tensor
    own: Tensor


def compose(images: Tensor, captions: Tensor, count: int, grid: tuple[int, int], chance: torch.Generator) -> Composed:
    """Pair the first `count` photographs with the next `count`, side by side or one above the other.

    Args:
        images: (batch, channels, rows, columns), pixels or feature maps; or features (batch, regions, channels).
        captions: (batch, rows, length) ids, `PAD` after the end and in missing rows.
        count: pictures to make, at most half of the batch.
        grid: rows and columns of regions.
        chance: decides which captions are read, and whether the halves lie side by side.
    """
    beside = bool(torch.rand((), generator=chance) < 0.5)
    maps = images.unflatten(1, grid).permute(0, 3, 1, 2) if images.dim() == 3 else images
    pictures = join(maps[:count], maps[count : 2 * count], -1 if beside else -2)
    if images.dim() == 3:
        pictures = pictures.permute(0, 2, 3, 1).flatten(1, 2)
    rows = (captions[: 2 * count, :, 0] != PAD).sum(dim=1, keepdim=True)
    picked = (torch.randint(1 << 30, (2 * count, 1), generator=chance) + torch.arange(ROWS)) % rows
    texts = captions[torch.arange(2 * count)[:, None], picked]
    # A photograph with a single caption gets it once.
    texts = torch.where((torch.arange(ROWS) < rows)[..., None], texts, PAD)
    first = join(torch.ones(grid), torch.zeros(grid), -1 if beside else -2).flatten()
    own = torch.stack([first] * ROWS + [1 - first] * ROWS)
    return Composed(pictures, torch.cat([texts[:count], texts[count:]], dim=1), own.expand(count, -1, -1))


def add_composed(images: Tensor, captions: Tensor, composed: Composed) -> tuple[Tensor, Tensor]:
    """A batch with the composed pictures behind it; captions padded to the same numbers of rows and words."""
    rows, length = (max(sizes) for sizes in zip(captions.shape[1:], composed.captions.shape[1:], strict=True))
    padded = [
        nn.functional.pad(ids, (0, length - ids.shape[2], 0, rows - ids.shape[1]), value=PAD)
        for ids in (captions, composed.captions)
    ]
    return torch.cat([images, composed.images]), torch.cat(padded)


def split_composed(output: TeacherForced, count: int, rows: int) -> tuple[TeacherForced, TeacherForced]:
    """What the model gave for the first `count` images, of `rows` captions each, and for the pictures behind them."""
    words = int(output.mask[:count].sum())
    parts = ((slice(words), slice(count), rows), (slice(words, None), slice(count, None), 2 * ROWS))
    batch, behind = (
        TeacherForced(
            output.logits[of_words],
            output.targets[of_words],
            output.alpha[images, :kept],
            output.mask[images, :kept],
            None if output.choice_log_probability is None else output.choice_log_probability[images, :kept],
        )
        for of_words, images, kept in parts
    )
    return batch, behind


def join(first: Tensor, second: Tensor, axis: int) -> Tensor:
    """The middle halves of two batches of maps, one after the other along an axis: as large as each was."""
    size = first.shape[axis]
    lengths = (size - size // 2, size // 2)
    parts = [
        maps.narrow(axis, (size - length) // 2, length) for maps, length in zip((first, second), lengths, strict=True)
    ]
    return torch.cat(parts, dim=axis)


def content_words(words: Sequence[str]) -> Tensor:
    """Which words of a vocabulary name something that has a place: (vocabulary,) booleans."""
    return torch.tensor([n >= len(SPECIAL) and word not in FUNCTION_WORDS for n, word in enumerate(words)])


def composed_loss(output: TeacherForced, own: Tensor, content: Tensor, pointing: float) -> Tensor:
    """The loss on composed pictures.

        L = - mean_t log p(y_t)  -  pointing * mean_t log sum_i own_i alpha_ti

    over the captions of the photograph that the decoder chose; the second mean is over their content words.

    Args:
        output: what the model gave for the composed pictures.
        own: see `Composed`.
        content: (vocabulary,), from `content_words`.
        pointing: weight of the second term.
    """
    named = torch.zeros_like(output.mask).masked_scatter(output.mask, content[output.targets])
    share = torch.einsum("prtk,prk->prt", output.alpha.mean(dim=3), own.to(output.alpha))
    chosen = chosen_rows(share.detach(), named)[..., None]
    likelihood = (word_log_probabilities(output) * chosen).sum() / (output.mask & chosen).sum().clamp(min=1)
    named = named & chosen
    there = (share.clamp(min=1e-6).log() * named).sum() / named.sum().clamp(min=1)
    return -likelihood - pointing * there


def chosen_rows(share: Tensor, named: Tensor) -> Tensor:
    """The captions of the photograph with more of the weight at their first content word, (pictures, rows) booleans.

    Args:
        share: (pictures, rows, steps), how much of the weight lies on the caption's own photograph.
        named: (pictures, rows, steps), True at content words.
    """
    first = named & (named.cumsum(dim=2) == 1)
    at_first = (share * first).sum(dim=2).unflatten(1, (2, -1))  # (pictures, photographs, captions)
    present = first.any(dim=2).unflatten(1, (2, -1))
    mean = (at_first * present).sum(dim=2) / present.sum(dim=2).clamp(min=1)
    winner = mean.argmax(dim=1, keepdim=True)
    return (torch.arange(2, device=share.device) == winner).repeat_interleave(at_first.shape[2], dim=1)
