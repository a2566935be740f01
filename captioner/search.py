"""Greedy, beam and sampled decoding: from annotation vectors to words, for a whole batch of images at once.

Every search keeps its hypotheses in tensors of shape (images, rows, ...), where the rows of an image are its beams
or its samples, and advances all of them in one step of the decoder. A hypothesis that has ended stays in its row
and is padded. The decoder may be any module with `heads`, `encode`, `initial_state` and `step` like
`captioner.network.decoder.AttentionLSTM`. Its steps give a `captioner.network.decoder.Step`, whose state is a named
tuple of tensors of shape (images, rows, ...).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captioner.vocabulary import END, PAD, SPECIAL, START, UNKNOWN

NEVER = float("-inf")
# How captions are searched for unless the caller says otherwise. These penalties scored best on Flickr8k's dev images.
BEAM_SIZE = 5
MAX_LENGTH = 22
LENGTH_PENALTY = 1.0
BLOCK_NGRAMS = 2


class Hypotheses(NamedTuple):
    """Captions on their way, or finished, the best of an image first once a search returns them.

    words: (images, rows, steps) ids, `END` last where a caption ended, then `PAD`.
    log_probabilities: (images, rows, steps) of each word given those before it; zero on padding.
    alpha: (images, rows, steps, heads, regions), where the decoder looked; zero on padding.
    scores: (images, rows), by which they are ranked: log-probability over length to a power.
    drawn: (images, rows, steps, layers), the regions that attention drew, where it is left to draw any
        (`captioner.network.attention.HardAttention` in training mode); None otherwise.
    """

    words: Tensor
    log_probabilities: Tensor
    alpha: Tensor
    scores: Tensor
    drawn: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Words in each caption, the end included: (images, rows)."""
        return (self.words != PAD).sum(dim=2)

    def choose(self, rows: Tensor, scores: Tensor) -> "Hypotheses":
        """For each image the rows named, (images, new rows), with their scores."""
        return Hypotheses(
            gather_rows(self.words, rows),
            gather_rows(self.log_probabilities, rows),
            gather_rows(self.alpha, rows),
            scores,
            None if self.drawn is None else gather_rows(self.drawn, rows),
        )

    def extend(
        self, words: Tensor, log_probabilities: Tensor, alpha: Tensor, drawn: Tensor | None = None
    ) -> "Hypotheses":
        """Each row with one more word, (images, rows)."""
        if drawn is not None:
            drawn = drawn[:, :, None]
            drawn = drawn if self.drawn is None else torch.cat([self.drawn, drawn], dim=2)
        return self._replace(
            words=torch.cat([self.words, words[..., None]], dim=2),
            log_probabilities=torch.cat([self.log_probabilities, log_probabilities[..., None]], dim=2),
            alpha=torch.cat([self.alpha, alpha[:, :, None]], dim=2),
            drawn=drawn,
        )


class Distribution(NamedTuple):
    """How the scores of the next word become the probabilities that it is chosen by.

    block_ngrams: when above 0, no run of that many words stands twice in a caption.
    temperature: divides the logits.
    top_p: only the likeliest words that together reach this probability are left.
    """

    block_ngrams: int = 0
    temperature: float = 1.0
    top_p: float = 1.0

    def log_probabilities(self, logits: Tensor, words: Tensor) -> Tensor:
        """Of the next word, (images, rows, vocabulary).

        Args:
            logits: (images, rows, vocabulary).
            words: (images, rows, steps), ids of the words before it.
        """
        logits = allowed(logits, words, self.block_ngrams)
        if self.temperature != 1:
            # With the largest at zero, no temperature is so low that the division overflows.
            logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(self.temperature, 1e-30)
        return nucleus(logits.log_softmax(dim=-1), self.top_p)


def gather_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """tensor (images, rows, ...) -> the rows named for each image by `rows` (images, new rows)."""
    images = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
    return tensor[images, rows]


@torch.inference_mode()
def beam_search(
    decoder: Any,
    annotations: Tensor,
    mask: Tensor | None = None,
    *,
    beam_size: int = 5,
    max_length: int = 20,
    length_penalty: float = 1.0,
    block_ngrams: int = 0,
) -> Hypotheses:
    """The `beam_size` captions of each image that score best; with a beam of 1, greedy search.

    A caption's score is its log-probability divided by its length (the end counted) to the power of
    `length_penalty` (Wu et al. 2016, with their alpha as power of the plain length). Captions that have ended
    compete with those that go on; what has not ended after `max_length` words is cut there and still returned.

    Args:
        decoder: the decoder, in evaluation mode.
        annotations: (images, regions, channels).
        mask: (images, regions), True where a region is real; None where all are.
        beam_size: hypotheses kept for each image.
        max_length: most words in a caption.
        length_penalty: 0 ranks by log-probability, which favours short captions; 1 by its mean over the words.
        block_ngrams: when above 0, no run of that many words stands twice in a caption.

    Returns:
        Hypotheses with `beam_size` rows, the best first.

    Raises:
        ValueError: beam_size or max_length below 1, or more beams than words.
    """
    check_lengths(beam_size, "beam_size", max_length)
    distribution = Distribution(block_ngrams)
    memory, state, hypotheses = start(decoder, annotations, mask, beam_size)
    tokens = torch.full(hypotheses.scores.shape, START, device=annotations.device)
    # All beams are equal at first: only the first may grow, or they would all stay alike.
    total = torch.full_like(hypotheses.scores, NEVER)
    total[:, 0] = 0.0

    for _ in range(max_length):
        step = decoder.step(memory, state, tokens)
        log_probabilities = distribution.log_probabilities(step.logits, hypotheses.words)
        ended = (tokens == END) | (tokens == PAD)
        log_probabilities = only_padding_after_the_end(log_probabilities, ended)
        totals = total[..., None] + log_probabilities
        lengths = (hypotheses.lengths + ~ended)[..., None]
        ranks = totals / lengths.clamp(min=1) ** length_penalty

        vocabulary = ranks.shape[-1]
        if vocabulary - len(SPECIAL) < beam_size:
            raise ValueError(
                f"beam_size {beam_size} is more than the {vocabulary - len(SPECIAL)} words a caption may begin with"
            )
        scores, best = ranks.flatten(1).topk(beam_size, dim=1)
        parents, tokens = best // vocabulary, best % vocabulary
        total = totals.flatten(1).gather(1, best)
        hypotheses = hypotheses.choose(parents, scores).extend(
            tokens,
            log_probabilities.flatten(1).gather(1, best),
            gather_rows(step.alpha, parents) * (tokens != PAD)[..., None, None],
            None if step.drawn is None else gather_rows(step.drawn, parents),
        )
        state = type(state)(*(gather_rows(part, parents) for part in step.state))
        if bool(((tokens == END) | (tokens == PAD)).all()):
            break
    return hypotheses


@torch.inference_mode()
def sample(
    decoder: Any,
    annotations: Tensor,
    mask: Tensor | None = None,
    *,
    samples: int = 1,
    max_length: int = 20,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] | None = None,
    block_ngrams: int = 0,
) -> Hypotheses:
    """Captions drawn word by word from the model's own distribution.

    Args:
        decoder, annotations, mask, max_length, block_ngrams: as in `beam_search`.
        samples: captions drawn for each image.
        temperature: divides the logits; below 1 safer, above 1 bolder.
        top_p: draw only among the likeliest words that together reach this probability (Holtzman et al. 2020).
        seed: the same seed gives the same captions, however the images are batched, because each image is
            drawn with the same random numbers, or with its own where there is a seed for each; None draws afresh.

    Returns:
        Hypotheses with `samples` rows, the likeliest first; log-probabilities are those of the distribution
        that was drawn from, so that a temperature of 1 and top_p of 1 give the model's own.

    Raises:
        ValueError: samples or max_length below 1, temperature not above 0, top_p outside (0, 1].
    """
    check_lengths(samples, "samples", max_length)
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"temperature must be above 0 and finite, not {temperature}; for the likeliest words use beams"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    distribution = Distribution(block_ngrams, temperature, top_p)
    memory, state, hypotheses = start(decoder, annotations, mask, samples)
    tokens = torch.full(hypotheses.scores.shape, START, device=annotations.device)
    if seed is None:
        chances = torch.rand(annotations.shape[0], samples, max_length)
    else:
        seeds = [seed] if isinstance(seed, int) else seed
        drawn = [torch.rand(samples, max_length, generator=torch.Generator().manual_seed(value)) for value in seeds]
        chances = torch.stack(drawn).expand(annotations.shape[0], -1, -1)
    chances = chances.to(annotations.device)  # not in a shorter type, where they could round to 1

    for t in range(max_length):
        step = decoder.step(memory, state, tokens)
        log_probabilities = distribution.log_probabilities(step.logits, hypotheses.words)
        ended = (tokens == END) | (tokens == PAD)
        log_probabilities = only_padding_after_the_end(log_probabilities, ended)
        tokens = draw(log_probabilities, chances[..., t])
        hypotheses = hypotheses.extend(
            tokens,
            log_probabilities.gather(-1, tokens[..., None]).squeeze(-1),
            step.alpha * (tokens != PAD)[..., None, None],
            step.drawn,
        )
        state = step.state
        if bool(((tokens == END) | (tokens == PAD)).all()):
            break

    scores = hypotheses.log_probabilities.sum(dim=2) / hypotheses.lengths.clamp(min=1)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return hypotheses.choose(order, scores)


def start(decoder: Any, annotations: Tensor, mask: Tensor | None, rows: int) -> tuple[Any, Any, Hypotheses]:
    """The memory of the images, the first state, and hypotheses without a word yet."""
    images, regions, _ = annotations.shape
    memory = decoder.encode(annotations, mask)
    return (
        memory,
        decoder.initial_state(memory, rows),
        Hypotheses(
            torch.empty(images, rows, 0, dtype=torch.long, device=annotations.device),
            annotations.new_empty(images, rows, 0),
            annotations.new_empty(images, rows, 0, decoder.heads, regions),
            annotations.new_zeros(images, rows),
        ),
    )


def allowed(logits: Tensor, words: Tensor, block_ngrams: int) -> Tensor:
    """Logits (images, rows, vocabulary) with what must not come next ruled out.

    No caption holds a special word but its end, none is empty, and with `block_ngrams` n no run of n words comes
    twice: a word is ruled out where it would end a run whose first n - 1 words are the last words of the caption.
    """
    logits = logits.float().clone()
    logits[..., [PAD, START, UNKNOWN]] = NEVER
    steps = words.shape[2]
    if steps == 0:
        logits[..., END] = NEVER
    if block_ngrams > 0 and steps >= block_ngrams:
        runs = words.unfold(2, block_ngrams, 1)  # (images, rows, runs, n)
        last = words[..., steps - block_ngrams + 1 :]
        repeats = (runs[..., :-1] == last[:, :, None, :]).all(dim=-1) & (runs[..., -1] > UNKNOWN)
        # What would not be a repeat writes to PAD, which is ruled out already.
        logits.scatter_(2, torch.where(repeats, runs[..., -1], PAD), NEVER)
    return logits


def only_padding_after_the_end(log_probabilities: Tensor, ended: Tensor) -> Tensor:
    """A caption that has ended goes on with `PAD` alone, at no cost."""
    log_probabilities = log_probabilities.masked_fill(ended[..., None], NEVER)
    log_probabilities[..., PAD] = torch.where(ended, 0.0, log_probabilities[..., PAD])
    return log_probabilities


def nucleus(log_probabilities: Tensor, top_p: float) -> Tensor:
    """The distribution cut to the fewest likeliest words that reach `top_p`, and normalised again."""
    if top_p >= 1:
        return log_probabilities
    ordered, order = log_probabilities.sort(dim=-1, descending=True)
    reached_before = ordered.exp().cumsum(dim=-1) - ordered.exp()
    kept = torch.empty_like(reached_before, dtype=torch.bool).scatter_(-1, order, reached_before < top_p)
    return log_probabilities.masked_fill(~kept, NEVER).log_softmax(dim=-1)


def draw(log_probabilities: Tensor, chances: Tensor) -> Tensor:
    """One word a row by inverting the cumulative distribution at `chances` (images, rows) in [0, 1)."""
    cumulative = log_probabilities.double().exp().cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, (chances.double() * cumulative[..., -1])[..., None], right=True)
    return drawn.squeeze(-1).clamp(max=log_probabilities.shape[-1] - 1)


def check_lengths(rows: int, name: str, max_length: int) -> None:
    """Raise ValueError unless both numbers are at least 1."""
    if rows < 1:
        raise ValueError(f"{name} must be at least 1, not {rows}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, not {max_length}")
