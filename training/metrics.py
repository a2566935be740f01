"""Statistics of captions and of attention: variety, repetitions, entropy, calibration of the confidence."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from captioner.captions import Caption


def diversity(captions: Sequence[Sequence[str]], known: Collection[tuple[str, ...]] | None = None) -> dict[str, float]:
    """Statistics of captions that do not depend on references.

    Args:
        captions: one an image, as words.
        known: the captions of the training set, as words; None if they are not available.

    Returns:
        The share of distinct captions, the number of different words, the mean length in words, the share of bigrams
        that occur earlier in the same caption, and the share of captions that occur in the training set.
    """
    count = max(len(captions), 1)
    pairs = [list(pairwise(words)) for words in captions]
    figures = {
        "distinct captions": len({tuple(words) for words in captions}) / count,
        "words in use": len({word for words in captions for word in words}),
        "mean length": sum(len(words) for words in captions) / count,
        "repeated pairs": sum(len(of_one) - len(set(of_one)) for of_one in pairs) / max(sum(map(len, pairs)), 1),
    }
    if known is not None:
        figures["captions of the training set"] = sum(tuple(words) in known for words in captions) / count
    return figures


def mean_of_each(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure that all have, such as a score over several data sets."""
    return {
        name: sum(of_one[name] for of_one in figures) / len(figures)
        for name in figures[0]
        if all(name in of_one for of_one in figures)
    }


def all_maps(captions: Sequence[Caption]) -> list[np.ndarray]:
    """The maps of each caption, (T, rows, columns), or (T, heads, rows, columns) where there are several heads."""
    return [caption.attention if caption.head_attention is None else caption.head_attention for caption in captions]


def attention_entropy(maps: Sequence[np.ndarray]) -> tuple[float, float]:
    """Entropy of attention: the mean of - sum_i alpha_i ln alpha_i over all words and heads.

    Args:
        maps: of each caption (T, ..., rows, columns).

    Returns:
        The entropy in nats, and its share of the maximum. It is 0 if all weight is on one region at every word; the
        maximum, the logarithm of the number of regions, is reached if all weights are equal.
    """
    flat = np.concatenate([of_one.reshape(-1, of_one.shape[-2] * of_one.shape[-1]) for of_one in maps])
    entropy = float(-(flat * np.log(np.maximum(flat, 1e-30))).sum(axis=1).mean())
    return entropy, entropy / math.log(flat.shape[1]) if flat.shape[1] > 1 else 0.0


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two lists of numbers, -1 to 1; equal numbers share the mean of their ranks.

    Returns:
        0 where it is not defined: for fewer than two numbers, or where those of one list are all equal.
    """
    ranks = [np.searchsorted(np.sort(x), x) + np.searchsorted(np.sort(x), x, side="right") for x in (a, b)]
    varied = len(a) > 1 and all(np.ptp(rank) > 0 for rank in ranks)
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if varied else 0.0


@dataclass(frozen=True)
class Calibration:
    """The relation of captions' quality to the model's confidence in them.

    correlation: Spearman's rank correlation of confidence and CIDEr, -1 to 1.
    groups: for each tenth of the captions, from the least to the most confident: the lowest and the mean confidence,
        the mean CIDEr, and the mean CIDEr of all captions that are at least as confident.
    """

    correlation: float
    groups: list[dict[str, float]]


def calibration(confidence: Sequence[float], quality: Sequence[float], groups: int = 10) -> Calibration:
    """The calibration of a model's confidence; see `Calibration`.

    Args:
        confidence: of each caption, 0 to 1.
        quality: CIDEr of each caption.
        groups: number of groups of about equal size; fewer if there are fewer captions.
    """
    sure, good = np.asarray(confidence, dtype=float), np.asarray(quality, dtype=float)
    order = np.argsort(sure, kind="stable")
    parts = np.array_split(order, min(groups, len(order)))
    firsts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    return Calibration(
        rank_correlation(sure, good),
        [
            {
                "confidence from": float(sure[part[0]]),
                "mean confidence": float(sure[part].mean()),
                "CIDEr": float(good[part].mean()),
                "CIDEr from here on": float(good[order[first:]].mean()),
            }
            for part, first in zip(parts, firsts, strict=True)
        ],
    )
