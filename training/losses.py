"""What training makes small."""

from torch import Tensor, nn

from captioner.decoder import TeacherForced


def caption_loss(
    output: TeacherForced, words: int, captions: int, label_smoothing: float, doubly_stochastic: float
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
    """
    cross_entropy = nn.functional.cross_entropy(
        output.logits, output.targets, label_smoothing=label_smoothing, reduction="sum"
    )
    looked_at = output.alpha.sum(dim=2).mean(dim=2)  # over the words, then over the heads: (images, rows, regions)
    said = output.alpha.detach().sum(dim=(2, 3, 4)) > 0  # rows that are only padding have no caption
    uneven = ((1 - looked_at).square().sum(dim=-1) * said).sum()
    return cross_entropy / max(words, 1) + doubly_stochastic * uneven / max(captions, 1)
