"""Greedy, beam and sampled decoding: from annotation vectors to words, for a whole batch of images at once.

Every search keeps its hypotheses in arrays of shape (images, rows, ...), where the rows of an image are its beams
or its samples, and advances all of them in one step of the decoder. A hypothesis that has ended stays in its row
and is padded. The decoder may be any object with `heads`, `encode`, `initial_state` and `step`: an engine (see
`captioner.engine`), or the decoder of a network in training. Its arrays are NumPy's or torch's; what is computed here
is written once for both (see `captioner.arrays`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from captioner.arrays import (
    Array,
    cast,
    full,
    gather_rows,
    log_softmax,
    moved,
    namespace,
    of_images,
    put_along,
    sort_descending,
    take_along,
    to_numpy,
    top,
    without_gradients,
)
from captioner.engine import Step
from captioner.vocabulary import END, PAD, SPECIAL, START, UNKNOWN

NEVER = float("-inf")
# How captions are searched for unless the caller says otherwise. These penalties scored best on Flickr8k's dev images.
BEAM_SIZE = 5
MAX_LENGTH = 22
LENGTH_PENALTY = 1.0
BLOCK_NGRAMS = 2
# To leave images out of a batch copies what the decoder remembers of the others; that pays from this share on.
LEFT_OUT = 1 / 8


class Hypotheses(NamedTuple):
    """Captions on their way, or finished, the best of an image first once a search returns them.

    words: (images, rows, steps) ids, `END` last where a caption ended, then `PAD`.
    log_probabilities: (images, rows, steps) of each word given those before it; zero on padding.
    alpha: (images, rows, steps, heads, regions), where the decoder looked; zero on padding.
    scores: (images, rows), by which they are ranked: log-probability over length to a power.
    drawn: (images, rows, steps, layers), the regions that attention drew, where it is left to draw any
        (hard attention in training); None otherwise.
    """

    words: Array
    log_probabilities: Array
    alpha: Array
    scores: Array
    drawn: Array | None = None

    @property
    def lengths(self) -> Array:
        """Words in each caption, the end included: (images, rows)."""
        return (self.words != PAD).sum(axis=2)

    def choose(self, rows: Array, scores: Array) -> "Hypotheses":
        """For each image the rows named, (images, new rows), with their scores."""
        return Hypotheses(
            gather_rows(self.words, rows),
            gather_rows(self.log_probabilities, rows),
            gather_rows(self.alpha, rows),
            scores,
            None if self.drawn is None else gather_rows(self.drawn, rows),
        )

    def extend(self, words: Array, log_probabilities: Array, alpha: Array, drawn: Array | None = None) -> "Hypotheses":
        """Each row with one more word, (images, rows)."""
        concatenate = namespace(words).concatenate
        if drawn is not None:
            drawn = drawn[:, :, None]
            drawn = drawn if self.drawn is None else concatenate([self.drawn, drawn], axis=2)
        return self._replace(
            words=concatenate([self.words, words[..., None]], axis=2),
            log_probabilities=concatenate([self.log_probabilities, log_probabilities[..., None]], axis=2),
            alpha=concatenate([self.alpha, alpha[:, :, None]], axis=2),
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

    def log_probabilities(self, logits: Array, words: Array) -> Array:
        """Of the next word, (images, rows, vocabulary).

        Args:
            logits: (images, rows, vocabulary).
            words: (images, rows, steps), ids of the words before it.
        """
        logits = allowed(logits, words, self.block_ngrams)
        if self.temperature != 1:
            # With the largest at zero, no temperature is so low that the division overflows.
            largest = namespace(logits).amax(logits, axis=-1, keepdims=True)
            logits = (logits - largest) / max(self.temperature, 1e-30)
        return nucleus(log_softmax(logits), self.top_p)


def beam_search(
    decoder: Any,
    annotations: Array,
    mask: Array | None = None,
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
        decoder: an engine, or the decoder of a network in evaluation mode.
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
    with without_gradients(annotations):
        memory, state, tokens, hypotheses = start(decoder, annotations, mask, beam_size)
        # All beams are equal at first: only the first may grow, or they would all stay alike.
        total = full(tokens.shape, NEVER, like=annotations)
        total[:, 0] = 0.0
        finished = Finished(len(annotations))

        for _ in range(max_length):
            step = decoder.step(memory, state, tokens)
            log_probabilities = distribution.log_probabilities(step.logits, hypotheses.words)
            ended = has_ended(tokens)
            log_probabilities = only_padding_after_the_end(log_probabilities, ended)
            images, _, vocabulary = log_probabilities.shape
            if vocabulary - len(SPECIAL) < beam_size:
                raise ValueError(
                    f"beam_size {beam_size} is more than the {vocabulary - len(SPECIAL)} words a caption may begin with"
                )
            # The best of an image are among as many likeliest words of each of its hypotheses.
            log_probabilities, words = top(log_probabilities, beam_size)
            totals = total[..., None] + log_probabilities
            lengths = cast(hypotheses.lengths + ~ended, "float32")[..., None]
            ranks = totals / lengths.clip(1) ** length_penalty

            scores, best = (each[:, :beam_size] for each in sort_descending(ranks.reshape(images, -1)))
            parents = best // beam_size
            tokens, total, log_probabilities = (
                gather_rows(each.reshape(images, -1), best) for each in (words, totals, log_probabilities)
            )
            hypotheses = hypotheses.choose(parents, scores).extend(
                tokens,
                log_probabilities,
                gather_rows(step.alpha, parents) * (tokens != PAD)[..., None, None],
                None if step.drawn is None else gather_rows(step.drawn, parents),
            )
            state = type(state)(*(gather_rows(part, parents) for part in step.state))
            hypotheses, memory, state, tokens, total = finished.leave_out(hypotheses, memory, state, tokens, total)
            if not len(tokens):
                break
        return finished.together(hypotheses)


def sample(
    decoder: Any,
    annotations: Array,
    mask: Array | None = None,
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
        seed: the same seed gives the same captions, however the images are batched and with any engine, because each
            image is drawn with the same random numbers, or with its own where there is a seed for each; None draws
            afresh.

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
    images = annotations.shape[0]
    seeds = [seed] * images if seed is None or isinstance(seed, int) else seed
    chances = moved(np.stack([random_numbers(one, samples, max_length) for one in seeds]), like=annotations)
    with without_gradients(annotations):
        memory, state, tokens, hypotheses = start(decoder, annotations, mask, samples)
        finished = Finished(images)

        for t in range(max_length):
            step = decoder.step(memory, state, tokens)
            log_probabilities = distribution.log_probabilities(step.logits, hypotheses.words)
            log_probabilities = only_padding_after_the_end(log_probabilities, has_ended(tokens))
            tokens = draw(log_probabilities, chances[..., t])
            hypotheses = hypotheses.extend(
                tokens,
                take_along(log_probabilities, tokens[..., None])[..., 0],
                step.alpha * (tokens != PAD)[..., None, None],
                step.drawn,
            )
            hypotheses, memory, state, tokens, chances = finished.leave_out(
                hypotheses, memory, step.state, tokens, chances
            )
            if not len(tokens):
                break

        hypotheses = finished.together(hypotheses)
        scores = hypotheses.log_probabilities.sum(axis=2) / hypotheses.lengths.clip(1)
        scores, order = sort_descending(scores)
        return hypotheses.choose(order, scores)


def follow(decoder: Any, annotations: Array, words: Array, mask: Array | None = None) -> Hypotheses:
    """Captions that somebody else wrote, read word by word: teacher forcing.

    Args:
        decoder, annotations, mask: as in `beam_search`.
        words: (images, rows, steps) ids, without `START`; `PAD` after a caption's end.

    Returns:
        Hypotheses of these words, with the log-probabilities that a search would have chosen them by.
    """
    with without_gradients(annotations):
        *_, hypotheses = start(decoder, annotations, mask, words.shape[1])
        for t, step in enumerate(steps_of(decoder, annotations, words, mask)):
            tokens = words[..., t]
            hypotheses = hypotheses.extend(
                tokens,
                log_probability(step, words, t),
                step.alpha * (tokens != PAD)[..., None, None],
            )
        return hypotheses._replace(scores=hypotheses.log_probabilities.sum(axis=2) / hypotheses.lengths.clip(1))


def log_probability(step: Step, words: Array, t: int) -> Array:
    """Of the words at place t of captions that are given, (images, rows), by the step before them; 0 for padding.

    Args:
        step: the decoder's.
        words: (images, rows, steps) ids; see `follow`.
        t: the place, from 0.
    """
    tokens = words[..., t]
    log_probabilities = Distribution().log_probabilities(step.logits, words[..., :t])
    log_probabilities = only_padding_after_the_end(log_probabilities, tokens == PAD)
    return take_along(log_probabilities, tokens[..., None])[..., 0]


def steps_of(decoder: Any, annotations: Array, words: Array, mask: Array | None = None) -> Iterator[Step]:
    """The decoder's step before each word of captions that are given; see `follow`."""
    memory, state, tokens, _ = start(decoder, annotations, mask, words.shape[1])
    for t in range(words.shape[2]):
        step = decoder.step(memory, state, tokens)
        yield step
        state, tokens = step.state, words[..., t]


def start(decoder: Any, annotations: Array, mask: Array | None, rows: int) -> tuple[Any, Any, Array, Hypotheses]:
    """What the decoder remembers of the images, the first state, the first tokens, and hypotheses without a word."""
    images, regions, _ = annotations.shape
    memory = decoder.encode(annotations, mask)
    return (
        memory,
        decoder.initial_state(memory, rows),
        full((images, rows), START, annotations, "int64"),
        Hypotheses(
            full((images, rows, 0), PAD, annotations, "int64"),
            full((images, rows, 0), 0, annotations),
            full((images, rows, 0, decoder.heads, regions), 0, annotations),
            full((images, rows), 0, annotations),
        ),
    )


class Finished:
    """The captions of those images of a batch that have no caption left that goes on.

    Steps need not be computed for them any more.

    Args:
        images: how many the batch has.
    """

    def __init__(self, images: int) -> None:
        self.going = np.arange(images)  # the images whose captions go on
        self.parts: list[tuple[np.ndarray, Hypotheses]] = []

    def leave_out(self, hypotheses: Hypotheses, memory: Any, state: Any, tokens: Array, other: Array) -> Any:
        """What is given, for the images that go on; all of them as long as only few have ended."""
        ended = to_numpy(has_ended(tokens).all(axis=1))
        if np.count_nonzero(ended) < LEFT_OUT * len(ended):
            return hypotheses, memory, state, tokens, other
        over, on = np.flatnonzero(ended), np.flatnonzero(~ended)
        self.parts.append((self.going[over], of_images(hypotheses, over)))
        self.going = self.going[on]
        return of_images((hypotheses, memory, state, tokens, other), on)

    def together(self, hypotheses: Hypotheses) -> Hypotheses:
        """The captions of all images in the order of the batch, given those of the images that go on."""
        images, parts = zip(*self.parts, (self.going, hypotheses), strict=True)
        order = np.concatenate(images).argsort()
        steps = hypotheses.words.shape[2]
        fields = zip(*parts, strict=True)
        return Hypotheses(*(None if field[0] is None else joined(field, steps)[order] for field in fields))


def joined(arrays: Sequence[Array], steps: int) -> Array:
    """A field of `Hypotheses` of several groups of images in one array; words, and what goes with them, are padded."""
    concatenate, zeros_like = namespace(arrays[0]).concatenate, namespace(arrays[0]).zeros_like
    if arrays[0].ndim > 2:
        arrays = [
            concatenate([array, *[zeros_like(array[:, :, :1])] * (steps - array.shape[2])], axis=2) for array in arrays
        ]
    return concatenate(arrays, axis=0)


def has_ended(tokens: Array) -> Array:
    """Whether a caption ended with its latest token, or before it; of the shape of `tokens`."""
    return (tokens == END) | (tokens == PAD)


def allowed(logits: Array, words: Array, block_ngrams: int) -> Array:
    """Logits (images, rows, vocabulary) with what must not come next ruled out.

    No caption holds a special word but its end, none is empty, and with `block_ngrams` n no run of n words comes
    twice: a word is ruled out where it would end a run whose first n - 1 words are the last words of the caption.
    """
    logits = cast(logits, "float32")
    steps = words.shape[2]
    for special in (PAD, START, UNKNOWN) if steps else (PAD, START, UNKNOWN, END):
        logits[..., special] = NEVER
    if block_ngrams > 0 and steps >= block_ngrams:
        # `ends` holds the last word of each run of n; it is ruled out where the n - 1 words before it are the latest.
        ends = words[..., block_ngrams - 1 :]
        repeats = ends > UNKNOWN
        for k in range(block_ngrams - 1):
            latest = words[..., steps - block_ngrams + 1 + k, None]
            repeats = repeats & (words[..., k : k + ends.shape[-1]] == latest)
        # What would not be a repeat writes to PAD, which is ruled out already.
        put_along(logits, namespace(words).where(repeats, ends, PAD), NEVER)
    return logits


def only_padding_after_the_end(log_probabilities: Array, ended: Array) -> Array:
    """A caption that has ended goes on with `PAD` alone, at no cost. Changed in place."""
    log_probabilities[ended] = NEVER
    log_probabilities[..., PAD] = namespace(log_probabilities).where(ended, 0.0, log_probabilities[..., PAD])
    return log_probabilities


def nucleus(log_probabilities: Array, top_p: float) -> Array:
    """The distribution cut to the fewest likeliest words that reach `top_p`, and normalised again."""
    if top_p >= 1:
        return log_probabilities
    xp = namespace(log_probabilities)
    ordered, order = sort_descending(log_probabilities)
    probabilities = xp.exp(ordered)
    reached_before = probabilities.cumsum(axis=-1) - probabilities
    kept = full(log_probabilities.shape, False, log_probabilities, "bool")
    put_along(kept, order, reached_before < top_p)
    return log_softmax(xp.where(kept, log_probabilities, NEVER))


def random_numbers(seed: int | None, samples: int, max_length: int) -> np.ndarray:
    """Those that one image is drawn with, (samples, max_length) in [0, 1); NumPy's, whatever the engine."""
    return np.random.default_rng(None if seed is None else seed % 2**64).random((samples, max_length))


def draw(log_probabilities: Array, chances: Array) -> Array:
    """One word a row by inverting the cumulative distribution at `chances` (images, rows) in [0, 1)."""
    # Not in a shorter type, where a chance could round to 1.
    cumulative = namespace(log_probabilities).exp(cast(log_probabilities, "float64")).cumsum(axis=-1)
    before = cumulative <= chances[..., None] * cumulative[..., -1:]
    return before.sum(axis=-1).clip(None, log_probabilities.shape[-1] - 1)


def check_lengths(rows: int, name: str, max_length: int) -> None:
    """Raise ValueError unless both numbers are at least 1."""
    if rows < 1:
        raise ValueError(f"{name} must be at least 1, not {rows}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, not {max_length}")
