"""The reward of self-critical training: CIDEr-D, computed incrementally so that it takes little of a step's time."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from torch import Tensor

LONGEST = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the penalty on a difference in length, in bigrams

Words = Sequence[Hashable]
NGram = tuple[Hashable, ...]


class CiderD:
    """CIDEr-D (Vedantam et al. 2015, section 7), with the values of pycocoevalcap's `Cider`.

    With g_n the vector of a sentence's n-gram counts, each times the n-gram's inverse document frequency, the score
    of a caption c against one reference r is

        10 / 4 * sum_n exp(-(|c| - |r|)^2 / (2 sigma^2)) * min(g_n(c), g_n(r)) . g_n(r) / (||g_n(c)|| ||g_n(r)||)

    and the caption's score is the mean over its references. The length |c| is counted in bigrams, as in the
    original code. Everything that does not depend on the caption (the references' vectors and norms) is computed once.

    Args:
        corpus: the references of every image, each a sequence of words or ids; an n-gram's document frequency is
            the number of images with a reference that contains it.
    """

    def __init__(self, corpus: Iterable[Sequence[Words]]) -> None:
        images = [[count_ngrams(reference) for reference in references] for references in corpus]
        self.documents: Counter[NGram] = Counter()
        for counts in images:
            self.documents.update({ngram for count in counts for ngram in count})
        self.log_documents = math.log(max(len(images), 1))
        self.references = [[self.vector(count) for count in counts] for counts in images]

    def vector(self, counts: Counter[NGram]) -> tuple[dict[NGram, float], list[float], int]:
        """Weight of every n-gram, the norm for each n, and the length in bigrams."""
        weights = {ngram: count * self.rarity(ngram) for ngram, count in counts.items()}
        squares, length = [0.0] * LONGEST, 0
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
            if len(ngram) == 2:
                length += counts[ngram]
        return weights, [math.sqrt(square) for square in squares], length

    def rarity(self, ngram: NGram) -> float:
        """Logarithm of the inverse document frequency."""
        return self.log_documents - math.log(max(1, self.documents[ngram]))

    def score(self, image: int, caption: Words) -> float:
        """CIDEr-D of one caption.

        Args:
            image: position in the corpus of the image whose references are used.
            caption: words or ids, like the corpus.
        """
        weights, norms, length = self.vector(count_ngrams(caption))
        total = 0.0
        for reference, reference_norms, reference_length in self.references[image]:
            similar = [0.0] * LONGEST
            for ngram, weight in weights.items():
                if (other := reference.get(ngram)) is not None:
                    similar[len(ngram) - 1] += min(weight, other) * other
            penalty = math.exp(-((length - reference_length) ** 2) / (2 * SIGMA**2))
            total += penalty * sum(
                value / (own * other) if own and other else value
                for value, own, other in zip(similar, norms, reference_norms, strict=True)
            )
        return 10 * total / (LONGEST * len(self.references[image]))


def count_ngrams(words: Words) -> Counter[NGram]:
    """Number of times that each n-gram of 1 to 4 words occurs in the sentence."""
    return Counter(
        tuple(words[start : start + n]) for n in range(1, LONGEST + 1) for start in range(len(words) - n + 1)
    )


def advantages(rewards: Tensor, greedy: Tensor | None = None) -> Tensor:
    """Each caption's reward minus its baseline, (images, samples).

    Args:
        rewards: (images, samples).
        greedy: (images,), reward of the caption from greedy search, the baseline of Rennie et al. (2017); None for the
            mean of the image's other samples, the baseline of Luo (2020), which needs no further search.

    Raises:
        ValueError: there are no other samples.
    """
    if greedy is not None:
        return rewards - greedy[:, None]
    samples = rewards.shape[1]
    if samples < 2:
        raise ValueError("with one sample an image there are no others for a baseline; use the greedy caption")
    return (rewards - rewards.mean(dim=1, keepdim=True)) * samples / (samples - 1)
