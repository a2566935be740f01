"""Whether maps tell the truth: regions hidden from the whole network, and rank correlations of maps."""

import itertools
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import PHOTOS, small_model
from PIL import Image

from captioner import Captioner
from captioner.captions import Caption
from captioner.checkpoint import Checkpoint
from captioner.engine import Step
from captioner.images import ImageError, Preprocessing, load_image
from captioner.network.decoder import TeacherForced
from captioner.vocabulary import END, UNKNOWN, Vocabulary
from training import truth
from training.data.items import CaptionedImage
from training.metrics import rank_correlation

DOG = UNKNOWN + 1
GRID = (2, 5)
SIZE = (40, 100)  # rows and columns of pixels


def cells():
    return truth.cells_of(SIZE, GRID, (0.0, 0.0))


class Nothing(NamedTuple):
    """A state."""

    none: np.ndarray


class SumOfBrightness:
    """An engine that says "dog" with the probability sigmoid(s), s the sum of the regions' mean values in red."""

    heads = 1

    def annotate(self, images):
        of_region = [images[:, 0][:, cells() == region].mean(axis=1) for region in range(10)]
        return np.stack(of_region, axis=1)[..., None]

    def array(self, values):
        return values

    def encode(self, annotations, mask):
        return annotations.sum(axis=(1, 2))

    def initial_state(self, memory, rows):
        return Nothing(np.zeros((len(memory), rows, 1)))

    def step(self, memory, state, tokens):
        logits = np.full((*tokens.shape, DOG + 2), -1e4, np.float32)
        logits[..., DOG] = memory[:, None]
        logits[..., DOG + 1] = 0
        return Step(logits, state, np.zeros((*tokens.shape, 1, 10), np.float32))


class SameInTorch:
    """The gradient's network of that engine, for captions of one word."""

    device = torch.device("cpu")

    def __call__(self, images, captions):
        places = torch.from_numpy(cells())
        logits = torch.full((captions.shape[-1] - 1, DOG + 2), -1e4)
        logits[:, DOG + 1] = 0
        logits[:, DOG] = sum(images[0, 0][places == region].mean() for region in range(10))
        return TeacherForced(logits, captions[0, 0, 1:], None, torch.ones(1, 1, len(logits), dtype=torch.bool))


class Model:
    """A captioner with that engine. Each picture has one bright region; its maps lie there, or elsewhere."""

    engine = SumOfBrightness()
    preprocessing = Preprocessing(SIZE, mean=(38 / 255,) * 3, std=(50 / 255,) * 3)  # the mean of each picture is 38
    vocabulary = Vocabulary(["dog", "rather"])
    config = types.SimpleNamespace(grid=GRID)

    def __init__(self, right_place: bool) -> None:
        self.right_place = right_place

    def stream(self, paths, alternatives, evidence):
        assert evidence
        for path in paths:
            try:
                image = load_image(path)
            except ImageError as error:
                yield error
                continue
            pixels = np.asarray(image)[..., 0]
            bright = int(np.argmax([pixels[cells() == region].mean() for region in range(10)]))
            maps = np.zeros(10, np.float32)
            maps[bright if self.right_place else 9 - bright] = 1
            maps = maps.reshape(1, *GRID)
            yield Caption(("dog",), (-0.5,), maps, image, evidence=maps, source=str(path))


@pytest.fixture
def items(tmp_path):
    made = []
    for number in range(5):
        pixels = np.full((*SIZE, 3), 20, np.uint8)
        pixels[cells() == number] = 200
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        made.append(CaptionedImage(tmp_path / f"{number}.png", ("a dog",)))
    return made


def test_pixels_belong_to_the_regions_that_heatmaps_show_there():
    plain = cells()
    assert (plain[:20, :20] == 0).all()
    assert (plain[20:, 80:] == 9).all()
    # Up by half a cell and left by a quarter: columns 0 to 30, 30 to 70, 70 to 120; rows 0 to 15, 15 to 60.
    moved = truth.cells_of((60, 120), (2, 3), (0.25, 1 / 12))
    for region, (row, column) in enumerate(itertools.product(((0, 15), (15, 60)), ((0, 30), (30, 70), (70, 120)))):
        assert (moved[slice(*row), slice(*column)] == region).all()


def test_deletion_hides_the_regions_of_an_order_behind_the_mean_colour():
    numbers = np.random.default_rng(0)
    values = numbers.normal(size=10)
    values -= values.mean()
    pixels = np.broadcast_to(values[cells()], (3, *SIZE)).astype(np.float32)
    orders = [numbers.permutation(10) for _ in range(4)]
    found = truth.deletion_curves(Model(True), pixels, cells(), orders, [DOG + 1, DOG, END][:2], 1)
    for order, curve in zip(orders, found, strict=True):
        left = np.array([values[order[count:]].sum() for count in (0, 1, 2, 5, 8, 9, 10)])  # shares of ten, rounded
        expected = np.logaddexp(0, -left) - np.logaddexp(0, -left[0])
        assert np.allclose(curve, expected, atol=1e-5)


def test_the_area_is_the_mean_over_all_shares():
    shares = np.array([0, *truth.SHARES, 1])
    assert truth.area(np.stack([3 * np.ones(7), shares])) == pytest.approx([3, 0.5])


def test_the_gradient_of_a_region_is_the_mean_of_its_pixels_gradients():
    pixels = np.zeros((3, *SIZE), np.float32)
    found = truth.input_gradients(SameInTorch(), pixels, [DOG], [0], cells())
    # p = 1/2, and each of a region's 400 pixels counts a 400th.
    assert np.allclose(found, 0.5 / 400)


def test_maps_that_tell_the_truth_are_distinguished_from_those_that_do_not(items):
    right, wrong = (truth.check_truth(Model(place), SameInTorch(), items, seed=1) for place in (True, False))
    assert (right.images, right.words) == (5, 5)
    for name in ("attention", "evidence"):
        assert right.deletion[name][0] > wrong.deletion[name][0] + 0.1
        assert right.insertion[name][0] > wrong.insertion[name][0] + 0.1
        assert right.smallest[name][0] < wrong.smallest[name][0] - 0.1
        assert right.excess[name][0] == pytest.approx(right.deletion[name][0] - right.deletion["random"][0])
    assert right.deletion["attention"][0] > right.deletion["another picture's attention"][0] + 0.1
    assert right.excess["random"] == (0, 0)
    assert right.correlations["attention, evidence"] == pytest.approx((1, 0))
    assert right.correlations["attention, another picture's attention"] == pytest.approx((-1 / 9, 0))


def test_insertion_shows_the_largest_regions_first(items):
    pixels = np.random.default_rng(0).normal(size=(3, *SIZE)).astype(np.float32)
    order = np.arange(10)
    (hidden,) = truth.deletion_curves(Model(True), pixels, cells(), [order[::-1]], [DOG], 0)
    mean = pixels.mean(axis=(1, 2), keepdims=True)
    shown = [np.where(cells() < count, pixels, mean) for count in (0, 1, 2, 5, 8, 9, 10)]
    sums = np.array([Model.engine.annotate(picture[None]).sum() for picture in shown])
    rise = np.logaddexp(0, -sums[0]) - np.logaddexp(0, -sums)
    assert np.allclose((hidden[-1] - hidden)[::-1], rise, atol=1e-5)


def test_the_error_is_that_of_the_mean_over_the_pictures():
    found = truth.over_pictures([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0}])
    assert found == {"a": (2, pytest.approx(1)), "b": (2, 0)}


def test_pictures_without_a_noun_or_that_cannot_be_read_are_left_out(items, caplog):
    items[0].path.write_bytes(b"")
    assert truth.check_truth(Model(True), SameInTorch(), items).images == 4
    assert str(items[0].path) in caplog.text
    with pytest.raises(ValueError, match="of 1 captions 1 have a noun, and two are needed"):
        truth.check_truth(Model(True), SameInTorch(), items[1:], images=1)


@pytest.mark.parametrize("decoder", ["lstm", "transformer"])
def test_a_real_network_is_measured(decoder, monkeypatch):
    vocabulary = Vocabulary([f"word{number}" for number in range(36)])
    network = small_model(len(vocabulary), decoder=decoder, hidden_size=16, heads=2)
    captioner = Captioner(Checkpoint(network, vocabulary, Preprocessing(size=(64, 64)), {}))
    monkeypatch.setattr(truth, "NOUNS", frozenset(vocabulary.words[4::2]))
    items = [CaptionedImage(PHOTOS / name, ()) for name in ("cat.jpg", "astronaut.jpg")]
    found = truth.check_truth(captioner, captioner.model, items)
    assert found.words >= 2
    kinds = (found.deletion, found.smallest, found.insertion, found.correlations)
    assert all(np.isfinite(value) for kind in kinds for figure in kind.values() for value in figure)


def test_the_command_line_prints_a_table_for_each_data_set(items, tmp_path, monkeypatch, capsys):
    rows = [f"{item.path.name},a dog,dev" for item in items]
    (tmp_path / "captions.csv").write_text("\n".join(["file_name,text,split", *rows]) + "\n")
    (tmp_path / "one.jsonl").write_text('{"file_name": "0.png", "text": "a dog", "split": "dev"}\n')
    model = Model(True)
    model.model = SameInTorch()
    monkeypatch.setattr(Captioner, "from_pretrained", lambda *_, **__: model)
    data = ["--data", str(tmp_path / "one.jsonl"), "--data", str(tmp_path / "captions.csv")]
    assert truth.main([*data, "--images", "3"]) == 1
    printed = capsys.readouterr()
    assert "one: of 1 captions 1 have a noun" in printed.err
    assert printed.out.startswith("captions, dev\n\n| 3 nouns, 3 pictures | deletion")
    assert truth.main(["--data", str(tmp_path / "gone.csv")]) == 1
    assert truth.main(data[2:]) == 0


def test_rank_correlation_is_spearmans():
    assert rank_correlation(np.array([1, 2, 3, 4]), np.array([10, 30, 20, 40])) == pytest.approx(0.8)
    assert rank_correlation(np.array([1, 1, 2, 3]), np.array([5, 5, 4, 3])) == pytest.approx(-1)
    assert rank_correlation(np.array([1, 1]), np.array([1, 2])) == 0
    assert rank_correlation(np.array([1]), np.array([1])) == 0
