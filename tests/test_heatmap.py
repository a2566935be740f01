"""Heatmaps show where the weights are."""

import math

import numpy as np
import pytest
from PIL import Image, ImageSequence

from captioner.heatmap import (
    ANCHORS,
    amount,
    animation,
    colour_table,
    figure,
    legend,
    overlay,
    save_animation,
    scale_tops,
    shrink,
    upsample,
)

PHOTO = Image.new("RGB", (120, 80), (90, 90, 90))
WORDS = ["a", "dog", "runs"]


def one_hot(row, column, shape=(4, 6)):
    weights = np.zeros(shape, np.float32)
    weights[row, column] = 1
    return weights


@pytest.mark.parametrize("name", ANCHORS)
def test_colours_are_matplotlibs_to_a_few_levels(name):
    matplotlib = pytest.importorskip("matplotlib")
    expected = 255 * matplotlib.colormaps[name](np.arange(256))[:, :3]
    assert np.abs(colour_table(name) - expected).max() < 7


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 5), (3, 0), (2, 3)])
def test_the_brightest_place_is_where_the_weight_is(row, column):
    light = np.asarray(overlay(PHOTO, one_hot(row, column)).convert("L")).astype(int)
    y, x = np.unravel_index(light.argmax(), light.shape)
    assert (y // 20, x // 20) == (row, column)
    assert light.shape == (80, 120)


def test_what_is_not_looked_at_stays_recognisable():
    checks = Image.fromarray(np.tile(np.array([[40, 200], [200, 40]], np.uint8), (40, 60))).convert("RGB")
    far = np.asarray(overlay(checks, one_hot(0, 0)))[60:, 90:].astype(int)
    assert far.max() - far.min() > 50


def test_upsampled_weights_are_smooth_and_between_zero_and_one():
    heat = upsample(one_hot(1, 2), (120, 80))
    assert (heat.shape, heat.min(), heat.max()) == ((80, 120), 0, 1)
    assert np.abs(np.diff(heat, axis=1)).max() < 0.12


def test_a_displaced_map_moves_up_and_left_by_that_share_of_the_image():
    plain = upsample(one_hot(2, 3), (120, 80)).astype(float)
    moved = upsample(one_hot(2, 3), (120, 80), displacement=(0.125, 1 / 12)).astype(float)
    for heat, y, x in ((plain, 49.5, 69.5), (moved, 39.5, 59.5)):
        assert (heat.sum(axis=1) @ np.arange(80)) / heat.sum() == pytest.approx(y, abs=1)
        assert (heat.sum(axis=0) @ np.arange(120)) / heat.sum() == pytest.approx(x, abs=1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(4), r"shape \(rows, columns\), not \(4,\)"),
        (np.zeros((2, 2)), "above zero"),
        (-np.ones((2, 2)), "not negative"),
        (np.full((2, 2), np.nan), "finite"),
        (np.ones((0, 2)), "shape"),
    ],
)
def test_weights_that_are_no_map_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        overlay(PHOTO, weights)


def test_an_unknown_colour_map_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="viridis, magma, inferno"):
        overlay(PHOTO, one_hot(0, 0), colours="jet")


def test_a_figure_has_a_place_for_the_photo_and_every_word():
    attention = np.stack([one_hot(0, 0), one_hot(3, 5), one_hot(1, 2)])
    whole = figure(PHOTO, WORDS, attention, tile=120, columns=2)
    label = 14
    key = legend(2 * 120, label, regions=24, top=1.0)
    assert whole.size == (2 * 120 + 3, 2 * (80 + label + 3) + key.height)
    assert np.array_equal(np.asarray(whole.crop((0, label, 120, label + 80))), np.asarray(PHOTO))
    second = whole.crop((123, 80 + label + 3 + label, 243, 2 * (80 + label) + 3))
    assert np.array_equal(np.asarray(second), np.asarray(overlay(PHOTO, attention[2])))


@pytest.mark.parametrize("words", range(1, 20))
def test_the_last_row_of_a_figure_is_not_nearly_empty(words):
    tile, gap, line = 120, 3, 80 + 14 + 3
    whole = figure(PHOTO, ["word"] * words, np.stack([one_hot(0, 0)] * words), tile=tile)
    columns = (whole.width + gap) // (tile + gap)
    rows = math.ceil((words + 1) / columns)
    assert whole.height - rows * line < line  # the rest is the legend
    assert words + 1 - (rows - 1) * columns >= columns / 2


def spread(peak, shape=(4, 6)):
    """A map whose largest weight is `peak`, at (1, 2), and whose other weights are alike."""
    weights = np.full(shape, (1 - peak) / (shape[0] * shape[1] - 1), np.float32)
    weights[1, 2] = peak
    return weights


def brightness(picture):
    return np.asarray(picture.convert("L")).max()


def test_one_scale_for_the_caption_tells_an_even_map_from_a_sharp_one():
    attention = np.stack([spread(1 / 24), spread(0.3), spread(0.9)])
    assert scale_tops(attention, "caption") == pytest.approx([0.9] * 3)
    assert scale_tops(attention, "word") == pytest.approx([1 / 24, 0.3, 0.9])
    shown = {
        scale: [
            brightness(overlay(PHOTO, weights, largest=top))
            for weights, top in zip(attention, scale_tops(attention, scale), strict=True)
        ]
        for scale in ("caption", "word")
    }
    assert shown["caption"][0] < brightness(PHOTO) < shown["caption"][2]
    assert shown["caption"][0] < shown["caption"][1] < shown["caption"][2] - 20
    assert shown["word"] == [shown["caption"][2]] * 3


def test_a_map_on_a_scale_is_its_share_of_the_top():
    heat = upsample(spread(0.3), (120, 80), largest=0.9)
    assert heat.max() == pytest.approx(1 / 3)
    assert heat[-1, -1] == pytest.approx(0.7 / 23 / 0.9, abs=0.005)
    assert upsample(spread(0.3), (120, 80), largest=0.1).max() == 1


def test_an_unknown_scale_is_refused_with_those_there_are():
    attention = np.stack([one_hot(0, 0)] * 3)
    for draw in (figure, animation):
        with pytest.raises(ValueError, match="no scale 'image'; choose one of caption, word"):
            draw(PHOTO, WORDS, attention, scale="image")


def test_figures_and_animations_of_the_two_scales_differ_where_the_weights_do():
    attention = np.stack([spread(0.2), spread(0.9)])
    same, other = (figure(PHOTO, WORDS[:2], attention, scale=scale, tile=120) for scale in ("caption", "word"))
    places = [(120 * n + 3 * n, 14, 120 * n + 3 * n + 120, 94) for n in range(3)]  # the photo, then the words
    different = [same.crop(place).tobytes() != other.crop(place).tobytes() for place in places]
    assert different == [False, True, False]
    same, other = (animation(PHOTO, WORDS[:2], attention, scale=scale) for scale in ("caption", "word"))
    assert [one.tobytes() != two.tobytes() for one, two in zip(same, other, strict=True)] == [True, False]


def test_the_legend_shows_the_colours_from_none_to_the_top_and_marks_an_even_map():
    key = np.asarray(legend(300, 20, regions=24, top=0.25)).astype(int)  # six times 1 / 24
    row = key[5]
    bar = np.flatnonzero((row != 255).any(axis=1))
    bar = np.arange(bar[0], bar[-1] + 1)
    assert np.abs(row[bar[0]] - 128 * (1 - 0.55 * 0.65)).max() < 3  # the grey, dimmed
    assert np.abs(row[bar[-1]] - (128 * 0.35 + colour_table("inferno")[255] * 0.65)).max() < 3
    mark = np.flatnonzero((key[0] == 0).all(axis=1))
    assert mark.mean() == pytest.approx(bar[0] + len(bar) / 6, abs=2)
    without = np.asarray(legend(300, 20, regions=24, top=None))
    assert not (without[0] == 0).all(axis=1).any()


def test_evidence_is_in_nats_and_has_no_even_map_to_mark():
    assert (amount(0.25, 24), amount(1.234, 24, "evidence")) == ("6.0x", "1.23")
    weights, nats = (np.asarray(legend(300, 20, 24, 0.25, of=of)) for of in ("attention", "evidence"))
    assert (weights[0] == 0).all(axis=1).any()
    assert not (nats[0] == 0).all(axis=1).any()
    assert weights.tobytes() != nats.tobytes()
    with pytest.raises(ValueError, match="no maps of 'scent'; choose attention or evidence"):
        figure(PHOTO, WORDS, np.ones((3, 4, 6)), of="scent")


def test_a_word_without_evidence_is_dark_on_every_scale():
    evidence = np.stack([one_hot(0, 0), np.zeros((4, 6), np.float32)])
    assert upsample(evidence[1], (120, 80), largest=0.0).tolist() == np.zeros((80, 120)).tolist()
    for scale in ("caption", "word"):
        whole = figure(PHOTO, WORDS[:2], evidence, scale=scale, of="evidence", tile=120, columns=3)
        dark = np.asarray(whole.crop((246, 14, 366, 94)))
        assert (dark == dark[0, 0]).all()
        assert dark[0, 0, 0] < 90
    assert len(animation(PHOTO, WORDS[:2], 0 * evidence, of="evidence")) == 2


def test_long_captions_wrap_into_rows_of_a_readable_width():
    attention = np.stack([one_hot(0, 0)] * 19)
    width, height = figure(PHOTO, ["word"] * 19, attention, tile=100).size
    assert 0.8 < width / height < 4


# Width and height of pictures so thin that one side decides nothing about the other.
THIN = [(1, 300), (300, 1), (4, 70_000), (70_000, 4), (1, 1)]


@pytest.mark.parametrize("size", THIN)
def test_pictures_of_a_thin_photo_are_no_larger_than_those_of_others(size):
    photo = Image.new("RGB", size, (90, 90, 90))
    attention = np.stack([one_hot(0, 0), one_hot(3, 5), one_hot(1, 2)])
    assert overlay(photo, attention[0]).size == size
    whole = figure(photo, WORDS, attention, tile=100, columns=2)
    assert whole.width == 2 * 100 + 2
    assert whole.height <= 2 * (200 + 14 + 2) + 4 * 14
    for frame in animation(photo, WORDS, attention, width=100):
        assert frame.width == 100
        assert frame.height <= 200 + 100


@pytest.mark.parametrize(
    ("size", "enlarge", "expected"),
    [
        ((300, 200), True, (100, 67)),
        ((100, 300), True, (67, 200)),  # no more than twice as high as wide is allowed
        ((10, 10), True, (100, 100)),
        ((10, 10), False, (10, 10)),
        ((1, 300), False, (1, 200)),
        ((1, 300), True, (1, 200)),
        ((300, 1), True, (100, 1)),
        ((4, 70_000), True, (1, 200)),
        ((70_000, 4), True, (100, 1)),
        ((1, 1), True, (100, 100)),
    ],
)
def test_a_photo_is_scaled_into_a_box_and_keeps_its_proportions(size, enlarge, expected):
    small = shrink(Image.new("L", size), 100, enlarge)
    assert (small.size, small.mode) == (expected, "RGB")


def test_a_thin_photo_stands_in_the_middle_of_its_place():
    attention = np.stack([one_hot(0, 0)])
    whole = np.asarray(figure(Image.new("RGB", (20, 200), "red"), ["dog"], attention, tile=100))
    red = np.flatnonzero((whole[14:214, :100] == (255, 0, 0)).all(axis=(0, 2)))
    assert (red[0], red[-1]) == (40, 59)


def test_an_animation_has_a_frame_a_word_and_can_be_saved(tmp_path):
    attention = np.stack([one_hot(0, 0), one_hot(3, 5), one_hot(1, 2)])
    frames = animation(PHOTO, WORDS, attention, width=200)
    assert len(frames) == 3
    assert len({frame.size for frame in frames}) == 1
    assert len({frame.tobytes() for frame in frames}) == 3
    for name in ("a.gif", "a.webp"):
        save_animation(frames, tmp_path / name, seconds_per_word=0.5)
        with Image.open(tmp_path / name) as saved:
            assert len(list(ImageSequence.Iterator(saved))) == 3


def test_an_animation_that_cannot_be_written_says_why(tmp_path):
    with pytest.raises(ValueError, match="no word"):
        save_animation([], tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"\.gif, \.webp"):
        save_animation([PHOTO], tmp_path / "a.jpg")


def test_one_map_for_each_word_is_asked_for():
    with pytest.raises(ValueError, match="3 words"):
        figure(PHOTO, WORDS, np.ones((2, 4, 6)))
    with pytest.raises(ValueError, match="3 words"):
        animation(PHOTO, WORDS, np.ones((3, 4)))
