"""What training makes small."""

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

    The second term asks every region to be looked at as much as any other over a caption.

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
    looked_at = output.alpha.sum(dim=2).mean(dim=2)  # over the words, then over the heads: (images, rows, regions)
    said = output.mask.any(dim=2) * weights[:, None]  # rows that are only padding have no caption
    uneven = ((1 - looked_at).square().sum(dim=-1) * said).sum()
    return cross_entropy / max(words, 1) + doubly_stochastic * uneven / max(captions, 1)


def word_log_probabilities(output: TeacherForced, excluded: tuple[int, ...] = ()) -> Tensor:
    """Logarithm of each true word's probability, (images, rows, steps); zero where there is no word.

    Args:
        output: what the model gave.
        excluded: ids that cannot come, whose probability goes to the others.
    """
    logits = output.logits
    if excluded:
        logits = logits.index_fill(1, torch.tensor(excluded, device=logits.device), float("-inf"))
    log_probabilities = -nn.functional.cross_entropy(logits, output.targets, reduction="none")
    return log_probabilities.new_zeros(output.mask.shape).masked_scatter(output.mask, log_probabilities)


def hard_attention_loss(
    output: TeacherForced, told: Tensor, words: float, baseline: float | None, reinforce: float, entropy: float
) -> Tensor:
    """What `hard` attention learns from (Xu et al. 2015, equation 11 and what follows it).

        L = - lambda_r * sum_t (sum_{t' >= t} log p(y_t' | s) - b) * log alpha_t(s_t) / words
            - lambda_e * sum_t H[alpha_t] / words

    with s_t the regions that were drawn and b the moving average of what so many words were worth so far. A region
    is answerable for the words from its own on: it cannot have changed those before, which would only add noise.
    The draws have no gradient of their own: this one stands for it. The gradient through the words is that of
    `caption_loss`, to which this is added.

    Args:
        output: what the model gave, with `choice_log_probability`.
        told: (images, rows, steps), log p of each word, from `word_log_probabilities`; taken as it is.
        words: words in the whole batch, over all processes.
        baseline: moving average of a word's log-probability; None at the first step, which only fills it.
        reinforce: lambda_r. At 1 the gradient is in expectation that of log p(y | s); so noisy a gradient
            drowns that of the words unless it is made smaller.
        entropy: lambda_e.
    """
    assert output.choice_log_probability is not None, "only hard attention draws regions"
    surprise = (told.detach() - (baseline or 0.0)) * output.mask
    to_come = surprise.flip(2).cumsum(dim=2).flip(2) if baseline is not None else torch.zeros_like(surprise)
    chosen = (to_come * output.choice_log_probability).sum()
    spread = -torch.special.xlogy(output.alpha, output.alpha.clamp(min=1e-30)).sum()
    return -(reinforce * chosen + entropy * spread) / max(words, 1)


def self_critical_loss(output: TeacherForced, advantage: Tensor, captions: int) -> Tensor:
    """Policy gradient of the reward of captions that were drawn (Rennie et al. 2017, equation 8).

        L = - sum_captions advantage * sum_t log p(y_t) / captions

    Args:
        output: the drawn captions read by the model; its probabilities are those of search, which never says a
            special word. Regions drawn by `hard` attention are part of what earned the reward.
        advantage: (images, rows), each caption's reward less its baseline.
        captions: captions in the whole batch, over all processes.
    """
    log_probabilities = word_log_probabilities(output, excluded=(PAD, START, UNKNOWN)).sum(dim=2)
    if output.choice_log_probability is not None:
        log_probabilities = log_probabilities + output.choice_log_probability.sum(dim=2)
    return -(advantage * log_probabilities).sum() / max(captions, 1)
