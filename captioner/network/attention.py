"""Attention mechanisms: where the decoder looks before it says the next word.

Every mechanism is a module with the same two methods. `keys` is called once an image, `forward` once a word:

    keys = attention.keys(annotations)
    context, alpha, choice_log_probability, drawn = attention(hidden, keys, annotations, mask)

Shapes: annotations (images, regions, channels); hidden (images, rows, hidden), where the rows of an image are its
captions in training and its beams in search, so that they share annotations and keys without a copy;
alpha (images, rows, heads, regions), non-negative and summing to 1 over the regions; context (images, rows, channels).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

# In place of a drawn region: the expected context vector was seen.
EXPECTED = -1


class Attended(NamedTuple):
    """What was seen.

    context: (images, rows, channels), the context vector z.
    alpha: (images, rows, heads, regions), the weights; each head's sum to 1 over the regions.
    choice_log_probability: (images, rows), logarithm of the probability of the region that was drawn, from which
        `hard` attention learns; None where nothing is drawn.
    drawn: (images, rows), that region, or `EXPECTED` where the expected context vector was seen; None likewise.
    scores: (images, rows, regions), how well each region answered, before softmax; None where regions are not scored,
        or by several heads.
    """

    context: Tensor
    alpha: Tensor
    choice_log_probability: Tensor | None = None
    drawn: Tensor | None = None
    scores: Tensor | None = None


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
        self,
        hidden: Tensor,
        keys: Tensor,
        annotations: Tensor,
        mask: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> Attended:
        """The context vector z = sum_i alpha_i a_i (Xu et al. 2015, equations 5, 6 and 13).

        Args:
            hidden: (images, rows, hidden), the decoder's state before the word.
            keys: what `keys` gave for these annotations.
            annotations: (images, regions, channels).
            mask: (images, regions), True where a region is real; None where all are. Others get weight zero.
            drawn: (images, rows), what an earlier call gave as `Attended.drawn`, for the same regions to be seen
                again; None to draw. Only `hard` attention draws.
        """
        scores = self.scores(hidden, keys)
        alpha = masked_scores(scores, mask).softmax(dim=-1)
        return Attended(alpha @ annotations, alpha.unsqueeze(2), scores=scores)


def masked_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores (images, rows, regions) with those of regions that are not real at minus infinity."""
    return scores if mask is None else scores.masked_fill(~mask[:, None, :], float("-inf"))


class NoAttention(Attention):
    """alpha_i = 1 / L: every word sees the mean annotation vector. The baseline that shows what attention adds."""

    def __init__(self, channels: int, hidden_size: int, attention_size: int) -> None:
        super().__init__()

    def keys(self, annotations: Tensor) -> Tensor:
        """Nothing to compare with: (images, regions, 0)."""
        return annotations[..., :0]

    def scores(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """Zero for every region, (images, rows, regions)."""
        return hidden.new_zeros(*hidden.shape[:2], keys.shape[1])

    def forward(
        self,
        hidden: Tensor,
        keys: Tensor,
        annotations: Tensor,
        mask: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> Attended:
        """See `Attention.forward`."""
        return super().forward(hidden, keys, annotations, mask)._replace(scores=None)


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
        return self.v((keys[:, None, :, :] + query[:, :, None, :]).tanh_()).squeeze(-1)


class HardAttention(AdditiveAttention):
    """The paper's stochastic attention: one region at a time (Xu et al. 2015, section 4.1).

        s ~ Multinomial(alpha),  z = a_s,  with alpha as in `AdditiveAttention`

    No gradient passes through a draw: `alpha` learns by REINFORCE (equation 11, with the moving-average baseline
    and the entropy term that follow it; see `training.losses.hard_attention_loss`), from
    `Attended.choice_log_probability`. To reduce its variance, each image is with probability one half read through
    the expected context vector instead (end of section 4.1), for all words of all its captions: `keys` decides.

    Without training the region of the greatest weight is seen, or the expected context vector; `alpha` are then
    the weights that were used: 1 for that region, or the distribution itself.

    Args:
        channels, hidden_size, attention_size: as in `AdditiveAttention`.
        inference: "argmax" or "expectation", what to see when not training.

    Raises:
        ValueError: `inference` is neither.
    """

    def __init__(self, channels: int, hidden_size: int, attention_size: int, inference: str = "argmax") -> None:
        super().__init__(channels, hidden_size, attention_size)
        if inference not in ("argmax", "expectation"):
            raise ValueError(f"hard attention sees the 'argmax' or the 'expectation', not {inference!r}")
        self.inference = inference

    def keys(self, annotations: Tensor) -> Tensor:
        """W a_i, and in a last column 1 where the image is seen by expectation, (images, regions, attention_size + 1).

        A coin for each image decides in training; the rest is as `inference` says.
        """
        if self.training:
            expected = torch.rand(annotations.shape[0], 1, 1, device=annotations.device) < 0.5
        else:
            expected = torch.tensor(self.inference == "expectation", device=annotations.device)
        column = expected.to(annotations.dtype).expand(*annotations.shape[:2], 1)
        return torch.cat([self.W(annotations), column], dim=-1)

    def forward(
        self,
        hidden: Tensor,
        keys: Tensor,
        annotations: Tensor,
        mask: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> Attended:
        """See `Attention.forward`; in training `alpha` is the distribution, whatever was drawn from it."""
        scores = self.scores(hidden, keys[..., :-1])
        log_alpha = masked_scores(scores, mask).log_softmax(dim=-1)
        alpha = log_alpha.exp()
        if drawn is None:
            if self.training:
                drawn = torch.multinomial(alpha.detach().flatten(0, 1), 1).view(alpha.shape[:2])
            else:
                drawn = alpha.argmax(dim=-1)
            drawn = drawn.masked_fill(keys[:, :1, -1] > 0, EXPECTED)
        expected, region = (drawn == EXPECTED)[..., None], drawn.clamp(min=0)[..., None]
        weights = torch.where(expected, alpha, torch.zeros_like(alpha).scatter(-1, region, 1.0))
        context = weights @ annotations
        if not self.training:
            return Attended(context, weights.unsqueeze(2), scores=scores)
        choice_log_probability = log_alpha.gather(-1, region).masked_fill(expected, 0.0).squeeze(-1)
        return Attended(context, alpha.unsqueeze(2), choice_log_probability, drawn, scores)


class DotAttention(Attention):
    """score_i = (U h) . (W a_i), Luong et al. 2015: the product of two vectors, one from each side.

    Args:
        channels, hidden_size, attention_size: as in `AdditiveAttention`.
    """

    def __init__(self, channels: int, hidden_size: int, attention_size: int) -> None:
        super().__init__()
        # A bias in W would shift all scores alike: softmax undoes it.
        self.W = nn.Linear(channels, attention_size, bias=False)
        self.U = nn.Linear(hidden_size, attention_size)

    def keys(self, annotations: Tensor) -> Tensor:
        """W a_i for every region, (images, regions, attention_size)."""
        return self.W(annotations)

    def scores(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """(U h) . (W a_i), (images, rows, regions)."""
        return self.U(hidden) @ keys.transpose(1, 2)


class ScaledDotAttention(DotAttention):
    """score_i = (U h) . (W a_i) / sqrt(attention_size) (Vaswani et al. 2017, section 3.2.1).

    The division keeps the scores' variance at that of one product, where softmax still has a gradient.
    """

    def scores(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """(U h) . (W a_i) / sqrt(attention_size), (images, rows, regions)."""
        return super().scores(hidden, keys) / keys.shape[-1] ** 0.5


class MultiHeadAttention(Attention):
    """Several scaled-dot mechanisms side by side (Vaswani et al. 2017, section 3.2.2).

        head_j = softmax((U_j h) . (W_j a) / sqrt(d)) (V_j a),  z = O [head_1, ..., head_n],  d = attention_size / heads

    Args:
        channels, hidden_size: as in `AdditiveAttention`.
        attention_size: size of the queries, keys and values of all heads together.
        heads: number of heads.

    Raises:
        ValueError: attention_size cannot be divided by heads.
    """

    def __init__(self, channels: int, hidden_size: int, attention_size: int, heads: int = 8) -> None:
        super().__init__()
        if heads < 1 or attention_size % heads:
            raise ValueError(f"attention_size {attention_size} cannot be divided into {heads} heads")
        self.heads = heads
        self.U = nn.Linear(hidden_size, attention_size)
        self.W = nn.Linear(channels, attention_size, bias=False)
        self.V = nn.Linear(channels, attention_size)
        self.O = nn.Linear(attention_size, channels)

    def keys(self, annotations: Tensor) -> Tensor:
        """The keys W a_i and the values V a_i side by side, (images, regions, 2 * attention_size)."""
        return torch.cat([self.W(annotations), self.V(annotations)], dim=-1)

    def forward(
        self,
        hidden: Tensor,
        keys: Tensor,
        annotations: Tensor,
        mask: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> Attended:
        """See `Attention.forward`; here `alpha` has a map for each head."""
        query = split_heads(self.U(hidden), self.heads)  # (images, heads, rows, d)
        key, value = (split_heads(part, self.heads) for part in keys.chunk(2, dim=-1))  # (images, heads, regions, d)
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        alpha = scores.softmax(dim=-1)
        return Attended(self.O(merge_heads(alpha @ value)), alpha.transpose(1, 2))


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """(batch, length, size) -> (batch, heads, length, size / heads), without a copy."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(tensor: Tensor) -> Tensor:
    """(batch, heads, length, size / heads) -> (batch, length, size)."""
    return tensor.transpose(1, 2).flatten(2)


MECHANISMS: dict[str, type[Attention]] = {
    "none": NoAttention,
    "additive": AdditiveAttention,
    "hard": HardAttention,
    "dot": DotAttention,
    "scaled_dot": ScaledDotAttention,
    "multi_head": MultiHeadAttention,
}


def build_attention(
    name: str, channels: int, hidden_size: int, attention_size: int, heads: int = 8, hard_inference: str = "argmax"
) -> Attention:
    """The mechanism of that name.

    Args:
        name: a key of `MECHANISMS`.
        channels, hidden_size, attention_size: see `AdditiveAttention`.
        heads: of `multi_head`.
        hard_inference: of `hard`, see `HardAttention`.

    Raises:
        ValueError: there is none of that name (the message lists those there are), or its sizes do not fit.
    """
    if name not in MECHANISMS:
        raise ValueError(f"no attention mechanism {name!r}; choose one of {', '.join(MECHANISMS)}")
    own = {"multi_head": {"heads": heads}, "hard": {"inference": hard_inference}}.get(name, {})
    return MECHANISMS[name](channels, hidden_size, attention_size, **own)  # type: ignore[arg-type]
