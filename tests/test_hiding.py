"""Regions hidden from attention: by name, and one after the other to measure what each word rests on."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import PHOTOS, small_captioner, small_model
from PIL import Image

from captioner import ImageError, hiding
from captioner.engine import Step
from captioner.explain import explain
from captioner.hiding import covered_by, measure_evidence, windows
from captioner.vocabulary import END, PAD, START, UNKNOWN

CAT = PHOTOS / "cat.jpg"
RED, BLUE = UNKNOWN + 1, UNKNOWN + 2
MECHANISMS = ("none", "additive", "hard", "dot", "scaled_dot", "multi_head")


@pytest.fixture(scope="module")
def seeing():
    """A captioner with random weights whose annotation vectors differ by region and by image."""
    captioner = small_captioner()
    captioner.model.encoder.displacement = 0.0
    with torch.no_grad():
        for weights in captioner.model.decoder.parameters():
            weights.mul_(3)

    def annotate(images):
        generators = (torch.Generator().manual_seed(int(np.abs(image).sum())) for image in images)
        return torch.stack([torch.randn(6, 12, generator=generator).relu() for generator in generators])

    captioner.engine.annotate = annotate
    return captioner


class Nothing(NamedTuple):
    """A state."""

    none: np.ndarray


class Seen(NamedTuple):
    """A memory."""

    annotations: np.ndarray
    mask: np.ndarray


class RedOrBlue:
    """A decoder that says red with the probability sigmoid(s), s the sum over the regions that it may use, or blue."""

    heads = 1

    def encode(self, annotations, mask):
        return Seen(annotations, mask)

    def initial_state(self, memory, rows):
        return Nothing(np.zeros((len(memory.mask), rows, 1)))

    def step(self, memory, state, tokens):
        logits = np.zeros((*tokens.shape, BLUE + 1), np.float32)
        logits[..., END] = -1e4
        logits[..., RED] = (memory.annotations[..., 0] * memory.mask).sum(axis=1)[:, None]
        return Step(logits, state, np.zeros((*tokens.shape, 1, memory.mask.shape[1]), np.float32))


@pytest.mark.parametrize("batch", [1, 10, 10**6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("grid", "window"), [((2, 3), 3), ((4, 5), 3), ((4, 5), 1), ((4, 5), 5)])
def test_evidence_is_the_fall_of_the_log_probability_without_a_window(monkeypatch, grid, window, masked, batch):
    monkeypatch.setattr(hiding, "MAX_NUMBERS", batch * grid[0] * grid[1])
    numbers = np.random.default_rng(0)
    values = numbers.normal(size=(2, *grid)).astype(np.float32)
    usable = numbers.random((2, *grid)) < 0.7 if masked else np.ones((2, *grid), dtype=bool)
    words = np.array([[RED, BLUE, RED], [BLUE, BLUE, PAD]])
    mask = usable.reshape(2, -1) if masked else None
    found = measure_evidence(RedOrBlue(), values.reshape(2, -1, 1), words, grid, window, mask)
    assert found.shape == (2, 3, *grid)
    assert found.dtype == np.float32
    reach = window // 2
    for image, (row, column) in ((image, place) for image in range(2) for place in np.ndindex(grid)):
        seen = values[image] * usable[image]
        left = seen.copy()
        left[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1] = 0
        for step, word in enumerate(words[image]):
            sign = {RED: 1, BLUE: -1, PAD: 0}[word]
            fall = np.logaddexp(0, -sign * left.sum()) - np.logaddexp(0, -sign * seen.sum())
            expected = max(fall, 0) if usable[image, row, column] else 0
            assert found[image, step, row, column] == pytest.approx(expected, abs=1e-5)
    assert (found[0] > 0.01).any()


@pytest.mark.parametrize("decoder", ["lstm", "transformer"])
@pytest.mark.parametrize("attention", MECHANISMS)
@pytest.mark.parametrize("window", [3, 5, 7])  # 5 hides all regions around some of them, 7 around each
def test_every_decoder_and_mechanism_is_measured_by_its_own_mask(decoder, attention, window):
    heads = {} if attention != "multi_head" else {"attention_options": {"heads": 3}}
    net = small_model(30, decoder=decoder, attention=attention, attention_size=12, heads=3, **heads).decoder
    with torch.no_grad():
        for weights in net.parameters():
            weights.mul_(3)
    annotations = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(1)).relu()
    words = torch.tensor([[7, 9, 12, END], [8, 5, END, PAD]])
    found = measure_evidence(net, annotations, words, (3, 4), window)
    everything = torch.ones(12, dtype=torch.bool)

    def chosen(mask, state, tokens, t):
        """The step before word t, and the word's log-probability."""
        visible = (annotations, mask) if mask.any() else (0 * annotations, everything)
        step = net.step(net.encode(visible[0], visible[1].expand(2, -1)), state, tokens)
        logits = step.logits[:, 0].index_fill(-1, torch.tensor([PAD, START, UNKNOWN]), -torch.inf)
        return step, logits.log_softmax(dim=-1)[torch.arange(2), words[:, t]].numpy()

    with torch.no_grad():
        state = net.initial_state(net.encode(annotations, everything.expand(2, -1)), 1)
        tokens = torch.full((2, 1), START)
        for t in range(4):
            step, whole = chosen(everything, state, tokens, t)
            state_before, before, tokens = state, tokens, words[:, t, None]
            state, said = step.state, (tokens[:, 0] != PAD).numpy()
            assert not found[~said, t].any()
            if t == 0:  # before the first word a search rules out the end too
                continue
            for region, hidden in enumerate(torch.from_numpy(windows((3, 4), window))):
                _, without = chosen(~hidden, state_before, before, t)
                falls = (whole[said] - without[said]).clip(0)
                assert np.allclose(found[said, t].reshape(-1, 12)[:, region], falls, atol=1e-4)
    assert found.max() > 0.01


def test_windows_are_squares_cut_off_at_the_edges():
    shown = windows((3, 4), 3).reshape(3, 4, 3, 4)
    assert shown[0, 0].tolist() == [[True, True, False, False]] * 2 + [[False] * 4]
    assert shown[1, 2].tolist() == [[False, True, True, True]] * 3
    assert (windows((3, 4), 1) == np.eye(12, dtype=bool)).all()


def test_a_caption_has_the_evidence_of_its_words_alone_or_in_a_batch(seeing):
    found = seeing.caption([CAT, PHOTOS / "astronaut.jpg"], evidence=True, beam_size=3)
    for caption, path in zip(found, (CAT, PHOTOS / "astronaut.jpg"), strict=True):
        assert caption.evidence.shape == caption.attention.shape
        assert caption.evidence.dtype == np.float32
        assert (caption.evidence >= 0).all()
        forced = seeing.teacher_forced(path, caption.text, evidence=True)
        assert np.allclose(caption.evidence, forced.evidence, atol=1e-5)
        assert all(other.evidence is None for other in caption.alternatives)
    assert found[0].evidence.max() > 0.05
    fine = seeing.teacher_forced(CAT, found[0].text, evidence=True, evidence_window=1)
    assert np.abs(fine.evidence - found[0].evidence).max() > 0.05
    assert seeing.caption(CAT).evidence is None


def test_hidden_regions_have_neither_weight_nor_evidence(seeing):
    hide = np.array([[True, False, False], [False, False, True]])
    for found in (
        seeing.caption(CAT, hide=hide, evidence=True, keep_annotations=True),
        seeing.caption(CAT, attend=~hide, evidence=True, keep_annotations=True),
        seeing.teacher_forced(CAT, "word1 word2", hide=hide, evidence=True, keep_annotations=True),
    ):
        assert (found.mask == ~hide).all()
        assert (found.attention[:, hide] == 0).all()
        assert np.allclose(found.attention.sum(axis=(1, 2)), 1, atol=1e-5)
        assert (found.evidence[:, hide] == 0).all()
        steps = explain(seeing, found)
        assert np.allclose([step.weights for step in steps[: len(found.words)]], found.attention, atol=1e-6)
    assert seeing.caption(CAT).mask is None


def test_hidden_regions_change_what_a_caption_is_worth(seeing):
    everything, without = (
        seeing.teacher_forced(CAT, "word1 word2", hide=hide) for hide in (None, windows((2, 3), 1)[0].reshape(2, 3))
    )
    assert everything.log_probability != pytest.approx(without.log_probability, abs=0.01)


def test_boxes_are_those_of_each_upright_photograph(seeing, tmp_path):
    cells = Image.new("RGB", (90, 60), "red")
    cells.save(tmp_path / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    cells.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif)
    twice = cells.resize((180, 120))
    paths = [tmp_path / "wide.png", tmp_path / "turned.jpg", twice]
    # The right third of the upper half; of the picture twice as large, the middle of the upper left quarter.
    wide, turned, large = seeing.caption(paths, hide=(60, 0, 30, 30), attend=[(0, 0, 90, 30), (0, 30, 30, 30)])
    assert wide.mask.tolist() == turned.mask.tolist() == [[True, True, False], [True, False, False]]
    assert large.mask.tolist() == [[True, False, False], [False, False, False]]


@pytest.mark.parametrize(
    ("box", "regions"),
    [
        ((0, 0, 40, 30), {(0, 0)}),
        ((0, 0, 120, 30), {(0, 0), (0, 1), (0, 2)}),
        ((20, 0, 40, 30), {(0, 0), (0, 1)}),  # half of each
        ((25, 0, 40, 30), {(0, 1)}),
        ((100, 40, 10, 10), {(1, 2)}),  # half of none
        ((-50, -50, 500, 500), {(row, column) for row in range(2) for column in range(3)}),
    ],
)
def test_a_box_stands_for_the_cells_it_covers_by_half_or_the_one_it_covers_most(box, regions):
    found = covered_by(np.array(box, float), (120, 60), (2, 3), (0.0, 0.0))
    assert set(map(tuple, np.argwhere(found))) == regions


def test_cells_are_displaced_as_heatmaps_are():
    # Up by half a cell and left by a quarter: columns 0 to 30, 30 to 70, 70 to 120; rows 0 to 15, 15 to 60.
    def cover(*box):
        return covered_by(np.array(box, float), (120, 60), (2, 3), (0.25, 1 / 12)).tolist()

    assert cover(0, 0, 30, 15) == [[True, False, False], [False] * 3]
    assert cover(30, 15, 40, 45) == [[False] * 3, [False, True, False]]
    assert cover(70, 0, 50, 60) == [[False, False, True]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hide": np.ones((3, 2), bool)}, "hide must be a Boolean grid of 2 x 3 regions, or boxes in pixels"),
        ({"hide": (1, 2, 3)}, "hide must be"),
        ({"attend": "left"}, "attend must be"),
        ({"attend": [(1, 2, 3, 4), (5, 6)]}, "attend must be"),
        ({"hide": (0, 0, 0, 5)}, "hide must be"),
        ({"hide": (0, 0, float("nan"), 5)}, "hide must be"),
        ({"evidence": True, "evidence_window": 2}, "evidence_window must be odd, not 2"),
        ({"evidence_window": 0}, "evidence_window must be a whole number from 1"),
    ],
)
def test_regions_and_windows_that_make_no_sense_are_refused_at_once(seeing, options, message):
    for call in (lambda: seeing.stream([], **options), lambda: seeing.teacher_forced(CAT, "word1", **options)):
        with pytest.raises(ValueError, match=message):
            call()


def test_an_image_of_which_nothing_would_be_left_is_named_and_the_rest_goes_on(seeing):
    little, large = Image.new("RGB", (90, 60), "red"), Image.new("RGB", (900, 600), "red")
    found = seeing.caption([little, large], hide=(0, 0, 90, 60), errors="return")
    assert str(found[0]) == "<RGB image of 90 x 60>: hide and attend leave attention none of the 2 x 3 regions"
    assert found[1].mask.sum() == 5
    found = seeing.caption([little, large], hide=(100, 0, 90, 60), errors="return")
    assert str(found[0]).endswith("the box (100, 0, 90, 60) lies outside the photograph of 90 x 60 pixels")
    with pytest.raises(ImageError, match="none of the 2 x 3 regions"):
        seeing.caption(CAT, hide=np.ones((2, 3), dtype=bool))
    with pytest.raises(ImageError, match="none of the 2 x 3 regions"):
        seeing.teacher_forced(CAT, "word1", attend=[])
    assert seeing.caption(CAT, hide=[]).mask.all()


def test_pictures_and_data_may_be_of_evidence(seeing):
    found = seeing.caption(CAT, evidence=True)
    word = int(found.evidence.max(axis=(1, 2)).argmax())
    assert (found.maps(of="evidence") == found.evidence).all()
    for draw in (
        lambda of: found.heatmap(word, of=of),
        lambda of: found.figure(of=of),
        lambda of: found.animation(of=of)[word],
    ):
        assert draw("evidence").tobytes() != draw("attention").tobytes()
    plain = found.to_dict(attention=True)
    assert np.allclose(plain["evidence"], found.evidence)
    without = seeing.caption(CAT)
    assert "evidence" not in without.to_dict(attention=True)
    with pytest.raises(ValueError, match="has no evidence; make it with evidence=True"):
        without.figure(of="evidence")
    with pytest.raises(ValueError, match="leave head out"):
        found.maps(0, of="evidence")
    with pytest.raises(ValueError, match="no maps of 'love'; choose attention or evidence"):
        found.heatmap(0, of="love")


def test_pictures_show_which_part_was_hidden(seeing):
    plain, found = seeing.caption(CAT), seeing.caption(CAT, hide=[(0, 0, 90, 80)])
    assert found.mask.sum() < found.mask.size
    photo, covered = np.asarray(found.image), np.asarray(found.covered(found.image))
    grey = (covered != photo).any(axis=-1)
    rows, columns = found.mask.shape
    for row, column in np.ndindex(rows, columns):
        centre = grey[round((row + 0.5) / rows * len(grey)), round((column + 0.5) / columns * len(grey[0]))]
        assert centre == (not found.mask[row, column])
    assert (covered[grey] == 128).all()
    assert np.array_equal(np.asarray(found.figure())[30:60, :60], np.full((30, 60, 3), 128))
    assert (np.asarray(found.heatmap(0, strength=0.0))[:20, :20] == 128).all()
    assert plain.covered(plain.image) is plain.image


def test_a_caption_is_captioned_again_without_the_encoder(small, monkeypatch):
    photos = [CAT, PHOTOS / "photographer.jpg"]
    first = small.caption(photos[0], keep_annotations=True)
    expected = small.caption(photos, hide=(0, 0, 300, 200), evidence=True)
    encoded = []
    annotate = small.engine.annotate
    monkeypatch.setattr(small.engine, "annotate", lambda images: encoded.append(len(images)) or annotate(images))
    again = small.caption(first, hide=(0, 0, 300, 200), evidence=True)
    assert encoded == []
    assert again == expected[0]
    assert np.array_equal(again.mask, expected[0].mask)
    assert np.allclose(again.evidence, expected[0].evidence, atol=1e-6)
    assert (again.source, again.size) == (str(CAT), expected[0].size)
    assert small.caption([first, photos[1]], hide=(0, 0, 300, 200)) == expected  # one of each
    assert encoded == [1]
    assert small.teacher_forced(first, "word1 word2") == small.teacher_forced(CAT, "word1 word2")


def test_a_caption_without_annotation_vectors_cannot_be_captioned_again(small):
    with pytest.raises(ImageError, match="no annotation vectors; make it with keep_annotations=True"):
        small.caption(small.caption(CAT))
    kept = small.caption(CAT, keep_annotations=True)
    with pytest.raises(ImageError, match=r"cat.jpg: the box \(9999, 0, 1, 1\) lies outside"):
        small.caption(kept, hide=(9999, 0, 1, 1))
