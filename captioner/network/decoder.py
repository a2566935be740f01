"""The LSTM that attends: one step, and whole captions under teacher forcing (Xu et al. 2015, section 3.1.2)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captioner.config import ModelConfig
from captioner.engine import Step
from captioner.network.attention import Attended, build_attention
from captioner.vocabulary import PAD


class Memory(NamedTuple):
    """What the decoder reads of a batch of images at every step, computed once per image.

    annotations: (images, regions, channels), the annotation vectors.
    keys: (images, regions, size), attention's projection of them.
    mask: (images, regions), True for valid regions, or None where all are.
    """

    annotations: Tensor
    keys: Tensor
    mask: Tensor | None

    def first(self, images: int) -> "Memory":
        """That of the first images alone."""
        mask = None if self.mask is None else self.mask[:images]
        return Memory(self.annotations[:images], self.keys[:images], mask)


class State(NamedTuple):
    """The LSTM's state between two words: hidden and cell, each (images, rows, hidden)."""

    hidden: Tensor
    cell: Tensor


class TeacherForced(NamedTuple):
    """The result of reading whole captions. N is the number of words to predict, without padding.

    logits: (N, vocabulary), scores at the position of each word, caption by caption.
    targets: (N,), the words.
    alpha: (images, rows, steps, heads, regions), the attention weights; zero after a caption's end.
    mask: (images, rows, steps), True at the N words.
    choice_log_probability: (images, rows, steps), logarithm of the probability of the regions that were drawn, zero
        after a caption's end; None unless attention draws regions.
    """

    logits: Tensor
    targets: Tensor
    alpha: Tensor
    mask: Tensor
    choice_log_probability: Tensor | None = None

    def log_probabilities(self, excluded: tuple[int, ...] = ()) -> Tensor:
        """Log-probability of each target word, (images, rows, steps); zero where there is no word.

        Args:
            excluded: ids that cannot come; their probability goes to the other words.
        """
        logits = self.logits
        if excluded:
            logits = logits.index_fill(1, torch.tensor(excluded, device=logits.device), float("-inf"))
        log_probabilities = -nn.functional.cross_entropy(logits, self.targets, reduction="none")
        return log_probabilities.new_zeros(self.mask.shape).masked_scatter(self.mask, log_probabilities)


class AttentionLSTM(nn.Module):
    """An LSTM that attends over the annotation vectors before every word.

    With y the previous word, h and c the state, a_i the annotation vectors:

        alpha = attention(a, h)                     where to look
        beta  = sigmoid(w . h)                      how much the context counts for this word
        z     = beta * sum_i alpha_i a_i            the context vector
        h, c  = LSTM([E y, z], h, c)
        p     = softmax(L_o tanh(E y + L_h h + L_z z))      the deep output layer

    The rows of an image (its captions in training, its beams in search) share its annotation vectors.

    Args:
        config: vocabulary_size; attention, its options and attention_size; embedding_size, the size of E y;
            hidden_size, that of h and c; dropout, of the word embedding and of the output layer's input;
            tie_embeddings, whether L_o and E are one matrix (Press and Wolf 2017).
        channels: size of an annotation vector.

    Raises:
        ValueError: there is no such attention mechanism, or its options do not fit.
    """

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        embedding_size, hidden_size = config.embedding_size, config.hidden_size
        self.embedding = nn.Embedding(config.vocabulary_size, embedding_size, padding_idx=PAD)
        self.attention = build_attention(
            config.attention, channels, hidden_size, config.attention_size, config.attention_options
        )
        self.heads = self.attention.heads
        self.initial_hidden = nn.Linear(channels, hidden_size)
        self.initial_cell = nn.Linear(channels, hidden_size)
        self.beta = nn.Linear(hidden_size, 1)
        # The LSTM's four gates in one matrix, in two parts. The words' part can be computed before the first step,
        # that of the context vector and the hidden state cannot.
        self.word_to_gates = nn.Linear(embedding_size, 4 * hidden_size)
        self.state_to_gates = nn.Linear(channels + hidden_size, 4 * hidden_size, bias=False)
        self.hidden_to_output = nn.Linear(hidden_size, embedding_size)
        self.context_to_output = nn.Linear(channels, embedding_size, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(config.vocabulary_size))
        self.output_weight = None if config.tie_embeddings else nn.Parameter(torch.empty_like(self.embedding.weight))
        self.dropout = nn.Dropout(config.dropout)
        self.gates_of_words: Tensor | None = None
        self.gates_are_of: list[Tensor] = []  # copies of the weights that they were computed from
        nn.init.normal_(self.embedding.weight, std=embedding_size**-0.5)
        with torch.no_grad():
            self.embedding.weight[PAD].zero_()
            # A forget gate that starts open lets gradients reach the first words (Jozefowicz et al. 2015).
            self.word_to_gates.bias[hidden_size : 2 * hidden_size] += 1.0
        if self.output_weight is not None:
            nn.init.normal_(self.output_weight, std=embedding_size**-0.5)

    def encode(self, annotations: Tensor, mask: Tensor | None = None) -> Memory:
        """Everything that does not depend on words, computed once per image.

        Args:
            annotations: (images, regions, channels).
            mask: (images, regions), True for valid regions; None where all are.
        """
        self.forget_changed_words()
        return Memory(annotations, self.attention.keys(annotations), mask)

    def initial_state(self, memory: Memory, rows: int) -> State:
        """h_0 and c_0 from the mean annotation vector, the same for each of an image's rows."""
        if memory.mask is None:
            mean = memory.annotations.mean(dim=1, keepdim=True)
        else:
            weights = memory.mask.to(memory.annotations.dtype)
            mean = (weights / weights.sum(dim=1, keepdim=True))[:, None, :] @ memory.annotations
        hidden = torch.tanh(self.initial_hidden(mean))
        cell = torch.tanh(self.initial_cell(mean))
        return State(hidden.expand(-1, rows, -1), cell.expand(-1, rows, -1))

    def step(self, memory: Memory, state: State, words: Tensor) -> Step:
        """Read one word and score the next one.

        Args:
            memory: what `encode` gave.
            state: (images, rows, ...), from `initial_state` or the step before.
            words: (images, rows), ids of the last words; `START` at first.
        """
        embedded = self.dropout(self.embedding(words))
        if self.gates_of_words is None:
            word_gates = self.word_to_gates(embedded)
        else:
            word_gates = nn.functional.embedding(words, self.gates_of_words)
        state, attended, beta = self.advance(memory, state, word_gates)
        drawn = None if attended.drawn is None else attended.drawn[..., None]
        logits = self.predict(embedded, state.hidden, attended.context)
        return Step(logits, state, attended.alpha, beta, drawn, attended.scores)

    def forward(
        self,
        annotations: Tensor,
        captions: Tensor,
        mask: Tensor | None = None,
        inputs: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> TeacherForced:
        """Read whole captions under teacher forcing: each word is predicted from the true ones before it.

        Args:
            annotations: (images, regions, channels).
            captions: (images, rows, length) ids: `START`, words, `END`, then `PAD`; all `PAD` for a missing row.
                Computation is saved where each image's captions are sorted from the longest to the shortest.
            mask: (images, regions), True for valid regions; None where all are.
            inputs: (images, rows, length), read in place of `captions`, which are still the targets.
            drawn: (images, rows, length - 1, layers), the region to use before each word, as a search drew it
                (`captioner.search.Hypotheses`); None for attention to draw its own, where it draws.
        """
        inputs = (captions if inputs is None else inputs)[..., :-1]
        targets = captions[..., 1:]
        word_mask = targets != PAD
        # Each step computes only the images and the rows in which a word is left, so the longest captions come first.
        lengths = word_mask.sum(dim=2).amax(dim=1)
        order = lengths.argsort(descending=True)
        images_left = [int((lengths > t).sum()) for t in range(word_mask.shape[2])]
        rows_left = [int(rows) for rows in word_mask.flip(1).cummax(dim=1)[0].any(dim=0).sum(dim=0)]
        embedded = self.dropout(self.embedding(inputs))
        word_gates = self.word_to_gates(embedded[order])
        drawn = None if drawn is None else drawn[order]

        memory = self.encode(annotations[order], None if mask is None else mask[order])
        state = self.initial_state(memory, captions.shape[1])
        hiddens, contexts, alphas, choice_log_probabilities = [], [], [], []
        for t, (images, rows, gates) in enumerate(zip(images_left, rows_left, word_gates.unbind(dim=2), strict=True)):
            memory = memory.first(images)
            state = State(state.hidden[:images, :rows], state.cell[:images, :rows])
            regions = None if drawn is None else drawn[:images, :rows, t, 0]
            state, attended, _ = self.advance(memory, state, gates[:images, :rows], regions)
            hiddens.append(state.hidden)
            contexts.append(attended.context)
            alphas.append(attended.alpha)
            if attended.choice_log_probability is not None:
                choice_log_probabilities.append(attended.choice_log_probability)
        back = order.argsort()
        hidden, context, alpha = (in_one(parts, word_mask)[back] for parts in (hiddens, contexts, alphas))
        logits = self.predict(embedded[word_mask], hidden[word_mask], context[word_mask])
        choice_log_probability = (
            in_one(choice_log_probabilities, word_mask)[back] * word_mask if choice_log_probabilities else None
        )
        return TeacherForced(
            logits, targets[word_mask], alpha * word_mask[..., None, None], word_mask, choice_log_probability
        )

    def advance(
        self, memory: Memory, state: State, word_gates: Tensor, drawn: Tensor | None = None
    ) -> tuple[State, Attended, Tensor]:
        """The recurrence: the new state, what attention gave (its context vector gated), and beta."""
        attended = self.attention(state.hidden, memory.keys, memory.annotations, memory.mask, drawn)
        beta = torch.sigmoid(self.beta(state.hidden))
        context = beta * attended.context
        gates = word_gates + self.state_to_gates(torch.cat([context, state.hidden], dim=-1))
        write, forget, read, candidate = gates.chunk(4, dim=-1)
        cell = torch.sigmoid(forget) * state.cell + torch.sigmoid(write) * torch.tanh(candidate)
        hidden = torch.sigmoid(read) * torch.tanh(cell)
        return State(hidden, cell), attended._replace(context=context), beta.squeeze(-1)

    def predict(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """The deep output layer (equation 7): scores of the next word, (..., vocabulary)."""
        deep = embedded + self.hidden_to_output(self.dropout(hidden)) + self.context_to_output(context)
        weight = self.embedding.weight if self.output_weight is None else self.output_weight
        return nn.functional.linear(self.dropout(torch.tanh(deep)), weight, self.output_bias)

    def remember_words(self) -> None:
        """Compute each word's part of the gates once, for all searches until the weights change."""
        with torch.no_grad():
            self.gates_of_words = self.word_to_gates(self.embedding.weight)
            self.gates_are_of = [weight.clone() for weight in self.weights_of_gates()]

    def weights_of_gates(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weights that a word's part of the gates is computed from."""
        return self.embedding.weight, self.word_to_gates.weight, self.word_to_gates.bias

    def forget_changed_words(self) -> None:
        """Drop the remembered gates if a weight has changed since. Called once per search."""
        if self.gates_of_words is not None and not all(map(torch.equal, self.weights_of_gates(), self.gates_are_of)):
            self.gates_of_words, self.gates_are_of = None, []

    def _apply(self, *arguments: Any, **options: Any) -> "AttentionLSTM":
        self.gates_of_words, self.gates_are_of = None, []  # on another device, or in another precision
        return super()._apply(*arguments, **options)

    def train(self, mode: bool = True) -> "AttentionLSTM":
        """Set training or evaluation mode; in training the weights change, so remembered gates are dropped."""
        if mode:
            self.gates_of_words, self.gates_are_of = None, []
        return super().train(mode)


def in_one(steps: Sequence[Tensor], word_mask: Tensor) -> Tensor:
    """What the steps gave, (images, rows, ...) each, with zeros for the images and rows that a step left out.

    Args:
        steps: one tensor a step, of the first images and rows.
        word_mask: (images, rows, steps).

    Returns:
        (images, rows, steps, ...).
    """
    images, rows, _ = word_mask.shape
    return torch.stack(
        [
            nn.functional.pad(part, (0, 0) * (part.dim() - 2) + (0, rows - part.shape[1], 0, images - part.shape[0]))
            for part in steps
        ],
        dim=2,
    )
