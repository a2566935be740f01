"""The equations on the page have the numbers that the mechanism's own formula gives, for every mechanism and head."""

import itertools
import math
import re

import pytest
import torch
from test_explain import PHOTO, captioner_of

from app.equations import equations
from captioner.explain import explain

# Each mechanism's formula on the page, and the same with the network's weights: hidden (size,), annotations (regions,
# channels) -> scores (heads, regions).
FORMULAS = {
    "none": ("", lambda m, h, a: torch.zeros(1, len(a))),
    "additive": ("v · tanh(W aᵢ + U {s})", lambda m, h, a: m.v(torch.tanh(m.W(a) + m.U(h))).T),
    "hard": ("v · tanh(W aᵢ + U {s})", lambda m, h, a: m.v(torch.tanh(m.W(a) + m.U(h))).T),
    "dot": ("(U {s}) · (W aᵢ)", lambda m, h, a: (m.W(a) @ m.U(h))[None]),
    "scaled_dot": ("(U {s}) · (W aᵢ) / √12", lambda m, h, a: (m.W(a) @ m.U(h))[None] / math.sqrt(12)),
    "multi_head": (
        "(U {s}) · (W aᵢ) / √4",
        lambda m, h, a: torch.einsum("lhd,hd->hl", m.W(a).view(-1, 3, 4), m.U(h).view(3, 4)) / 2,
    ),
}
SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉"


def index(number: int) -> str:
    return "".join(SUBSCRIPTS[int(digit)] for digit in str(number))


def terms(weights, vector: str) -> str:
    """A weighted sum of at most three terms as on the page."""
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    order = [i for i in order if weights[i] >= 0.0005]
    return " + ".join(f"{weights[i]:.3f} {vector}{index(i + 1)}" for i in order[:3]) + " + …" * (len(order) > 3)


def model_of(small, decoder: str, attention: str):
    options = {"attention_options": {"heads": 3}} if attention == "multi_head" else {}
    return captioner_of(small, decoder=decoder, attention=attention, heads=2, **options)


@pytest.mark.parametrize(("decoder", "attention"), list(itertools.product(("lstm", "transformer"), FORMULAS)))
@torch.no_grad()
def test_each_line_has_the_numbers_of_the_mechanisms_formula(small, decoder, attention):
    model = model_of(small, decoder, attention)
    caption = model.caption(PHOTO, max_length=4, keep_annotations=True)
    network, annotations = model.model.decoder, torch.from_numpy(caption.annotations)
    layers = [layer.attention for layer in network.layers] if decoder == "transformer" else [network.attention]
    states = [[] for _ in layers]
    for layer, seen in zip(layers, states, strict=True):
        layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][0, 0]))
    formula, score = FORMULAS[attention]
    steps = explain(model, caption)
    assert len(steps) == len(states[0]) >= 2
    for t, step in enumerate(steps):
        expected = []
        scores = [score(layer, seen[t], annotations) for layer, seen in zip(layers, states, strict=True)]
        if formula:
            formula_here = f"eᵢ = {formula.format(s='h' if decoder == 'lstm' else 'x')}"
            top = int(scores[0].argmax())
            known = decoder == "lstm" and attention != "multi_head"  # scores of several maps are not given
            expected.append(formula_here + (f", e{index(top + 1)} = {scores[0][0, top]:.2f}" if known else ""))
        for number, of_layer in enumerate(scores, 1):
            name, named = (f"layer {number}, ", f"layer {number}: ") if decoder == "transformer" else ("", "")
            weights = [one.softmax(dim=0).tolist() for one in of_layer]
            if attention == "hard":
                weights = [[float(i == int(one.argmax())) for i in range(6)] for one in of_layer]
            prefixes = [f"{name}head {head + 1}: " for head in range(3)] if attention == "multi_head" else [named]
            for prefix, one in zip(prefixes, weights, strict=True):
                i = index(one.index(max(one)) + 1)
                expected.append(
                    {
                        "none": f"{prefix}αᵢ = 1 / 6 = 0.167",
                        "hard": f"{prefix}α{i} = 1, as e{i} is the largest score; the others are 0",
                    }.get(attention, f"{prefix}α{i} = exp(e{i}) / Σᵢ exp(eᵢ) = {max(one):.3f}")
                )
            if decoder == "lstm":
                expected.append(f"β = σ(w · h) = {torch.sigmoid(network.beta(states[0][t])).item():.2f}")
            gate, share = ("β ", f"{step.beta:.2f} · ") if decoder == "lstm" else ("", "")
            if attention == "multi_head":
                for head, (prefix, one) in enumerate(zip(prefixes, weights, strict=True), 1):
                    expected.append(f"{prefix}o{index(head)} = Σᵢ αᵢ V aᵢ = {terms(one, 'V a')}")
                outputs = "O [o₁, o₂, o₃]"
                expected.append(f"{named}z = {gate}{outputs}" + (f" = {share}{outputs}" if share else ""))
            else:
                expected.append(f"{named}z = {gate}Σᵢ αᵢ aᵢ = {share}({terms(weights[0], 'a')})")
        assert equations(step, model.config) == expected


@pytest.mark.parametrize(
    ("temperature", "line"),
    [
        (0, r"α. = 1, as e. is the largest score; the others are 0"),
        (0.5, r"α. = exp\(e. / 0\.5\) / Σᵢ exp\(eᵢ / 0\.5\) = {weight:.3f}"),
        (1, r"α. = exp\(e.\) / Σᵢ exp\(eᵢ\) = {weight:.3f}"),
        (math.inf, r"αᵢ = 1 / 6 = 0\.167"),
    ],
)
@pytest.mark.parametrize("attention", ["additive", "hard"])
def test_the_equations_follow_a_change_of_the_temperature(small, attention, temperature, line):
    model = model_of(small, "lstm", attention)
    caption = model.caption(PHOTO, max_length=3, keep_annotations=True)
    for step in explain(model, caption, temperature=temperature):
        found = equations(step, model.config, temperature=temperature)
        assert re.fullmatch(line.format(weight=step.weights.max()), found[1])


def test_without_context_the_gate_is_closed(small):
    model = model_of(small, "lstm", "additive")
    (step, *_) = explain(model, model.caption(PHOTO, max_length=3, keep_annotations=True), context=False)
    found = equations(step, model.config, context=False)
    assert found[-2] == "β = 0"
    assert found[-1].startswith("z = β Σᵢ αᵢ aᵢ = 0.00 · (")


def test_hard_attention_that_reads_the_expected_vector_has_a_softmax(small):
    model = captioner_of(small, attention="hard", attention_options={"inference": "expectation"})
    (step, *_) = explain(model, model.caption(PHOTO, max_length=3, keep_annotations=True))
    assert equations(step, model.config)[1].endswith(f"/ Σᵢ exp(eᵢ) = {step.weights.max():.3f}")


def test_every_head_of_an_even_map_has_the_same_weights(small):
    model = model_of(small, "transformer", "multi_head")
    (step, *_) = explain(model, model.caption(PHOTO, max_length=3, keep_annotations=True), temperature=math.inf)
    lines = [line for line in equations(step, model.config, temperature=math.inf) if "αᵢ = 1 / 6" in line]
    assert lines == [f"layer {layer}, head {head}: αᵢ = 1 / 6 = 0.167" for layer in (1, 2) for head in (1, 2, 3)]
