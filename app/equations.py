"""The equations of a step of the decoder, with the numbers of the step in them."""

import math
from collections.abc import Iterator

import numpy as np

from captioner.config import ModelConfig
from captioner.explain import Explanation

SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
MOST_TERMS = 3  # of a weighted sum
LEAST_WEIGHT = 0.0005  # which is not 0.000 in print
# How a region is scored, by the name of the mechanism: s is the decoder's state, d the size of what is multiplied.
SCORES = {
    "additive": "v · tanh(W aᵢ + U {s})",
    "hard": "v · tanh(W aᵢ + U {s})",
    "dot": "(U {s}) · (W aᵢ)",
    "scaled_dot": "(U {s}) · (W aᵢ) / √{d}",
    "multi_head": "(U {s}) · (W aᵢ) / √{d}",
}


def equations(
    step: Explanation, config: ModelConfig, temperature: float | None = None, context: bool = True
) -> list[str]:
    """The equations by which the model's mechanism gets from scores to the context vector z, a line each.

    Regions i count from 1, row by row. Where there are several maps, each has its own line: "layer 1, head 2: ...".

    Args:
        step: a step of a caption.
        config: the model's.
        temperature, context: how attention was changed at the step; see `captioner.explain.explain`.
    """
    maps = (step.weights if step.head_weights is None else step.head_weights).reshape(-1, step.weights.size)
    layers = config.layers if config.decoder == "transformer" else 1
    lines = list(score_lines(step, config, len(maps) // layers))
    for number, heads in enumerate(maps.reshape(layers, -1, step.weights.size), 1):
        found = [*weight_lines(heads, config, temperature), *context_lines(heads, config, step.beta, context)]
        if layers > 1:
            found = [f"layer {number}{', ' if line.startswith('head') else ': '}{line}" for line in found]
        lines += found
    return lines


def score_lines(step: Explanation, config: ModelConfig, heads: int) -> Iterator[str]:
    """The equation of the scores, with that of the region of the largest weight where there are numbers."""
    top = int(step.weights.argmax())
    number = "" if step.scores is None else f"e{below(top + 1)} = {step.scores.flat[top]:.2f}"
    formula = SCORES.get(config.attention, "").format(
        s="x" if config.decoder == "transformer" else "h", d=config.attention_size // heads
    )
    if formula or number:
        yield ", ".join(filter(None, (formula and f"eᵢ = {formula}", number)))


def weight_lines(heads: np.ndarray, config: ModelConfig, temperature: float | None) -> Iterator[str]:
    """How the scores of a layer's heads become their weights, (heads, regions)."""
    for head, weights in enumerate(heads, 1):
        line = alpha_line(weights, config, temperature)
        yield f"head {head}: {line}" if len(heads) > 1 or config.attention == "multi_head" else line


def alpha_line(weights: np.ndarray, config: ModelConfig, temperature: float | None) -> str:
    """How the scores of a head become its weights, (regions,)."""
    top = below(int(weights.argmax()) + 1)
    if config.attention == "none" or temperature == math.inf:
        count = np.count_nonzero(weights)
        return f"αᵢ = 1 / {count} = {1 / count:.3f}"
    takes_one = config.attention == "hard" and config.attention_options.get("inference", "argmax") == "argmax"
    if temperature == 0 or (takes_one and temperature is None):
        return f"α{top} = 1, as e{top} is the largest score; the others are 0"
    divided = "" if temperature in (None, 1) else f" / {temperature:g}"
    return f"α{top} = exp(e{top}{divided}) / Σᵢ exp(eᵢ{divided}) = {weights.max():.3f}"


def context_lines(heads: np.ndarray, config: ModelConfig, beta: float | None, context: bool) -> Iterator[str]:
    """How the weights of a layer's heads, (heads, regions), become its context vector."""
    if beta is not None:
        yield f"β = σ(w · h) = {beta:.2f}" if context else "β = 0"
    gate, share = ("", "") if beta is None else ("β ", f"{beta:.2f} · ")
    if config.attention != "multi_head":
        if len(heads) == 1:  # how a mechanism of one's own joins its heads is not known
            yield f"z = {gate}Σᵢ αᵢ aᵢ = {share}({weighted_sum(heads[0], 'a')})"
        return
    for head, weights in enumerate(heads, 1):
        yield f"head {head}: o{below(head)} = Σᵢ αᵢ V aᵢ = {weighted_sum(weights, 'V a')}"
    outputs = f"O [{', '.join(f'o{below(head)}' for head in range(1, len(heads) + 1))}]"
    yield f"z = {gate}{outputs}" + (f" = {share}{outputs}" if share else "")


def weighted_sum(weights: np.ndarray, vector: str) -> str:
    """The terms with the largest of the weights, (regions,), for example "0.612 a₃ + 0.201 a₁ + …"."""
    order = np.argsort(-weights, kind="stable")[: np.count_nonzero(weights >= LEAST_WEIGHT)]
    terms = [f"{weights[region]:.3f} {vector}{below(int(region) + 1)}" for region in order[:MOST_TERMS]]
    return " + ".join([*terms, "…"] if len(order) > MOST_TERMS else terms)


def below(number: int) -> str:
    """A number as an index."""
    return str(number).translate(SUBSCRIPTS)
