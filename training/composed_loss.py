"""The loss on composed pictures, which teaches attention to lie on the photograph that a caption describes.

Before its first noun a caption does not say which of the two photographs it describes, and supervising the captions of
both would teach attention to be even there. So the decoder chooses: only the captions of the photograph with more
weight at their first content word are learnt.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from captioner.network.decoder import TeacherForced
from captioner.vocabulary import SPECIAL

from .data.composed import ROWS

# Words that name nothing in the picture, so that no region is right for them.
FUNCTION_WORDS = frozenset(
    """a an the this that these those there here it its it's he she they them his her hers their him who which what
    one another other others each some several many few all both any something someone somebody while as where when
    is are was were be been being am has have having had do does doing done can could may might will would 's not n't
    in on at of to from with without by for into onto out up down off over under through across along around near next
    beside between behind front against above below top inside outside about after before during toward towards past
    away back and or but so than then very just also too only together like looking seems appears get gets
    getting""".split()
)


def content_words(words: Sequence[str]) -> Tensor:
    """Which words of a vocabulary name something that has a place in a picture: (vocabulary,) booleans."""
    return torch.tensor([n >= len(SPECIAL) and word not in FUNCTION_WORDS for n, word in enumerate(words)])


def split_composed(output: TeacherForced, count: int, rows: int) -> tuple[TeacherForced, TeacherForced]:
    """The output for the first `count` images, with `rows` captions each, and for the composed pictures after them."""
    words = int(output.mask[:count].sum())
    parts = ((slice(words), slice(count), rows), (slice(words, None), slice(count, None), 2 * ROWS))
    batch, pictures = (
        TeacherForced(
            output.logits[of_words],
            output.targets[of_words],
            output.alpha[images, :kept],
            output.mask[images, :kept],
            None if output.choice_log_probability is None else output.choice_log_probability[images, :kept],
        )
        for of_words, images, kept in parts
    )
    return batch, pictures


def composed_loss(output: TeacherForced, own: Tensor, content: Tensor, pointing: float) -> Tensor:
    """Cross-entropy of the captions of one photograph, plus a term for attention that lies on that photograph.

        L = - mean_t log p(y_t)  -  pointing * mean_t log sum_i own_i alpha_ti

    The means are over the words, and over the content words, of the captions of the photograph that was chosen.

    Args:
        output: the model's output for the composed pictures.
        own: see `Composed`.
        content: (vocabulary,), from `content_words`.
        pointing: weight of the second term.
    """
    named = torch.zeros_like(output.mask).masked_scatter(output.mask, content[output.targets])
    share = torch.einsum("prtk,prk->prt", output.alpha.mean(dim=3), own.to(output.alpha))
    chosen = chosen_rows(share.detach(), named)[..., None]
    likelihood = (output.log_probabilities() * chosen).sum() / (output.mask & chosen).sum().clamp(min=1)
    named = named & chosen
    on_own = (share.clamp(min=1e-6).log() * named).sum() / named.sum().clamp(min=1)
    return -likelihood - pointing * on_own


def chosen_rows(share: Tensor, named: Tensor) -> Tensor:
    """The captions of the photograph with more weight at their first content word, (pictures, rows) booleans.

    Args:
        share: (pictures, rows, steps), share of the weight that lies on the caption's own photograph.
        named: (pictures, rows, steps), True at content words.
    """
    first = named & (named.cumsum(dim=2) == 1)
    at_first = (share * first).sum(dim=2).unflatten(1, (2, -1))  # (pictures, photographs, captions)
    present = first.any(dim=2).unflatten(1, (2, -1))
    mean = (at_first * present).sum(dim=2) / present.sum(dim=2).clamp(min=1)
    winner = mean.argmax(dim=1, keepdim=True)
    return (torch.arange(2, device=share.device) == winner).repeat_interleave(at_first.shape[2], dim=1)
