"""The numbers behind a caption, step by step, for learning and teaching attention."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from captioner.api import Captioner
from captioner.arrays import to_numpy
from captioner.captions import Caption
from captioner.engine import Step
from captioner.search import start, steps_of


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The decoder's numbers at one step.

    Attributes:
        word: the word; `<end>` for the end of the sentence.
        scores: float32 (rows, columns), the attention score of each region before softmax; None where there are
            several heads, or regions are not scored.
        weights: float32 (rows, columns), alpha, the mean over the heads; sums to 1.
        entropies: `normalised_entropy` of the weights, then of those of each head where there are several. The entropy
            of the mean is at least the mean of theirs.
        beta: the gate of the context vector, 0 to 1; None where the decoder has no such gate.
        candidates: the likeliest next words and their probabilities, the likeliest first.
        head_weights: float32 (heads, rows, columns), the weights of each head; a transformer's heads are those of its
            first layer, then those of the next. None where there is one head.
        word_weights: float32 (layers, heads, words), the weights of a transformer's self-attention over the words that
            it has read, `<start>` first and the word before this one last; those of each head sum to 1. None for an
            LSTM, and where the graphs in the model's file do not give them: `captioner-export` writes new ones.
    """

    word: str
    scores: np.ndarray | None
    weights: np.ndarray
    entropies: tuple[float, ...]
    beta: float | None
    candidates: tuple[tuple[str, float], ...]
    head_weights: np.ndarray | None = None
    word_weights: np.ndarray | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: everything but `head_weights`, of which there are many."""
        return {
            "word": self.word,
            "scores": None if self.scores is None else self.scores.tolist(),
            "weights": self.weights.tolist(),
            "entropies": list(self.entropies),
            "beta": self.beta,
            "candidates": [{"word": word, "probability": probability} for word, probability in self.candidates],
            "word_weights": None if self.word_weights is None else self.word_weights.tolist(),
        }


def normalised_entropy(weights: np.ndarray) -> float:
    """The entropy of a map, - sum_i alpha_i ln alpha_i, as a share of the largest possible one, ln L.

    Args:
        weights: of L regions, of any shape; they sum to 1.

    Returns:
        0 if one region has all the weight, 1 if all regions have the same weight.
    """
    some = weights[weights > 0]
    return float(0.0 - (some * np.log(some)).sum() / np.log(max(weights.size, 2)))


def explain(
    captioner: Captioner,
    caption: Caption,
    candidates: int = 8,
    temperature: float | None = None,
    context: bool = True,
) -> list[Explanation]:
    """The numbers of each step of a caption; if asked for, with attention changed at that step alone.

    A changed step has the state, and so the scores and the gate, that the words before it left behind; what it passes
    on to the next step is not changed.

    Args:
        captioner: the model that made it.
        caption: made with `keep_annotations=True`, by `Captioner.caption` or `Captioner.teacher_forced`.
        candidates: number of the likeliest words to list at each step. Their probabilities are those of the search,
            which excludes some words.
        temperature: divides the scores before softmax, which gives alpha = softmax(scores / temperature): 0 for the
            region with the largest score alone, infinity for an even map; None for attention as it is.
        context: False closes the context gate: beta is 0, and so is the context vector.

    Returns:
        An explanation of each word, and of the end of the sentence unless the caption was cut before it.

    Raises:
        ValueError: the caption has no annotation vectors; `temperature` is negative, or finite where attention has no
            scores; or the decoder has no gate to close, or several heads behind it.
    """
    annotations = kept_annotations(caption)
    engine, grid, words = captioner.engine, captioner.config.grid, captioner.vocabulary.words
    if temperature is not None and not temperature >= 0:
        raise ValueError(f"temperature must be 0 or above, not {temperature}")
    # The end has a probability only where the model said it.
    tokens = captioner.vocabulary.encode(caption.words)[1 : len(caption.word_log_probabilities) + 1]
    ids = engine.array(np.array([[tokens]]))
    steps = []
    for t, step in enumerate(changed_steps(captioner, annotations, caption.mask, ids, temperature, context)):
        heads = to_numpy(step.alpha)[0, 0]
        weights = heads.mean(axis=0)
        probabilities = np.exp(to_numpy(caption.distribution.log_probabilities(step.logits, ids[..., :t]))[0, 0])
        likeliest = np.argsort(-probabilities, kind="stable")[: min(candidates, int((probabilities > 0).sum()))]
        steps.append(
            Explanation(
                words[tokens[t]],
                None if step.scores is None else to_numpy(step.scores).reshape(grid),
                weights.reshape(grid),
                tuple(map(normalised_entropy, (weights, *heads) if len(heads) > 1 else (weights,))),
                None if step.beta is None else float(to_numpy(step.beta)[0, 0]),
                tuple((words[candidate], float(probabilities[candidate])) for candidate in likeliest),
                heads.reshape(-1, *grid) if len(heads) > 1 else None,
                None if step.word_alpha is None else to_numpy(step.word_alpha)[0, 0],
            )
        )
    return steps


def kept_annotations(caption: Caption) -> np.ndarray:
    """The annotation vectors of a caption. Raises ValueError where it has none."""
    if caption.annotations is None:
        raise ValueError(f"the caption {str(caption)!r} has no annotation vectors; make it with keep_annotations=True")
    return caption.annotations


def changed_steps(
    captioner: Captioner,
    annotations: np.ndarray,
    mask: np.ndarray | None,
    ids: Any,
    temperature: float | None,
    context: bool,
) -> Iterator[Step]:
    """The steps of a caption, (1, 1, steps) ids; for `temperature` and `context` see `explain`.

    The graphs of a network have no input for attention weights. A network whose regions all have the same vector can
    only look at that vector, however it weights them: a changed step is read from a picture whose regions all have the
    context vector that the changed weights give.
    """
    engine = captioner.engine
    given = engine.array(annotations[None])
    masked = None if mask is None else engine.array(mask.reshape(1, -1))
    memory, state, token, _ = start(engine, given, masked, 1)
    usable = np.ones(len(annotations), dtype=bool) if mask is None else mask.ravel()
    for t in range(ids.shape[-1]):
        step = engine.step(memory, state, token)
        if temperature is None and context:
            yield step
        else:
            alpha = to_numpy(step.alpha)
            weights = alpha[0, 0].mean(axis=0) if temperature is None else reweighted(step, usable, temperature)
            if not context and (step.beta is None or alpha.shape[2] > 1):
                raise ValueError("only a decoder with a context gate and one head can go without its context vector")
            vector = weights @ annotations if context else np.zeros_like(annotations[0])
            same = np.broadcast_to(vector, annotations.shape)[None].astype(np.float32)
            read = engine.step(engine.encode(engine.array(same), masked), state, token)
            beta = step.beta if context or step.beta is None else 0 * step.beta
            alpha = np.broadcast_to(weights, alpha.shape)
            yield step._replace(logits=read.logits, alpha=alpha, beta=beta, word_alpha=read.word_alpha)
        state, token = step.state, ids[..., t]


def reweighted(step: Step, usable: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(scores / temperature) over the usable regions, (regions,); see `explain`."""
    if np.isinf(temperature):
        return usable / usable.sum(dtype=np.float32)
    if step.scores is None:
        raise ValueError("attention has no scores, or those of several heads; only an infinite temperature can be used")
    scores = np.where(usable, to_numpy(step.scores)[0, 0], -np.inf)
    below = scores - scores.max()
    if temperature == 0:
        return (np.arange(len(scores)) == scores.argmax()).astype(np.float32)
    weights = np.exp(below / temperature)
    return (weights / weights.sum()).astype(np.float32)


def without_most_attended(captioner: Captioner, caption: Caption, regions: int) -> np.ndarray:
    """The probability of each word when the regions that it looked at most are hidden.

    The caption is read once for each of its words under teacher forcing, with that word's regions hidden from the
    first word on, as in `captioner.hiding`.

    Args:
        captioner, caption: as in `explain`.
        regions: how many to hide; fewer where attention would be left with none.

    Returns:
        float32 (T,). With all regions the probabilities are those of `caption.word_log_probabilities`.

    Raises:
        ValueError: the caption has no annotation vectors.
    """
    engine, count = captioner.engine, len(caption.words)
    annotations = np.repeat(kept_annotations(caption)[None], count, axis=0)
    masks = np.ones(annotations.shape[:2], dtype=bool)
    if caption.mask is not None:
        masks &= caption.mask.ravel()
    hidden = min(regions, int(masks[:1].sum()) - 1)
    most = np.argsort(-caption.attention.reshape(count, -1), axis=1, kind="stable")[:, : max(hidden, 0)]
    np.put_along_axis(masks, most, False, axis=1)
    tokens = captioner.vocabulary.encode(caption.words)[1 : count + 1]
    ids = engine.array(np.array([[tokens]] * count).reshape(count, 1, count))
    probabilities = np.zeros(count, dtype=np.float32)
    if count:
        steps = steps_of(engine, engine.array(annotations), ids, engine.array(masks))
        for t, (step, token) in enumerate(zip(steps, tokens, strict=True)):
            logits, before = step.logits[t : t + 1], ids[t : t + 1, :, :t]
            likely = to_numpy(caption.distribution.log_probabilities(logits, before))
            probabilities[t] = np.exp(likely[0, 0, token])
    return probabilities
