"""The Transformer's parts (Vaswani et al. 2017): a decoder, and self-attention over the annotation vectors.

Both normalise before each sub-layer instead of after it (Xiong et al. 2020), which trains without a long warm-up.
"""

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from captioner.config import ModelConfig
from captioner.engine import Step
from captioner.network.attention import Attended, Attention, build_attention, merge_heads, split_heads
from captioner.network.decoder import Memory, TeacherForced
from captioner.vocabulary import PAD


class SelfAttention(nn.Module):
    """Each position of a sequence attends to the others (Vaswani et al. 2017, section 3.2.2).

    Args:
        size: of the input and output vectors.
        heads: number of heads, into which the vectors are divided.

    Raises:
        ValueError: size cannot be divided by heads.
    """

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or size % heads:
            raise ValueError(f"vectors of size {size} cannot be divided into {heads} heads")
        self.heads = heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size, bias=False)  # a bias would shift all scores alike: softmax undoes it
        self.value = nn.Linear(size, size)
        self.out = nn.Linear(size, size)

    def forward(
        self, x: Tensor, past: Tensor | None = None, causal: bool = False, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attention of new positions over those that they may see.

        Args:
            x: (batch, new, size).
            past: (batch, steps, 2 * size), keys and values of the positions before these, as returned for them.
            causal: whether a position attends to none that comes after it.
            mask: (batch, new), True for valid positions; others are ignored. Not together with `causal`.

        Returns:
            (batch, new, size); the keys and values of all positions so far, (batch, steps + new, 2 * size); and, for
            one new position of a causal sequence, its weights, (batch, heads, steps + 1). None for several positions,
            since torch's fused attention does not give them.
        """
        present = torch.cat([self.key(x), self.value(x)], dim=-1)
        if past is not None:
            present = torch.cat([past, present], dim=1)
        key, value = (split_heads(part, self.heads) for part in present.chunk(2, dim=-1))
        query = split_heads(self.query(x), self.heads)
        if causal and x.shape[1] == 1:  # it may see all
            alpha = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)
            return self.out(merge_heads(alpha @ value)), present, alpha.squeeze(2)
        visible = None if mask is None else mask[:, None, None, :]
        if causal:
            everything = torch.ones(x.shape[1], present.shape[1], dtype=torch.bool, device=x.device)
            visible = everything.tril(present.shape[1] - x.shape[1])
        gathered = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return self.out(merge_heads(gathered)), present, None


def feed_forward(size: int, dropout: float) -> nn.Sequential:
    """The position-wise network of a layer, four times as wide inside (section 3.3)."""
    return nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * size, size))


class AnnotationLayer(nn.Module):
    """Self-attention, then the position-wise network, each with a residual connection."""

    def __init__(self, size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(2))
        self.attention = SelfAttention(size, heads)
        self.feed_forward = feed_forward(size, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(images, regions, size) -> the same."""
        x = x + self.dropout(self.attention(self.norms[0](x), mask=mask)[0])
        return x + self.dropout(self.feed_forward(self.norms[1](x)))


class AnnotationTransformer(nn.Module):
    """Self-attention over the annotation vectors, before the decoder reads them (section 3.1).

    Two learnt embeddings, of its row and of its column, are added to each region's vector.

    Args:
        size: of the annotation vectors.
        grid: rows and columns of regions.
        layers: number of layers.
        heads: number of heads in each.
        dropout: share of each sub-layer's output dropped in training.
    """

    def __init__(self, size: int, grid: tuple[int, int], layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(grid[0], 1, size) * 0.02)
        self.columns = nn.Parameter(torch.randn(1, grid[1], size) * 0.02)
        self.layers = nn.ModuleList(AnnotationLayer(size, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(size)

    def forward(self, annotations: Tensor, mask: Tensor | None = None) -> Tensor:
        """(images, regions, size) -> the same; `mask` (images, regions) is True for valid regions."""
        x = annotations + (self.rows + self.columns).flatten(0, 1)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class Past(NamedTuple):
    """What the decoder keeps of the words so far, so that no step computes it again.

    keys_values: (images, rows, layers, steps, 2 * size), each layer's keys and values of its self-attention.
    """

    keys_values: Tensor


class DecoderLayer(nn.Module):
    """Self-attention over the words, attention over the image, and the position-wise network, each with a residual.

    Args:
        config: see `TransformerDecoder`.
        channels: size of an annotation vector.
    """

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(3))
        self.self_attention = SelfAttention(size, config.heads)
        self.attention = build_attention(
            config.attention, channels, size, config.attention_size, config.attention_options
        )
        self.read = nn.Identity() if channels == size else nn.Linear(channels, size)
        self.feed_forward = feed_forward(size, config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, past: Tensor | None, memory: Memory, drawn: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Attended, Tensor | None]:
        """Read new words of each caption.

        Args:
            x: (images, rows, new, size).
            past: (images, rows, steps, 2 * size), keys and values of the words before; None where there are none.
            memory: the image's annotation vectors with this layer's keys.
            drawn: (images, rows, new), regions to use, where attention draws them; None for it to draw.

        Returns:
            x again; keys and values of all words so far; what attention gave, (images, rows, new, ...); and, for one
            new word, the weights of self-attention, (images, rows, heads, steps + 1).
        """
        images, rows, new, _ = x.shape
        before = None if past is None else past.flatten(0, 1)
        back, present, words = self.self_attention(self.norms[0](x).flatten(0, 1), before, causal=True)
        x = x + self.dropout(back.unflatten(0, (images, rows)))
        # Every position of every caption attends by itself: to the mechanism they are rows of one image.
        drawn = None if drawn is None else drawn.flatten(1, 2)
        attended = self.attention(self.norms[1](x).flatten(1, 2), memory.keys, memory.annotations, memory.mask, drawn)
        attended = Attended._make(None if part is None else part.unflatten(1, (rows, new)) for part in attended)
        x = x + self.dropout(self.read(attended.context))
        x = x + self.dropout(self.feed_forward(self.norms[2](x)))
        words = None if words is None else words.unflatten(0, (images, rows))
        return x, present.unflatten(0, (images, rows)), attended, words


class Read(NamedTuple):
    """What the layers of a decoder give for new words of each caption.

    x: (images, rows, new, size).
    presents: of each layer, keys and values of all words so far, (images, rows, steps, 2 * size).
    alpha: (images, rows, new, heads, regions), the maps of all layers.
    word_alpha: (images, rows, layers, heads, steps), the weights of self-attention; None for several new words.
    choice_log_probability: (images, rows, new), of the regions that were drawn; None where none are drawn.
    drawn: (images, rows, new, layers), these regions; None likewise.
    """

    x: Tensor
    presents: list[Tensor]
    alpha: Tensor
    word_alpha: Tensor | None
    choice_log_probability: Tensor | None = None
    drawn: Tensor | None = None


class TransformerDecoder(nn.Module):
    """A Transformer that attends over the annotation vectors in each of its layers (Vaswani et al. 2017, section 3.1).

    It has the methods of `captioner.network.decoder.AttentionLSTM` and takes any of the attention mechanisms as
    cross-attention. The maps of all layers are kept: alpha has layers * (maps of the mechanism), the first layer's
    first.

    Args:
        config: vocabulary_size; hidden_size, the size of word embeddings and of the layers' vectors; layers; heads, of
            the self-attention; attention, its options and attention_size, of the cross-attention; dropout, of
            embeddings and of each sub-layer's output; tie_embeddings, as in `AttentionLSTM`.
        channels: size of an annotation vector.

    Raises:
        ValueError: there is no such attention mechanism, or sizes and options do not fit each other.
    """

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.embedding = nn.Embedding(config.vocabulary_size, hidden_size, padding_idx=PAD)
        stack = [DecoderLayer(config, channels) for _ in range(config.layers)]
        self.layers = nn.ModuleList(stack)
        self.heads = sum(layer.attention.heads for layer in stack)
        self.norm = nn.LayerNorm(hidden_size)
        self.output_bias = nn.Parameter(torch.zeros(config.vocabulary_size))
        self.output_weight = None if config.tie_embeddings else nn.Parameter(torch.empty_like(self.embedding.weight))
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=hidden_size**-0.5)
        with torch.no_grad():
            self.embedding.weight[PAD].zero_()
        if self.output_weight is not None:
            nn.init.normal_(self.output_weight, std=hidden_size**-0.5)

    @property
    def attention(self) -> Attention:
        """The first layer's cross-attention; that of the others has the same class and options."""
        return cast(DecoderLayer, self.layers[0]).attention

    def encode(self, annotations: Tensor, mask: Tensor | None = None) -> tuple[Memory, ...]:
        """Everything that does not depend on words, computed once per image: a memory for each layer.

        Args:
            annotations: (images, regions, channels).
            mask: (images, regions), True for valid regions; None where all are.
        """
        attentions = (cast(DecoderLayer, layer).attention for layer in self.layers)
        return tuple(Memory(annotations, attention.keys(annotations), mask) for attention in attentions)

    def initial_state(self, memories: tuple[Memory, ...], rows: int) -> Past:
        """No words yet."""
        annotations = memories[0].annotations
        size = self.embedding.embedding_dim
        return Past(annotations.new_empty(annotations.shape[0], rows, len(self.layers), 0, 2 * size))

    def step(self, memories: tuple[Memory, ...], state: Past, words: Tensor) -> Step:
        """Read one word and score the next one; see `AttentionLSTM.step`. There is no beta gate: beta is None."""
        found = self.read(memories, words[..., None], state.keys_values)
        return Step(
            self.predict(found.x[:, :, 0]),
            Past(torch.stack(found.presents, dim=2)),
            found.alpha[:, :, 0],
            drawn=None if found.drawn is None else found.drawn[:, :, 0],
            word_alpha=found.word_alpha,
        )

    def forward(
        self,
        annotations: Tensor,
        captions: Tensor,
        mask: Tensor | None = None,
        inputs: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> TeacherForced:
        """Read whole captions, all words at once; see `AttentionLSTM.forward`."""
        inputs = (captions if inputs is None else inputs)[..., :-1]
        targets = captions[..., 1:]
        word_mask = targets != PAD
        found = self.read(self.encode(annotations, mask), inputs, None, drawn)
        return TeacherForced(
            self.predict(found.x[word_mask]),
            targets[word_mask],
            found.alpha * word_mask[..., None, None],
            word_mask,
            None if found.choice_log_probability is None else found.choice_log_probability * word_mask,
        )

    def read(
        self, memories: tuple[Memory, ...], words: Tensor, past: Tensor | None, drawn: Tensor | None = None
    ) -> Read:
        """New words through all layers.

        Args:
            memories: what `encode` gave.
            words: (images, rows, new).
            past: (images, rows, layers, steps, 2 * size); see `Past`.
            drawn: (images, rows, new, layers), regions to use; None for attention to draw them, where it draws.
        """
        size = self.embedding.embedding_dim
        first = 0 if past is None else past.shape[3]
        places = sinusoids(first, words.shape[2], size).to(self.embedding.weight)
        x = self.dropout(self.embedding(words) * size**0.5 + places)
        presents, per_layer, word_alpha = [], [], []
        for number, (layer, memory) in enumerate(zip(self.layers, memories, strict=True)):
            before = None if past is None else past[:, :, number]
            x, present, attended, over_words = layer(x, before, memory, None if drawn is None else drawn[..., number])
            presents.append(present)
            per_layer.append(attended)
            word_alpha.append(over_words)
        alpha = torch.cat([attended.alpha for attended in per_layer], dim=3)
        found = Read(x, presents, alpha, None if word_alpha[0] is None else torch.stack(word_alpha, dim=2))
        if per_layer[0].choice_log_probability is None:
            return found
        return found._replace(
            choice_log_probability=torch.stack([attended.choice_log_probability for attended in per_layer]).sum(dim=0),
            drawn=torch.stack([attended.drawn for attended in per_layer], dim=-1),
        )

    def predict(self, x: Tensor) -> Tensor:
        """Scores of the next word, (..., vocabulary)."""
        weight = self.embedding.weight if self.output_weight is None else self.output_weight
        return nn.functional.linear(self.dropout(self.norm(x)), weight, self.output_bias)

    def remember_words(self) -> None:
        """Nothing: word embeddings are looked up as they are."""


def sinusoids(first: int, count: int, size: int) -> Tensor:
    """Position encodings of `count` positions from `first` on, (count, size) (Vaswani et al. 2017, section 3.5)."""
    place = torch.arange(first, first + count)[:, None]
    angle = place * torch.exp(torch.arange(0, size, 2) * (-math.log(10000.0) / size))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :size]
