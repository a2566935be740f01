"""Attention mechanisms: where the decoder looks before it says the next word.

Every mechanism is a module with the same two methods. `keys` is called once an image, `forward` once a word:

    keys = attention.keys(annotations)
    context, alpha = attention(hidden, keys, annotations, mask)

Shapes: annotations (images, regions, channels); hidden (images, rows, hidden), where the rows of an image are its
captions in training and its beams in search, so that they share annotations and keys without a copy;
alpha (images, rows, heads, regions), non-negative and summing to 1 over the regions; context (images, rows, channels).
"""

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """What every attention mechanism has in common: scores become weights, weights become a context vector."""

    heads = 1

    def keys(self, annotations: Tensor) -> Tensor:
        """The part of the scores that no word changes, (images, regions, size). Computed once an image."""
        raise NotImplementedError

    def scores(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """How well each region answers each hidden state, (images, rows, regions)."""
        raise NotImplementedError

    def forward(
        self, hidden: Tensor, keys: Tensor, annotations: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The context vector z = sum_i alpha_i a_i (Xu et al. 2015, equations 5, 6 and 13).

        Args:
            hidden: (images, rows, hidden), the decoder's state before the word.
            keys: what `keys` gave for these annotations.
            annotations: (images, regions, channels).
            mask: (images, regions), True where a region is real; None where all are. Others get weight zero.

        Returns:
            context (images, rows, channels) and alpha (images, rows, 1, regions).
        """
        scores = self.scores(hidden, keys)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
        alpha = scores.softmax(dim=-1)
        return alpha @ annotations, alpha.unsqueeze(2)


class AdditiveAttention(Attention):
    """The paper's soft attention: score_i = v . tanh(W a_i + U h) (Bahdanau et al. 2014; Xu et al. 2015, 4.2).

    Args:
        channels: size D of an annotation vector.
        hidden_size: size of the decoder's hidden state.
        attention_size: size of the space in which the two are compared.
    """

    def __init__(self, channels: int, hidden_size: int, attention_size: int) -> None:
        super().__init__()
        self.W = nn.Linear(channels, attention_size)
        self.U = nn.Linear(hidden_size, attention_size, bias=False)
        self.v = nn.Linear(attention_size, 1, bias=False)  # a bias would shift all scores alike: softmax undoes it

    def keys(self, annotations: Tensor) -> Tensor:
        """W a_i for every region, (images, regions, attention_size)."""
        return self.W(annotations)

    def scores(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """v . tanh(W a_i + U h), (images, rows, regions)."""
        query = self.U(hidden)
        return self.v(torch.tanh(keys[:, None, :, :] + query[:, :, None, :])).squeeze(-1)


MECHANISMS: dict[str, type[AdditiveAttention]] = {"additive": AdditiveAttention}


def build_attention(name: str, channels: int, hidden_size: int, attention_size: int) -> Attention:
    """The mechanism of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in MECHANISMS:
        raise ValueError(f"no attention mechanism {name!r}; choose one of {', '.join(MECHANISMS)}")
    return MECHANISMS[name](channels, hidden_size, attention_size)
