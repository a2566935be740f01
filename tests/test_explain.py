"""Attention that is changed at a step, and words without what they looked at most."""

import numpy as np
import pytest
import torch
from conftest import PHOTOS, small_model

from captioner import Captioner
from captioner.checkpoint import Checkpoint
from captioner.explain import explain, without_most_attended

PHOTO = PHOTOS / "cat.jpg"
SIZES = {"annotation_size": 12, "hidden_size": 12, "attention_size": 12}
TWO = {"attention": "multi_head", "attention_options": {"heads": 2}}


def captioner_of(small, **changes) -> Captioner:
    network = small_model(len(small.vocabulary), **(SIZES | changes))
    with torch.no_grad():
        for weights in network.decoder.parameters():
            weights.mul_(3)  # so that regions and words differ
    captioner = Captioner(Checkpoint(network, small.vocabulary, small.preprocessing))
    vectors = torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(0)).relu()
    captioner.engine.annotate = lambda images: vectors.expand(len(images), -1, -1)
    return captioner


def same(ours, theirs) -> bool:
    return np.allclose([p for _, p in ours.candidates], [p for _, p in theirs.candidates], atol=1e-5) and (
        [word for word, _ in ours.candidates] == [word for word, _ in theirs.candidates]
    )


@pytest.mark.parametrize("hide", [None, (0, 0, 200, 200)])
@pytest.mark.parametrize("attention", ["additive", "dot", "scaled_dot"])
def test_a_temperature_of_one_is_attention_as_it_is(small, attention, hide):
    model = captioner_of(small, attention=attention)
    caption = model.caption(PHOTO, max_length=5, keep_annotations=True, hide=hide)
    for plain, changed in zip(explain(model, caption), explain(model, caption, temperature=1), strict=True):
        assert np.allclose(plain.weights, changed.weights, atol=1e-6)
        assert same(plain, changed)


def test_a_step_has_the_maps_of_each_head_and_the_weights_over_the_words_read(small):
    model = captioner_of(small, decoder="transformer", heads=3, **TWO)
    caption = model.caption(PHOTO, max_length=5, keep_annotations=True)
    decoder, ids = model.model.decoder, small.vocabulary.encode(caption.words)
    with torch.no_grad():
        memory = decoder.encode(torch.from_numpy(caption.annotations)[None])
        state = decoder.initial_state(memory, 1)
        for one, token in zip(explain(model, caption), ids, strict=False):
            step = decoder.step(memory, state, torch.tensor([[token]]))
            state = step.state
            assert np.allclose(one.word_weights, step.word_alpha[0, 0], atol=1e-6)
            assert np.allclose(one.head_weights.reshape(4, 6), step.alpha[0, 0], atol=1e-6)
            assert np.allclose(one.head_weights.mean(axis=0), one.weights, atol=1e-6)
            assert np.allclose(one.word_weights.sum(axis=2), 1, atol=1e-5)
            assert one.to_dict()["word_weights"] == one.word_weights.tolist()
    assert one.word_weights.shape == (2, 3, len(caption.words))
    lstm = explain(captioner_of(small), captioner_of(small).caption(PHOTO, max_length=2, keep_annotations=True))[0]
    assert lstm.word_weights is lstm.head_weights is None


def test_a_changed_step_of_a_transformer_reads_the_words_anew(small):
    model = captioner_of(small, decoder="transformer", heads=2)
    caption = model.caption(PHOTO, max_length=5, keep_annotations=True)
    for plain, changed in zip(
        explain(model, caption)[2:], explain(model, caption, temperature=np.inf)[2:], strict=True
    ):
        assert np.allclose(plain.word_weights[0], changed.word_weights[0], atol=1e-6)  # before it looks at the photo
        assert not np.allclose(plain.word_weights[1], changed.word_weights[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("temperature", [0.25, 3])
def test_a_temperature_divides_the_scores_as_in_the_network_itself(small, temperature):
    model = captioner_of(small)
    caption = model.caption(PHOTO, max_length=5, keep_annotations=True)
    (changed, second, *_) = explain(model, caption, temperature=temperature)
    plain = explain(model, caption)
    assert np.array_equal(changed.scores, plain[0].scores)
    assert np.array_equal(second.scores, plain[1].scores)  # the step before passed on what it would have
    with torch.no_grad():
        model.model.decoder.attention.v.weight.div_(temperature)
    other = explain(model, caption)[0]  # the first step has the same state
    assert np.allclose(changed.weights, other.weights, atol=1e-6)
    assert same(changed, other)
    assert not same(changed, plain[0])


def test_from_one_region_to_an_even_map(small):
    model = captioner_of(small)
    caption = model.caption(PHOTO, max_length=5, keep_annotations=True, hide=np.eye(2, 3, dtype=bool))
    for one in explain(model, caption, temperature=0):
        assert sorted(one.weights.ravel()) == [0, 0, 0, 0, 0, 1]
        usable = np.where(caption.mask, one.scores, -np.inf)
        assert one.weights.argmax() == usable.argmax()
        assert one.entropies == (0,)
    for one in explain(model, caption, temperature=np.inf):
        assert np.allclose(one.weights, caption.mask / 4)


@pytest.mark.parametrize("changes", [{}, TWO, {"decoder": "transformer", "heads": 2}, {"attention": "none"}])
def test_to_look_everywhere_is_to_read_the_mean_annotation_vector(small, changes):
    model = captioner_of(small, **changes)
    caption = model.caption(PHOTO, max_length=5, keep_annotations=True)
    everywhere = explain(model, caption, temperature=np.inf)
    mean = torch.from_numpy(caption.annotations).mean(dim=0).expand(1, *caption.annotations.shape)
    decoder = model.model.decoder
    with torch.no_grad():
        memory = decoder.encode(mean)
        step = decoder.step(memory, decoder.initial_state(memory, 1), torch.tensor([[1]]))
    expected = caption.distribution.log_probabilities(step.logits, torch.zeros(1, 1, 0, dtype=torch.long)).exp()
    top = expected[0, 0].topk(8).values.tolist()
    assert [p for _, p in everywhere[0].candidates] == pytest.approx(top, abs=1e-5)
    assert np.allclose(everywhere[0].weights, 1 / 6)


def test_to_look_nowhere_is_to_close_the_gate(small):
    model = captioner_of(small)
    caption = model.caption(PHOTO, max_length=5, keep_annotations=True)
    nowhere = explain(model, caption, context=False)
    assert {one.beta for one in nowhere} == {0}
    assert not same(nowhere[0], explain(model, caption)[0])
    with torch.no_grad():
        model.model.decoder.beta.weight.zero_()
        model.model.decoder.beta.bias.fill_(-100)
    assert same(nowhere[0], explain(model, caption)[0])


def test_the_engines_agree_on_changed_attention():
    """With the model that has graphs, whose large matrices have 8 bits; the other tests compute with torch."""
    onnx, other = Captioner.from_pretrained("small"), Captioner.from_pretrained("small", engine="torch")
    caption = onnx.caption(PHOTO, keep_annotations=True, beam_size=1)
    for options in ({"temperature": 0.5}, {"temperature": np.inf}, {"context": False}):
        for ours, theirs in zip(explain(onnx, caption, **options), explain(other, caption, **options), strict=True):
            assert np.allclose(ours.weights, theirs.weights, atol=5e-3)
            ours_most, theirs_most = ([probability for _, probability in each.candidates] for each in (ours, theirs))
            assert ours_most == pytest.approx(theirs_most, abs=0.02)
    assert without_most_attended(onnx, caption, 7) == pytest.approx(without_most_attended(other, caption, 7), abs=0.02)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"temperature": -1}, "temperature must be 0 or above, not -1"),
        ({}, {"temperature": float("nan")}, "temperature must be 0 or above"),
        (TWO, {"temperature": 2}, "several heads"),
        (TWO, {"context": False}, "one head"),
        ({"decoder": "transformer", "heads": 2}, {"context": False}, "context gate"),
    ],
)
def test_what_cannot_be_changed_is_refused(small, changes, options, message):
    model = captioner_of(small, **changes)
    caption = model.caption(PHOTO, max_length=3, keep_annotations=True)
    with pytest.raises(ValueError, match=message):
        explain(model, caption, **options)


@pytest.mark.parametrize("hide", [None, np.eye(2, 3, dtype=bool)])
@pytest.mark.parametrize("changes", [{}, TWO])
def test_a_word_without_the_regions_that_it_looked_at_most(small, changes, hide):
    model = captioner_of(small, **changes)
    text = " ".join(small.vocabulary.words[number] for number in (5, 9, 5, 7))
    caption = model.teacher_forced(PHOTO, text, keep_annotations=True, hide=hide)
    found = without_most_attended(model, caption, 2)
    for number, weights in enumerate(caption.attention):
        most = np.argsort(-weights.ravel(), kind="stable")[:2]
        hidden = np.zeros(6, dtype=bool)
        hidden[most] = True
        hidden = hidden.reshape(2, 3) if hide is None else hidden.reshape(2, 3) | hide
        expected = model.teacher_forced(PHOTO, text, hide=hidden).word_log_probabilities[number]
        assert np.log(found[number]) == pytest.approx(expected, abs=1e-5)


def test_attention_is_left_a_region(small):
    model = captioner_of(small)
    caption = model.caption(PHOTO, max_length=4, keep_annotations=True)
    assert np.isfinite(without_most_attended(model, caption, 99)).all()
    only = model.caption(
        PHOTO, max_length=4, keep_annotations=True, attend=np.eye(2, 3, dtype=bool) & [True, False, False]
    )
    found = without_most_attended(model, only, 3)  # there is nothing to hide
    assert np.log(found) == pytest.approx(only.word_log_probabilities[: len(found)], abs=1e-5)


def test_annotation_vectors_are_needed(small):
    with pytest.raises(ValueError, match="keep_annotations=True"):
        without_most_attended(small, small.caption(PHOTO), 1)
