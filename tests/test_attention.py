"""Attention weights are a distribution over the regions, and those that each mechanism's equation gives."""

import math
import re
from pathlib import Path

import pytest
import torch
from conftest import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captioner.network.attention import (
    MECHANISMS,
    AdditiveAttention,
    Attention,
    HardAttention,
    build_attention,
    parse_options,
    register,
)
from captioner.network.decoder import TeacherForced
from captioner.search import beam_search
from captioner.vocabulary import END, START
from training.losses import caption_loss

README = Path(__file__).parents[1] / "README.md"
SIZES = {"channels": 6, "hidden_size": 5, "attention_size": 4}
# Options with which the mechanisms are tested; a new one needs a line here only if its defaults do not suit the sizes.
OPTIONS = {"multi_head": {"heads": 2}}


def inputs(images: int, rows: int, regions: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(images, rows, SIZES["hidden_size"], generator=generator)
    annotations = torch.randn(images, regions, SIZES["channels"], generator=generator)
    mask = torch.rand(images, regions, generator=generator) < 0.6
    mask[:, 0] = True
    return hidden, annotations, mask


def attention_of(name: str, seed: int = 0, scale: float = 1.0, **options):
    torch.manual_seed(seed)
    attention = build_attention(name, **SIZES, options=OPTIONS.get(name, {}) | options)
    for weight in attention.parameters():
        nn.init.normal_(weight, std=scale)
    return attention


@pytest.mark.parametrize("name", MECHANISMS)
def test_sharpening_divides_the_temperature_of_the_softmax(name):
    hidden, annotations, _ = inputs(2, 3, 7, seed=1)
    attention = attention_of(name, **({"inference": "expectation"} if name == "hard" else {})).eval()
    before = attention(hidden, attention.keys(annotations), annotations).alpha
    attention.sharpen(1.5)
    after = attention(hidden, attention.keys(annotations), annotations).alpha
    assert torch.allclose(after, (1.5 * before.log()).softmax(dim=-1), atol=1e-6)
    assert name == "none" or not torch.allclose(after, before, atol=1e-3)


def test_a_mechanism_that_does_not_declare_linear_is_not_sharpened():
    class Strange(Attention):
        name = "strange"

    with pytest.raises(ValueError, match="'strange' does not say in which parameters"):
        Strange(**SIZES).sharpen(2.0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MECHANISMS)
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 10**6), st.floats(0.1, 5))
def test_weights_are_non_negative_sum_to_one_and_are_zero_on_padding(
    name, training, images, rows, regions, seed, scale
):
    hidden, annotations, mask = inputs(images, rows, regions, seed)
    attention = attention_of(name, seed, scale).train(training)
    context, alpha, *_ = attention(hidden, attention.keys(annotations), annotations, mask)
    assert alpha.shape == (images, rows, attention.heads, regions)
    assert context.shape == (images, rows, SIZES["channels"])
    assert (alpha >= 0).all()
    assert torch.allclose(alpha.sum(dim=-1), torch.ones(images, rows, attention.heads), atol=1e-5)
    assert (alpha[~mask[:, None, None, :].expand_as(alpha)] == 0).all()


@pytest.mark.parametrize("name", MECHANISMS)
def test_masked_regions_get_no_weight(name):
    hidden, annotations, mask = inputs(3, 2, 8, seed=4)
    attention = attention_of(name).eval()
    changed = torch.where(mask[..., None], annotations, 100.0)
    first, second = (attention(hidden, attention.keys(x), x, mask).context for x in (annotations, changed))
    assert torch.allclose(first, second, atol=1e-5)


@torch.no_grad()
def test_additive_weights_are_those_of_the_equation():
    hidden, annotations, mask = inputs(2, 3, 5, seed=1)
    attention = attention_of("additive")
    context, alpha, *_ = attention(hidden, attention.keys(annotations), annotations, mask)
    for i in range(2):
        for r in range(3):
            weights = additive_by_hand(attention, hidden[i, r], annotations[i], mask[i])
            assert torch.allclose(alpha[i, r, 0], weights, atol=1e-6)
            assert torch.allclose(context[i, r], (weights[:, None] * annotations[i]).sum(dim=0), atol=1e-5)


def additive_by_hand(attention, h, a, mask):
    """softmax(v . tanh(W a_i + b + U h)), one region at a time."""
    W, b, U, v = attention.W.weight, attention.W.bias, attention.U.weight, attention.v.weight[0]
    scores = [math.exp(float(v @ torch.tanh(W @ a[k] + b + U @ h))) if mask[k] else 0.0 for k in range(len(a))]
    return torch.tensor(scores) / sum(scores)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dot", "scaled_dot"])
def test_products_are_torchs_scaled_dot_product_attention(name):
    hidden, annotations, mask = inputs(2, 3, 5, seed=2)
    attention = attention_of(name)
    context, alpha, *_ = attention(hidden, attention.keys(annotations), annotations, mask)
    expected = nn.functional.scaled_dot_product_attention(
        attention.U(hidden),
        attention.W(annotations),
        annotations,
        attn_mask=mask[:, None, :],
        scale=1.0 if name == "dot" else None,
    )
    assert torch.allclose(context, expected, atol=1e-5)
    assert torch.allclose(alpha[:, :, 0] @ annotations, expected, atol=1e-5)


@torch.no_grad()
def test_several_heads_are_torchs_multi_head_attention():
    size, heads = 12, 3
    torch.manual_seed(3)
    ours = build_attention("multi_head", channels=size, hidden_size=size, attention_size=size, options={"heads": heads})
    theirs = nn.MultiheadAttention(size, heads, batch_first=True)
    theirs.in_proj_weight.copy_(torch.cat([ours.U.weight, ours.W.weight, ours.V.weight]))
    theirs.in_proj_bias.copy_(torch.cat([ours.U.bias, torch.zeros(size), ours.V.bias]))
    theirs.out_proj.load_state_dict(ours.O.state_dict())
    hidden, annotations = torch.randn(2, 4, size), torch.randn(2, 7, size)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 3:] = False
    context, alpha, *_ = ours(hidden, ours.keys(annotations), annotations, mask)
    expected, maps = theirs(hidden, annotations, annotations, key_padding_mask=~mask, average_attn_weights=False)
    assert torch.allclose(context, expected, atol=1e-5)
    assert torch.allclose(alpha, maps.transpose(1, 2), atol=1e-6)


def test_no_attention_gives_the_mean_of_the_valid_regions():
    hidden, annotations, mask = inputs(2, 3, 5, seed=5)
    attention = attention_of("none")
    context = attention(hidden, attention.keys(annotations), annotations, mask).context
    for i in range(2):
        assert torch.allclose(context[i], annotations[i][mask[i]].mean(dim=0).expand(3, -1), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("inference", ["argmax", "expectation"])
def test_hard_attention_uses_one_region_or_the_expectation(inference):
    hidden, annotations, mask = inputs(2, 3, 5, seed=6)
    attention = attention_of("hard", inference=inference).eval()
    context, alpha, choice, *_ = attention(hidden, attention.keys(annotations), annotations, mask)
    assert choice is None
    for i in range(2):
        for r in range(3):
            weights = additive_by_hand(attention, hidden[i, r], annotations[i], mask[i])
            if inference == "argmax":
                weights = nn.functional.one_hot(weights.argmax(), 5).float()
            assert torch.allclose(alpha[i, r, 0], weights, atol=1e-6)
            assert torch.allclose(context[i, r], weights @ annotations[i], atol=1e-5)


@torch.no_grad()
def test_hard_attention_draws_a_region_by_its_weight_and_half_of_the_images_use_the_expectation():
    hidden, annotations, mask = (x[:1].expand(4000, *x.shape[1:]) for x in inputs(1, 2, 4, seed=9))
    attention = attention_of("hard").train()
    torch.manual_seed(0)
    context, alpha, choice, regions, _ = attention(hidden, attention.keys(annotations), annotations, mask)
    drawn = choice[:, 0] < 0
    assert regions[:, 0].ge(0).equal(drawn)
    assert drawn.eq(choice[:, 1] < 0).all()  # decided once per image
    assert 0.45 < drawn.float().mean() < 0.55
    assert torch.allclose(context[~drawn], alpha[~drawn, :, 0] @ annotations[~drawn], atol=1e-6)
    same = (context[drawn, 0, None] - annotations[drawn]).abs().amax(dim=2) < 1e-6
    assert (same.sum(dim=1) == 1).all()
    region = same.float().argmax(dim=1, keepdim=True)
    assert torch.allclose(alpha[drawn, 0, 0].gather(1, region).log().squeeze(1), choice[drawn, 0], atol=1e-5)
    assert torch.allclose(same.float().mean(dim=0), alpha[0, 0, 0], atol=0.04)


def toy(images: int, entropy: float = 0.0):
    """One word for images with three regions, of which only the last one shows it."""
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 3.0]])
    annotations = logits.expand(images, 3, 3)
    hidden = torch.ones(images, 1, 2)
    torch.manual_seed(1)
    sizes = {"channels": 3, "hidden_size": 2, "attention_size": 4}
    return HardAttention(**sizes, reinforce=1.0, entropy=entropy).double().train(), annotations, hidden


def toy_output(attention, annotations, hidden):
    context, alpha, choice, *_ = attention(hidden, attention.keys(annotations), annotations)
    images = len(context)
    targets = torch.full((images,), 2)
    mask = torch.ones(images, 1, 1, dtype=torch.bool)
    return TeacherForced(context[:, 0], targets, alpha[:, :, None], mask, choice[:, :, None])


def toy_loss(attention, output, baseline):
    images = len(output.targets)
    return caption_loss(output, images, images, 0.0, 0.0) + attention.extra_loss(output, images, baseline)


@pytest.mark.parametrize("baseline", [0.0, -1.5])
def test_the_drawn_gradient_is_the_exact_one_in_expectation(baseline):
    images = 200_000
    attention, annotations, hidden = toy(images)
    annotations, hidden = annotations.double(), hidden.double()
    loss = toy_loss(attention, toy_output(attention, annotations, hidden), baseline)
    drawn = torch.autograd.grad(loss, list(attention.parameters()))

    attention.eval()
    scores = attention.scores(hidden[:1], attention.keys(annotations[:1])[..., :-1])
    alpha = scores.softmax(dim=-1)[0, 0]
    by_region = annotations[0].log_softmax(dim=-1)[:, 2]
    by_expectation = (alpha @ annotations[0]).log_softmax(dim=-1)[2]
    objective = -(alpha @ by_region + by_expectation) / 2
    exact = torch.autograd.grad(objective, list(attention.parameters()))
    assert max(part.abs().max() for part in exact) > 0.05
    for ours, theirs in zip(drawn, exact, strict=True):
        assert torch.allclose(ours, theirs, atol=0.01 * max(float(part.abs().max()) for part in exact))


def test_hard_attention_finds_the_informative_region():
    attention, annotations, hidden = toy(64)
    annotations, hidden = annotations.double(), hidden.double()
    optimiser = torch.optim.Adam(attention.parameters(), lr=0.05)
    baseline = None
    for _ in range(100):
        output = toy_output(attention, annotations, hidden)
        optimiser.zero_grad()
        toy_loss(attention, output, baseline).backward()
        optimiser.step()
        now = float(output.log_probabilities().detach().mean())
        baseline = now if baseline is None else 0.9 * baseline + 0.1 * now
    assert toy_output(attention, annotations, hidden).alpha[0, 0, 0, 0, 2].item() > 0.9


def test_the_entropy_term_spreads_the_weights():
    attention, annotations, hidden = toy(64, entropy=10.0)
    nn.init.normal_(attention.v.weight, std=4.0)
    annotations, hidden = annotations.double(), hidden.double()
    optimiser = torch.optim.Adam(attention.parameters(), lr=0.05)

    def entropy():
        alpha = toy_output(attention, annotations, hidden).alpha[0, 0, 0, 0].detach()
        return float(-(alpha * alpha.log()).sum())

    assert entropy() < 1.0
    for _ in range(100):
        optimiser.zero_grad()
        toy_loss(attention, toy_output(attention, annotations, hidden), None).backward()
        optimiser.step()
    assert entropy() == pytest.approx(math.log(3), abs=0.01)


@pytest.mark.parametrize("name", MECHANISMS)
def test_rows_that_share_an_image_get_what_each_would_get_alone(name):
    hidden, annotations, mask = inputs(1, 4, 7, seed=2)
    attention = attention_of(name).eval()
    together = attention(hidden, attention.keys(annotations), annotations, mask)
    for row in range(4):
        alone = attention(hidden[:, row : row + 1], attention.keys(annotations), annotations, mask)
        assert torch.allclose(together.alpha[:, row : row + 1], alone.alpha, atol=1e-6)
        assert torch.allclose(together.context[:, row : row + 1], alone.context, atol=1e-5)


def test_hard_attention_by_expectation_is_additive_attention():
    hidden, annotations, mask = inputs(2, 3, 5, seed=6)
    hard = attention_of("hard", inference="expectation").eval()
    soft = AdditiveAttention(**SIZES)
    soft.load_state_dict(hard.state_dict())
    for ours, theirs in zip(
        hard(hidden, hard.keys(annotations), annotations, mask)[:2],
        soft(hidden, soft.keys(annotations), annotations, mask)[:2],
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_an_unknown_mechanism_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"additive.*multi_head"):
        build_attention("telepathy", **SIZES, options={})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("multi_head", {"heads": 3}, "attention_size 4 cannot be divided into 3 heads"),
        ("multi_head", {"heads": "2"}, "'heads' of attention 'multi_head' should be a int, not '2'"),
        ("multi_head", {"heads": True}, "should be a int, not True"),
        ("multi_head", {"inference": "argmax"}, "attention 'multi_head' has no option 'inference'; it has heads"),
        ("additive", {"heads": 2}, "attention 'additive' has no option 'heads'; it has none at all"),
        ("hard", {"inference": "guess"}, "'guess'"),
    ],
)
def test_sizes_and_names_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_attention(name, **SIZES, options=options)


def test_options_are_read_from_texts_and_the_others_have_their_defaults():
    assert parse_options("multi_head", []) == {"heads": 8}
    assert parse_options("multi_head", ["heads=4"]) == {"heads": 4}
    assert parse_options("hard", ["reinforce=1", "inference=expectation"]) == {
        "inference": "expectation",
        "reinforce": 1.0,
        "entropy": 0.01,
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("telepathy", "x=1", "no attention mechanism 'telepathy'; choose one of"),
        ("dot", "heads=2", "attention 'dot' has no option 'heads'; it has none at all"),
        ("multi_head", "heads=many", "'heads' of attention 'multi_head' should be a int, not 'many'"),
        ("multi_head", "heads", "'heads' of attention 'multi_head' should be a int, not ''"),
    ],
)
def test_texts_that_are_no_options_are_refused(name, text, message):
    with pytest.raises(ValueError, match=message):
        parse_options(name, [text])


def test_the_mechanism_in_the_readme_is_all_that_it_takes_to_add_one(monkeypatch):
    monkeypatch.setattr("captioner.network.attention.MECHANISMS", dict(MECHANISMS))
    (code,) = re.findall(r"```python\n(@register\n.*?)```", README.read_text("utf-8"), re.DOTALL)
    scope = {"Attention": Attention, "register": register, "nn": nn}
    exec(code, scope)
    for decoder in ("lstm", "transformer"):
        sizes = {"decoder": decoder, "hidden_size": 8, "heads": 2}
        model = small_model(attention="cosine", attention_options={"sharpness": 3.0}, **sizes).train()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        captions = torch.tensor([[[START, 7, 8, END]]]).expand(2, 1, 4)
        losses = []
        for _ in range(2):
            torch.manual_seed(0)  # the same dropout
            output = model(torch.randn(2, 6, model.encoder.channels), captions)
            loss = caption_loss(output, 6, 2, 0.0, 0.0) + model.decoder.attention.extra_loss(output, 6, None)
            losses.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            assert model.decoder.attention.query.weight.grad.abs().sum() > 0
            optimiser.step()
        assert losses[1] < losses[0]
        model.eval()
        annotations = torch.randn(2, 6, model.config.annotation_size)
        found = beam_search(model.decoder, annotations, beam_size=3, max_length=5)
        weights = found.alpha[found.words != 0]
        assert torch.allclose(weights.sum(dim=-1), torch.ones_like(weights[..., 0]), atol=1e-5)
        assert parse_options("cosine", []) == {"sharpness": 10.0}
    with pytest.raises(ValueError, match="there is an attention mechanism 'cosine' already"):
        register(scope["CosineAttention"])


@pytest.mark.parametrize(("images", "rows"), [(3, 2), (2, 1), (0, 2)])
def test_additive_scores_in_training_are_those_of_the_equation_with_its_gradients(images, rows):
    attention = attention_of("additive").double()
    hidden, annotations, _ = inputs(images, rows, 7, seed=5)
    hidden, annotations = hidden.double().requires_grad_(), annotations.double().requires_grad_()
    weight = torch.randn(images, rows, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    tensors = [hidden, annotations, *attention.parameters()]
    scores = attention.scores(hidden, attention.keys(annotations))
    matched = torch.tanh(attention.W(annotations)[:, None] + attention.U(hidden)[:, :, None])
    expected = attention.v(matched).squeeze(-1)
    assert torch.allclose(scores, expected, atol=1e-12)
    found = torch.autograd.grad((scores * weight).sum(), tensors)
    for ours, theirs in zip(found, torch.autograd.grad((expected * weight).sum(), tensors), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)
    with torch.no_grad():
        assert torch.allclose(attention.scores(hidden, attention.keys(annotations)), expected, atol=1e-12)


def test_additive_scores_under_autocast_have_the_type_of_the_weights():
    attention = attention_of("additive")
    hidden, annotations, _ = inputs(2, 3, 7, seed=5)
    expected = attention.scores(hidden, attention.keys(annotations))
    with torch.autocast("cpu", torch.bfloat16):
        scores = attention.scores(hidden, attention.keys(annotations))
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, expected, atol=0.2)
    scores.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in attention.parameters() if weight is not attention.W.bias)
