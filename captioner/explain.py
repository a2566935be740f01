"""The numbers behind a caption, one step at a time: for people who learn or teach attention."""

import dataclasses
from typing import Any

import numpy as np
import torch

from captioner.api import Captioner
from captioner.captions import Caption
from captioner.vocabulary import START


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What happened before one word was said.

    Attributes:
        word: the word; `<end>` for the end of the sentence.
        scores: float32 (rows, columns), how well each region answered, before softmax; None where there are several
            heads, or none of the regions is scored.
        weights: float32 (rows, columns), alpha, the mean over the heads; sums to 1.
        entropies: `normalised_entropy` of the weights, then of each head's where there are several, whose mean is
            more even than they are.
        beta: how far the context vector was let in, 0 to 1; None where the decoder has no such gate.
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
    """How widely a map is spread: its entropy - sum_i alpha_i ln alpha_i as a share of the largest possible, ln L.

    Args:
        weights: of L regions, of any shape; they sum to 1.

    Returns:
        0 where one region has all the weight or there is no other, 1 where all regions have the same.
    """
    some = weights[weights > 0]
    return float(-(some * np.log(some)).sum() / np.log(max(weights.size, 2)))


@torch.inference_mode()
def explain(captioner: Captioner, caption: Caption, candidates: int = 8) -> list[Explanation]:
    """The numbers of each step as the model said the words of a caption.

    Args:
        captioner: the model that said it.
        caption: made with `keep_annotations=True`, by `Captioner.caption` or `Captioner.teacher_forced`.
        candidates: how many of the likeliest words are named at each step, by the probabilities that the search
            chose from: without the words that it ruled out.

    Returns:
        One for each word and one for the end of the sentence, unless the caption was cut before it.

    Raises:
        ValueError: the caption has no annotation vectors.
    """
    if caption.annotations is None:
        raise ValueError(f"the caption {str(caption)!r} has no annotation vectors; make it with keep_annotations=True")
    model, words = captioner.model, captioner.vocabulary.words
    decoder: Any = model.decoder  # whichever it is, it has the same methods
    grid = model.config.grid
    # The end has a probability only where the model said it.
    tokens = captioner.vocabulary.encode(caption.words)[1 : len(caption.word_log_probabilities) + 1]
    annotations = torch.tensor(caption.annotations[None], dtype=next(model.parameters()).dtype, device=model.device)
    memory = decoder.encode(annotations)
    state = decoder.initial_state(memory, rows=1)
    before = torch.empty(1, 1, 0, dtype=torch.long, device=model.device)
    last_tokens = torch.full((1, 1), START, device=model.device)
    steps = []
    for token in tokens:
        step = decoder.step(memory, state, last_tokens)
        heads = step.alpha[0, 0].cpu().numpy()
        weights = heads.mean(axis=0)
        probabilities = caption.distribution.log_probabilities(step.logits, before).exp()[0, 0]
        best = probabilities.topk(min(candidates, int((probabilities > 0).sum())))
        steps.append(
            Explanation(
                words[token],
                None if step.scores is None else step.scores.view(grid).cpu().numpy(),
                weights.reshape(grid),
                tuple(map(normalised_entropy, (weights, *heads) if len(heads) > 1 else (weights,))),
                None if step.beta is None else float(step.beta),
                tuple(
                    (words[candidate], probability)
                    for candidate, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                ),
            )
        )
        state, last_tokens = step.state, torch.full_like(last_tokens, token)
        before = torch.cat([before, last_tokens[..., None]], dim=2)
    return steps
