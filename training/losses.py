"""Training losses."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from captioner.network.decoder import TeacherForced
from captioner.vocabulary import PAD, SPECIAL, START, UNKNOWN

from .data.composed import ROWS

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


def caption_loss(
    output: TeacherForced,
    words: float,
    captions: float,
    label_smoothing: float,
    doubly_stochastic: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the words plus the doubly stochastic term (Xu et al. 2015, equation 14).

        L = - sum_t log p(y_t) / words  +  lambda * sum_i (1 - sum_t alpha_ti)^2 / captions

    The second term asks for the same total weight on every region over a caption.

    Args:
        output: what the model gave for this process's share of the batch.
        words: words in the whole batch, over all processes, so that the shares of several processes add up.
        captions: captions in the whole batch, likewise.
        label_smoothing: probability taken from the true word and spread evenly over the vocabulary.
        doubly_stochastic: lambda.
        weights: (images,), how often each image's captions count; None for once.
    """
    weights = output.alpha.new_ones(output.mask.shape[0]) if weights is None else weights
    cross_entropy = nn.functional.cross_entropy(
        output.logits, output.targets, label_smoothing=label_smoothing, reduction="none"
    )
    cross_entropy = (cross_entropy * weights[:, None, None].expand(output.mask.shape)[output.mask]).sum()
    total_weight = output.alpha.sum(dim=2).mean(dim=2)  # over the words, then over the heads: (images, rows, regions)
    rows = output.mask.any(dim=2) * weights[:, None]  # rows that are only padding have no caption
    uneven = ((1 - total_weight).square().sum(dim=-1) * rows).sum()
    return cross_entropy / max(words, 1) + doubly_stochastic * uneven / max(captions, 1)


def self_critical_loss(output: TeacherForced, advantage: Tensor, captions: int) -> Tensor:
    """Policy gradient of the reward of captions that were drawn (Rennie et al. 2017, equation 8).

        L = - sum_captions advantage * sum_t log p(y_t) / captions

    Args:
        output: the drawn captions read by the model; its probabilities are those of search, which excludes special
            words. Where attention drew regions, these are part of what earned the reward.
        advantage: (images, rows), each caption's reward less its baseline.
        captions: captions in the whole batch, over all processes.
    """
    log_probabilities = output.log_probabilities(excluded=(PAD, START, UNKNOWN)).sum(dim=2)
    if output.choice_log_probability is not None:
        log_probabilities = log_probabilities + output.choice_log_probability.sum(dim=2)
    return -(advantage * log_probabilities).sum() / max(captions, 1)


def content_words(words: Sequence[str]) -> Tensor:
    """Which words of a vocabulary name something that has a place: (vocabulary,) booleans."""
    return torch.tensor([n >= len(SPECIAL) and word not in FUNCTION_WORDS for n, word in enumerate(words)])


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


def composed_loss(output: TeacherForced, own: Tensor, content: Tensor, pointing: float) -> Tensor:
    """The loss on composed pictures.

    Before its first noun a caption does not say which photograph it describes. Supervising the captions of both would
    teach attention to be even there. So the decoder chooses: the photograph with more of the weight at the first
    content word of its captions is the one to describe, and only its captions are learnt from.

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
    likelihood = (output.log_probabilities() * chosen).sum() / (output.mask & chosen).sum().clamp(min=1)
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
