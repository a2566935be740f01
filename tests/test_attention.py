"""Attention weights are a distribution over the regions, and the one that the paper's equation gives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.attention import AdditiveAttention, build_attention

SIZES = {"channels": 6, "hidden_size": 5, "attention_size": 4}


def inputs(images: int, rows: int, regions: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(images, rows, SIZES["hidden_size"], generator=generator)
    annotations = torch.randn(images, regions, SIZES["channels"], generator=generator)
    mask = torch.rand(images, regions, generator=generator) < 0.6
    mask[:, 0] = True
    return hidden, annotations, mask


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 10**6), st.floats(0.1, 50))
def test_weights_are_non_negative_sum_to_one_and_are_zero_on_padding(images, rows, regions, seed, scale):
    hidden, annotations, mask = inputs(images, rows, regions, seed)
    attention = AdditiveAttention(**SIZES)
    torch.nn.init.normal_(attention.v.weight, std=scale)
    context, alpha = attention(hidden, attention.keys(annotations), annotations, mask)
    assert alpha.shape == (images, rows, 1, regions)
    assert context.shape == (images, rows, SIZES["channels"])
    assert (alpha >= 0).all()
    assert torch.allclose(alpha.sum(dim=-1), torch.ones(images, rows, 1), atol=1e-5)
    assert (alpha.squeeze(2)[~mask[:, None, :].expand(-1, rows, -1)] == 0).all()


@torch.no_grad()
def test_the_weights_are_those_of_the_equation():
    hidden, annotations, mask = inputs(2, 3, 5, seed=1)
    attention = AdditiveAttention(**SIZES)
    context, alpha = attention(hidden, attention.keys(annotations), annotations, mask)
    W, b, U, v = attention.W.weight, attention.W.bias, attention.U.weight, attention.v.weight[0]
    for i in range(2):
        for r in range(3):
            scores = [
                math.exp(float(v @ torch.tanh(W @ annotations[i, k] + b + U @ hidden[i, r]))) if mask[i, k] else 0.0
                for k in range(5)
            ]
            weights = torch.tensor(scores) / sum(scores)
            assert torch.allclose(alpha[i, r, 0], weights, atol=1e-6)
            assert torch.allclose(context[i, r], (weights[:, None] * annotations[i]).sum(dim=0), atol=1e-5)


def test_rows_that_share_an_image_get_what_each_would_get_alone():
    hidden, annotations, mask = inputs(1, 4, 7, seed=2)
    attention = AdditiveAttention(**SIZES)
    together, _ = attention(hidden, attention.keys(annotations), annotations, mask)
    for row in range(4):
        alone, _ = attention(hidden[:, row : row + 1], attention.keys(annotations), annotations, mask)
        assert torch.allclose(together[:, row : row + 1], alone, atol=1e-6)


def test_an_unknown_mechanism_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="additive"):
        build_attention("telepathy", **SIZES)
