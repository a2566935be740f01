"""The numbers behind a caption, step by step, for learning and teaching attention."""

import dataclasses
from typing import Any

import numpy as np

from captioner.api import Captioner
from captioner.arrays import to_numpy
from captioner.captions import Caption
from captioner.search import steps_of


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
    """

    word: str
    scores: np.ndarray | None
    weights: np.ndarray
    entropies: tuple[float, ...]
    beta: float | None
    candidates: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "word": self.word,
            "scores": None if self.scores is None else self.scores.tolist(),
            "weights": self.weights.tolist(),
            "entropies": list(self.entropies),
            "beta": self.beta,
            "candidates": [{"word": word, "probability": probability} for word, probability in self.candidates],
        }


def normalised_entropy(weights: np.ndarray) -> float:
    """The entropy of a map, - sum_i alpha_i ln alpha_i, as a share of the largest possible one, ln L.

    Args:
        weights: of L regions, of any shape; they sum to 1.

    Returns:
        0 if one region has all the weight, 1 if all regions have the same weight.
    """
    some = weights[weights > 0]
    return float(-(some * np.log(some)).sum() / np.log(max(weights.size, 2)))


def explain(captioner: Captioner, caption: Caption, candidates: int = 8) -> list[Explanation]:
    """The numbers of each step of a caption.

    Args:
        captioner: the model that made it.
        caption: made with `keep_annotations=True`, by `Captioner.caption` or `Captioner.teacher_forced`.
        candidates: number of the likeliest words to list at each step. Their probabilities are those of the search,
            which excludes some words.

    Returns:
        An explanation of each word, and of the end of the sentence unless the caption was cut before it.

    Raises:
        ValueError: the caption has no annotation vectors.
    """
    if caption.annotations is None:
        raise ValueError(f"the caption {str(caption)!r} has no annotation vectors; make it with keep_annotations=True")
    engine, grid, words = captioner.engine, captioner.config.grid, captioner.vocabulary.words
    # The end has a probability only where the model said it.
    tokens = captioner.vocabulary.encode(caption.words)[1 : len(caption.word_log_probabilities) + 1]
    ids = engine.array(np.array([[tokens]]))
    steps = []
    mask = None if caption.mask is None else engine.array(caption.mask.reshape(1, -1))
    for t, step in enumerate(steps_of(engine, engine.array(caption.annotations[None]), ids, mask)):
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
            )
        )
    return steps
