"""Training losses."""

import torch
from torch import Tensor, nn

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


def word_log_probabilities(output: TeacherForced, excluded: tuple[int, ...] = ()) -> Tensor:
    """Logarithm of each true word's probability, (images, rows, steps); zero where there is no word.

    Args:
        output: the model's output.
        excluded: ids that are impossible; their probability goes to the other words.
    """
    logits = output.logits
    if excluded:
        logits = logits.index_fill(1, torch.tensor(excluded, device=logits.device), float("-inf"))
    log_probabilities = -nn.functional.cross_entropy(logits, output.targets, reduction="none")
    return log_probabilities.new_zeros(output.mask.shape).masked_scatter(output.mask, log_probabilities)


def hard_attention_loss(
    output: TeacherForced,
    log_probabilities: Tensor,
    words: float,
    baseline: float | None,
    reinforce: float,
    entropy: float,
) -> Tensor:
    """The terms that train `hard` attention: REINFORCE and entropy (Xu et al. 2015, equation 11 and after it).

        L = - lambda_r * sum_t (sum_{t' >= t} log p(y_t' | s) - b) * log alpha_t(s_t) / words
            - lambda_e * sum_t H[alpha_t] / words

    with s_t the sampled regions, y_t the words and b the moving average of a word's log-probability. A region affects
    only the words from step t on; earlier rewards would only add variance. Sampling has no gradient, this term is an
    estimate of it; the gradient through the words comes from `caption_loss`, to which this loss is added.

    Args:
        output: the model's output, with `choice_log_probability`.
        log_probabilities: (images, rows, steps) of the words, from `word_log_probabilities`; no gradient flows
            through them.
        words: words in the whole batch, over all processes.
        baseline: b; None at the first step, at which it is not known yet and the first term is left out.
        reinforce: lambda_r. With 1 the expected gradient is that of log p(y | s), but its variance is so high that
            smaller values train better.
        entropy: lambda_e.
    """
    assert output.choice_log_probability is not None, "only hard attention draws regions"
    rewards = (log_probabilities.detach() - (baseline or 0.0)) * output.mask
    returns = rewards.flip(2).cumsum(dim=2).flip(2) if baseline is not None else torch.zeros_like(rewards)
    chosen = (returns * output.choice_log_probability).sum()
    spread = -torch.special.xlogy(output.alpha, output.alpha.clamp(min=1e-30)).sum()
    return -(reinforce * chosen + entropy * spread) / max(words, 1)


def self_critical_loss(output: TeacherForced, advantage: Tensor, captions: int) -> Tensor:
    """Policy gradient of the reward of generated captions (Rennie et al. 2017, equation 8).

        L = - sum_captions advantage * sum_t log p(y_t) / captions

    Args:
        output: the model's output for the generated captions. Special words are excluded from its probabilities,
            as in search. The probability of regions that `hard` attention sampled is part of the caption's.
        advantage: (images, rows), each caption's reward minus its baseline.
        captions: captions in the whole batch, over all processes.
    """
    log_probabilities = word_log_probabilities(output, excluded=(PAD, START, UNKNOWN)).sum(dim=2)
    if output.choice_log_probability is not None:
        log_probabilities = log_probabilities + output.choice_log_probability.sum(dim=2)
    return -(advantage * log_probabilities).sum() / max(captions, 1)
