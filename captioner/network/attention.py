"""Attention mechanisms: where the decoder looks before each word.

Every mechanism is a module with the same two methods. `keys` is called once per image, `forward` once per word:

    keys = attention.keys(annotations)
    attended = attention(hidden, keys, annotations, mask)

Shapes: annotations (images, regions, channels); hidden (images, rows, hidden), where the rows of an image are its
captions in training and its beams in search, so that they share annotations and keys without a copy;
alpha (images, rows, heads, regions), non-negative and summing to 1 over the regions; context (images, rows, channels).

A new mechanism is a subclass of `Attention` under `@register`. All that is special about it is declared on its class:
its name, its options, its number of maps, whether it draws regions, and its loss where it needs one of its own.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from captioner.network.decoder import TeacherForced

# In place of a drawn region: the context vector is the expected one.
EXPECTED = -1
CACHED = 2**18  # numbers of float32 that a processor's cache holds, 1 MiB


class Attended(NamedTuple):
    """What attention gives for one word of each caption.

    context: (images, rows, channels), the context vector z.
    alpha: (images, rows, heads, regions), the weights; each head's sum to 1 over the regions.
    choice_log_probability: (images, rows), logarithm of the probability of the region that was drawn, which
        attention that draws learns from; None where nothing is drawn.
    drawn: (images, rows), that region, or `EXPECTED` where the context vector is the expected one; None likewise.
    scores: (images, rows, regions), how well each region matches the hidden state, before softmax; None where regions
        are not scored, or by several heads.
    """

    context: Tensor
    alpha: Tensor
    choice_log_probability: Tensor | None = None
    drawn: Tensor | None = None
    scores: Tensor | None = None


class Attention(nn.Module):
    """What all attention mechanisms have in common: scores become weights, weights become a context vector.

    A subclass defines `name`, `keys` and `scores`. Keyword-only parameters of its constructor are its options, with
    their defaults; see `ModelConfig.attention_options`.

    Args:
        channels: size D of an annotation vector.
        hidden_size: size of the decoder's hidden state.
        attention_size: size of the space in which the two are compared.

    Attributes:
        name: in configurations and on the command line.
        heads: number of maps of each word.
        shows_scores: whether `Attended.scores` has the scores, so that people can be shown them.
        linear: names of the parameters in which the scores are linear; see `sharpen`.
        draws_regions: whether it draws regions at random in training. Then `Attended.drawn` has them, and
            `extra_loss` is given the moving average of the words' log-probabilities as its baseline.
    """

    name: ClassVar[str]
    linear: ClassVar[tuple[str, ...] | None] = None
    heads = 1
    shows_scores = True
    draws_regions = False

    def __init__(self, channels: int, hidden_size: int, attention_size: int) -> None:
        super().__init__()

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """The options of the mechanism by name."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}

    def keys(self, annotations: Tensor) -> Tensor:
        """The part of the scores that does not depend on words, (images, regions, size). Computed once per image."""
        raise NotImplementedError

    def scores(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """How well each region matches each hidden state, (images, rows, regions)."""
        raise NotImplementedError

    @torch.no_grad()
    def sharpen(self, factor: float) -> None:
        """Multiply all scores by `factor`, once and for all. Above 1, attention concentrates on fewer regions.

        Raises:
            ValueError: the mechanism does not declare `linear`.
        """
        if self.linear is None:
            raise ValueError(f"attention {self.name!r} does not say in which parameters its scores are linear")
        for name in self.linear:
            self.get_parameter(name).mul_(factor)

    def extra_loss(self, output: "TeacherForced", words: float, baseline: float | None) -> Tensor:
        """What the mechanism adds to the training loss, a scalar; zero unless a subclass needs a loss of its own.

        Args:
            output: what the decoder gave for this process's share of a batch.
            words: words in the whole batch, over all processes.
            baseline: moving average of a word's log-probability; None at the first step.
        """
        return output.alpha.new_zeros(())

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
            mask: (images, regions), True for valid regions; None where all are. Others get weight zero.
            drawn: (images, rows), what an earlier call gave as `Attended.drawn`, to use the same regions again; None
                to draw. Only for attention that `draws_regions`.
        """
        scores = self.scores(hidden, keys)
        alpha = masked_scores(scores, mask).softmax(dim=-1)
        return Attended(alpha @ annotations, alpha.unsqueeze(2), scores=scores if self.shows_scores else None)


MECHANISMS: dict[str, type[Attention]] = {}
Mechanism = TypeVar("Mechanism", bound=type[Attention])


def register(mechanism: Mechanism) -> Mechanism:
    """Make an attention mechanism available by its name. A decorator of its class.

    Raises:
        ValueError: there is another mechanism of that name.
    """
    if mechanism.name in MECHANISMS:
        raise ValueError(f"there is an attention mechanism {mechanism.name!r} already")
    MECHANISMS[mechanism.name] = mechanism
    return mechanism


def masked_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores (images, rows, regions) with minus infinity for regions that are not valid."""
    return scores if mask is None else scores.masked_fill(~mask[:, None, :], float("-inf"))


def map_entropy(alpha: Tensor) -> Tensor:
    """Entropy of maps in nats, (..., regions) -> (...); zero where there is no map, only zeros."""
    return -torch.special.xlogy(alpha, alpha.clamp(min=1e-30)).sum(dim=-1)


@register
class NoAttention(Attention):
    """alpha_i = 1 / L: every word sees the mean annotation vector. The baseline that shows what attention adds."""

    name = "none"
    linear = ()
    shows_scores = False  # all are equal

    def keys(self, annotations: Tensor) -> Tensor:
        """Nothing to compare with: (images, regions, 0)."""
        return annotations[..., :0]

    def scores(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """Zero for every region, (images, rows, regions)."""
        return hidden.new_zeros(*hidden.shape[:2], keys.shape[1])


@register
class AdditiveAttention(Attention):
    """The paper's soft attention: score_i = v . tanh(W a_i + U h) (Bahdanau et al. 2014; Xu et al. 2015, 4.2).

    Args:
        channels, hidden_size, attention_size: see `Attention`.
    """

    name = "additive"
    linear = ("v.weight",)

    def __init__(self, channels: int, hidden_size: int, attention_size: int) -> None:
        super().__init__(channels, hidden_size, attention_size)
        self.W = nn.Linear(channels, attention_size)
        self.U = nn.Linear(hidden_size, attention_size, bias=False)
        self.v = nn.Linear(attention_size, 1, bias=False)  # a bias would shift all scores alike: softmax undoes it

    def keys(self, annotations: Tensor) -> Tensor:
        """W a_i for every region, (images, regions, attention_size)."""
        return self.W(annotations)

    def scores(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """v . tanh(W a_i + U h), (images, rows, regions)."""
        query = self.U(hidden)
        if query.requires_grad or keys.requires_grad:
            v = self.v.weight[0]
            return AdditiveScores.apply(query.to(v.dtype), keys, v)
        return self.v((keys[:, None, :, :] + query[:, :, None, :]).tanh_()).squeeze(-1)


class AdditiveScores(torch.autograd.Function):
    """v . tanh(W a_i + U h) as one operation, which computes the tanh again for the gradients.

    For each caption and word a tanh is as large as all keys: with 196 regions and five captions of 32 images 64 MB,
    which take longer to write and to read than to compute. On a CPU a few images at a time are computed, in the
    processor's cache, and as tanh(x) = 2 sigmoid(2 x) - 1, since torch takes five times as long for a tanh as for a
    sigmoid.
    """

    @staticmethod
    def forward(context: Any, query: Tensor, keys: Tensor, v: Tensor) -> Tensor:
        """Scores (images, rows, regions) from query (images, rows, size), keys (images, regions, size), v (size,).

        They are in the type of query and v; under autocast only the keys are in a shorter one.
        """
        context.save_for_backward(query, keys, v)
        parts = [sigmoid_of(*part).mul_(v).sum(dim=-1) for part in in_parts(query, keys)]
        return 2 * torch.cat(parts) - v.sum()

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of query, keys and v from that of the scores."""
        query, keys, v = context.saved_tensors
        of_query, of_keys, of_v = [], [], -gradient.sum()
        four = 4 * v  # the slope of tanh(x) is four times that of sigmoid(2 x) over 2 x
        for some_queries, some_keys, some in in_parts(query, keys, gradient):
            sigmoid = sigmoid_of(some_queries, some_keys)
            of_v = of_v + 2 * (some.flatten() @ sigmoid.flatten(0, 2))
            slope = sigmoid.sub_(sigmoid.square()).mul_(some[..., None])
            of_query.append(slope.sum(dim=2) * four)
            of_keys.append((slope.sum(dim=1) * four).to(keys.dtype))
        return torch.cat(of_query), torch.cat(of_keys), of_v


def sigmoid_of(query: Tensor, keys: Tensor) -> Tensor:
    """sigmoid(2 (W a_i + U h)), (images, rows, regions, size), with query U h (images, rows, size) and keys W a_i."""
    return (keys.to(query.dtype)[:, None, :, :] + query[:, :, None, :]).mul_(2).sigmoid_()


def in_parts(query: Tensor, keys: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of several images, on a CPU as many images at a time as `CACHED` allows, on a GPU all at once."""
    images = max(len(query), 1)
    if query.device.type == "cpu":
        numbers = query.shape[1] * keys.shape[1] * keys.shape[2]  # tanh values of an image
        images = max(1, CACHED // max(numbers, 1))
    return zip(*(tensor.split(images) for tensor in (query, keys, *others)), strict=True)


@register
class HardAttention(AdditiveAttention):
    """The paper's stochastic attention: one region at a time (Xu et al. 2015, section 4.1).

        s ~ Multinomial(alpha),  z = a_s,  with alpha as in `AdditiveAttention`

    No gradient passes through a draw: `alpha` learns by REINFORCE (see `extra_loss`). To reduce its variance, each
    image has, with probability one half, the expected context vector instead (end of section 4.1), for all words of
    all its captions; `keys` decides.

    In evaluation mode the context vector is that of the region with the largest weight, or the expected one; `alpha`
    are then the weights that were used: 1 for that region, or the distribution itself.

    Args:
        channels, hidden_size, attention_size: see `Attention`.
        inference: "argmax" or "expectation", the context vector in evaluation mode.
        reinforce: lambda_r, weight of the REINFORCE term. At 1 its gradient is in expectation that of log p(y | s), but
            so noisy that it drowns that of the words.
        entropy: lambda_e, weight of the entropy term.

    Raises:
        ValueError: `inference` is neither.
    """

    name = "hard"
    draws_regions = True

    def __init__(
        self,
        channels: int,
        hidden_size: int,
        attention_size: int,
        *,
        inference: str = "argmax",
        reinforce: float = 0.1,
        entropy: float = 0.01,
    ) -> None:
        super().__init__(channels, hidden_size, attention_size)
        if inference not in ("argmax", "expectation"):
            raise ValueError(f"inference of hard attention is 'argmax' or 'expectation', not {inference!r}")
        self.inference, self.reinforce, self.entropy = inference, reinforce, entropy

    def keys(self, annotations: Tensor) -> Tensor:
        """W a_i, and in a last column 1 for the expected context vector, (images, regions, attention_size + 1).

        In training that is decided at random for each image, in evaluation mode by `inference`.
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

    def extra_loss(self, output: "TeacherForced", words: float, baseline: float | None) -> Tensor:
        """The REINFORCE and entropy terms (Xu et al. 2015, equation 11 and what follows it).

            L = - lambda_r * sum_t (sum_{t' >= t} log p(y_t' | s) - b) * log alpha_t(s_t) / words
                - lambda_e * sum_t H[alpha_t] / words

        with s_t the regions that were drawn and b the moving average of what so many words scored so far. A region
        affects only the words from step t on; earlier rewards would only add variance. The first step has no b yet,
        and no REINFORCE term. The gradient through the words is that of the cross-entropy, to which this is added.

        Args:
            output, words, baseline: see `Attention.extra_loss`.
        """
        assert output.choice_log_probability is not None, "regions are drawn in training mode only"
        to_come = torch.zeros_like(output.choice_log_probability)
        if baseline is not None:
            advantage = (output.log_probabilities().detach() - baseline) * output.mask
            to_come = advantage.flip(2).cumsum(dim=2).flip(2)
        chosen = (to_come * output.choice_log_probability).sum()
        return -(self.reinforce * chosen + self.entropy * map_entropy(output.alpha).sum()) / max(words, 1)


@register
class DotAttention(Attention):
    """score_i = (U h) . (W a_i) (Luong et al. 2015).

    Args:
        channels, hidden_size, attention_size: see `Attention`.
    """

    name = "dot"
    linear = ("U.weight", "U.bias")

    def __init__(self, channels: int, hidden_size: int, attention_size: int) -> None:
        super().__init__(channels, hidden_size, attention_size)
        # A bias in W would shift all scores alike: softmax undoes it.
        self.W = nn.Linear(channels, attention_size, bias=False)
        self.U = nn.Linear(hidden_size, attention_size)

    def keys(self, annotations: Tensor) -> Tensor:
        """W a_i for every region, (images, regions, attention_size)."""
        return self.W(annotations)

    def scores(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """(U h) . (W a_i), (images, rows, regions)."""
        return self.U(hidden) @ keys.transpose(1, 2)


@register
class ScaledDotAttention(DotAttention):
    """score_i = (U h) . (W a_i) / sqrt(attention_size) (Vaswani et al. 2017, section 3.2.1).

    The division keeps the scores' variance at that of one product, where softmax still has a gradient.
    """

    name = "scaled_dot"

    def scores(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """(U h) . (W a_i) / sqrt(attention_size), (images, rows, regions)."""
        return super().scores(hidden, keys) / keys.shape[-1] ** 0.5


@register
class MultiHeadAttention(Attention):
    """Several scaled-dot mechanisms side by side (Vaswani et al. 2017, section 3.2.2).

        head_j = softmax((U_j h) . (W_j a) / sqrt(d)) (V_j a),  z = O [head_1, ..., head_n],  d = attention_size / heads

    Args:
        channels, hidden_size: see `Attention`.
        attention_size: size of the queries, keys and values of all heads together.
        heads: number of heads.

    Raises:
        ValueError: attention_size cannot be divided by heads.
    """

    name = "multi_head"
    linear = ("U.weight", "U.bias")

    def __init__(self, channels: int, hidden_size: int, attention_size: int, *, heads: int = 8) -> None:
        super().__init__(channels, hidden_size, attention_size)
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


def build_attention(
    name: str, channels: int, hidden_size: int, attention_size: int, options: Mapping[str, Any]
) -> Attention:
    """The mechanism of that name.

    Args:
        name: a key of `MECHANISMS`.
        channels, hidden_size, attention_size: see `Attention`.
        options: see `Attention.option_defaults`; those that are missing have their defaults.

    Raises:
        ValueError: there is no such mechanism or option, or a value does not fit.
    """
    mechanism = mechanism_of(name)
    defaults = mechanism.option_defaults()
    for option, value in options.items():
        default = default_of(option, name, defaults)
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise ValueError(
                f"{option!r:.100} of attention {name!r} should be a {type(default).__name__}, not {value!r:.100}"
            )
    return mechanism(channels, hidden_size, attention_size, **options)


def parse_options(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """All options of a mechanism, from texts KEY=VALUE as on a command line; the others have their defaults.

    Args:
        name: a key of `MECHANISMS`.
        texts: the options.

    Raises:
        ValueError: there is no such mechanism or option, or a value cannot be read.
    """
    defaults = mechanism_of(name).option_defaults()
    options = dict(defaults)
    for text in texts:
        option, _, value = text.partition("=")
        kind = type(default_of(option, name, defaults))
        try:
            options[option] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{option!r} of attention {name!r} should be a {kind.__name__}, not {value!r}") from error
    return options


def mechanism_of(name: str) -> type[Attention]:
    """The class of that name. Raises ValueError where there is none."""
    if name not in MECHANISMS:
        raise ValueError(f"no attention mechanism {name!r:.100}; choose one of {', '.join(MECHANISMS)}")
    return MECHANISMS[name]


def default_of(option: str, name: str, defaults: Mapping[str, Any]) -> Any:
    """The default of an option of the mechanism `name`. Raises ValueError where it has no such option."""
    if option not in defaults:
        raise ValueError(
            f"attention {name!r} has no option {option!r:.100}; it has {', '.join(defaults) or 'none at all'}"
        )
    return defaults[option]
