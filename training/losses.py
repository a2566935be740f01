"""Training losses."""

import math

from torch import Tensor, nn

from captioner.network.attention import map_entropy
from captioner.network.decoder import TeacherForced
from captioner.vocabulary import PAD, START, UNKNOWN


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

    The second term encourages attention to give every region the same weight in total over a caption.

    Args:
        output: the model's output for this process's share of the batch.
        words: words in the whole batch, over all processes, so that the shares of the processes add up.
        captions: captions in the whole batch, over all processes.
        label_smoothing: probability taken from the true word and spread evenly over the vocabulary.
        doubly_stochastic: lambda.
        weights: (images,), weight of each image's captions; None for 1.
    """
    weights = output.alpha.new_ones(output.mask.shape[0]) if weights is None else weights
    cross_entropy = nn.functional.cross_entropy(
        output.logits, output.targets, label_smoothing=label_smoothing, reduction="none"
    )
    cross_entropy = (cross_entropy * weights[:, None, None].expand(output.mask.shape)[output.mask]).sum()
    total = output.alpha.sum(dim=2).mean(dim=2)  # over the words, then over the heads: (images, rows, regions)
    present = output.mask.any(dim=2) * weights[:, None]  # rows that are only padding have no caption
    uneven = ((1 - total).square().sum(dim=-1) * present).sum()
    return cross_entropy / max(words, 1) + doubly_stochastic * uneven / max(captions, 1)


def entropy_loss(output: TeacherForced, bound: float, captions: float, weights: Tensor) -> Tensor:
    """How far the entropy of attention, averaged over a caption, is above a bound. It makes maps narrower.

        L = sum_captions max(0, mean_t H(alpha_t) / log(regions) - bound) / captions

    Args:
        output: the model's output for this process's share of the batch.
        bound: as a share of the entropy of an even map.
        captions: captions in the whole batch, over all processes.
        weights: (images,), weight of each image's captions.
    """
    words = output.mask.sum(dim=2).clamp(min=1)
    mean = map_entropy(output.alpha).mean(dim=3).sum(dim=2) / words  # over the heads and the words: (images, rows)
    above = (mean / math.log(max(output.alpha.shape[-1], 2)) - bound).clamp(min=0)
    return (above * weights[:, None]).sum() / max(captions, 1)


def self_critical_loss(output: TeacherForced, advantage: Tensor, captions: int) -> Tensor:
    """Policy gradient of the reward of generated captions (Rennie et al. 2017, equation 8).

        L = - sum_captions advantage * sum_t log p(y_t) / captions

    Args:
        output: the model's output for the generated captions. Special words are excluded from its probabilities,
            as in search. The probability of regions that attention drew is part of the caption's.
        advantage: (images, rows), each caption's reward minus its baseline.
        captions: captions in the whole batch, over all processes.
    """
    log_probabilities = output.log_probabilities(excluded=(PAD, START, UNKNOWN)).sum(dim=2)
    if output.choice_log_probability is not None:
        log_probabilities = log_probabilities + output.choice_log_probability.sum(dim=2)
    return -(advantage * log_probabilities).sum() / max(captions, 1)
