"""Where attention looks, on pictures in which the place of a word is known."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioner import Captioner
from captioner.captions import Caption
from training import pointing
from training.data.datasets import read_dataset
from training.data.items import CaptionedImage


@pytest.mark.parametrize(
    ("captions", "thing"),
    [
        (["a dog runs", "two dogs", "an animal"], "dog"),
        (["a man", "a woman and a boy", "somebody"], "person"),
        (["a dog runs", "a man and a dog", "a dog"], None),
        (["a dog", "a hill", "a tree"], None),
        ([], None),
    ],
)
def test_a_photograph_shows_what_most_captions_name_if_none_names_another_thing(captions, thing):
    assert pointing.only_thing(captions) == thing


def test_the_halves_are_the_middles_of_the_photographs():
    left = Image.new("RGB", (100, 80), "black")
    left.paste("red", (25, 0, 75, 80))
    picture = np.asarray(pointing.side_by_side(left, Image.new("RGB", (60, 90), "blue"), size=64))
    assert picture.shape == (64, 64, 3)
    assert np.allclose(picture[:, 2:30], (255, 0, 0), atol=5)
    assert np.allclose(picture[:, 32:], (0, 0, 255), atol=5)


class Pointer:
    """A captioner that says where a red dog and a green person are, and looks there or at the other half.

    Its evidence, where it is asked for, lies on the half where it does not look, and there is none for "the".
    """

    def __init__(self, right_place: bool) -> None:
        self.right_place = right_place

    def stream(self, pictures, alternatives, evidence):
        for picture in pictures:
            dog_at_left = picture.getpixel((5, 5))[0] > 128
            maps = np.zeros((3, 4, 4), np.float32)
            maps[0] = 1 / 16
            for place, at_left in ((1, dog_at_left), (2, not dog_at_left)):
                maps[place, :, 0 if at_left == self.right_place else 3] = 0.25
            falls = 2 * np.flip(maps, axis=2) * [[[0]], [[1]], [[1]]] if evidence else None
            yield Caption(("the", "dog", "man"), (0.0,) * 4, maps, picture, evidence=falls)


@pytest.fixture
def items(tmp_path):
    made = []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (40, 40), ("red", "green")[number % 2]).save(path)
        made.append(CaptionedImage(path, (("a dog", "a man")[number % 2],)))
    return made


def test_a_model_that_points_right_is_distinguished_from_one_that_points_wrong(items):
    right, wrong = (pointing.check_pointing(Pointer(place), items, pairs=20) for place in (True, False))
    assert (right.words, right.hits) == (40, 1.0)
    assert right.weight > 0.8
    assert (wrong.words, wrong.hits) == (40, 0.0)
    assert wrong.weight < 0.2
    # One map in three is even over 16 regions, the others over 4.
    assert right.entropy == pytest.approx((np.log(16) + 2 * np.log(4)) / 3 / np.log(16))


def test_maps_of_evidence_are_measured_as_those_of_attention(items):
    wrong, right = (pointing.check_pointing(Pointer(place), items, pairs=20, of="evidence") for place in (True, False))
    assert (right.words, right.hits, wrong.hits) == (40, 1.0, 0.0)
    assert right.weight > 0.8
    assert wrong.weight < 0.2
    assert right.entropy == pytest.approx(np.log(4) / np.log(16))  # of the maps that are not zero
    assert pointing.left_share(np.zeros((4, 4)), (0.0, 0.0)) == 0.5


def test_pairs_with_a_photograph_that_cannot_be_read_are_left_out(items, caplog):
    items[0].path.write_bytes(b"")
    found = pointing.check_pointing(Pointer(True), items, pairs=20)
    assert 0 < found.words < 40
    assert found.hits == 1.0
    assert str(items[0].path) in caplog.text


@pytest.fixture
def captions(items, tmp_path):
    """A file of captions of the same photographs, all for dev."""
    rows = [f"{item.path.name},{item.captions[0]},dev" for item in items]
    path = tmp_path / "captions.csv"
    path.write_text("\n".join(["file_name,text,split", *rows]) + "\n")
    return path


def test_the_command_line_prints_the_shares_of_each_data_set(captions, monkeypatch, capsys):
    monkeypatch.setattr(Captioner, "from_pretrained", lambda *_: Pointer(True))
    data = ["--data", str(captions), "--data", f"again={captions}"]
    assert pointing.main([*data, "--pairs", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["captions", "again"]
    assert "100% of 40 words" in lines[0]
    assert "entropy 67% of its maximum" in lines[0]
    assert pointing.main([*data, "--pairs", "20", "--of", "evidence"]) == 0
    assert capsys.readouterr().out.startswith("captions: 0% of 40 words")


def test_the_command_line_names_what_it_cannot_check_and_goes_on(captions, items, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Captioner, "from_pretrained", lambda *_: Pointer(True))
    (tmp_path / "dogs.jsonl").write_text(f'{{"file_name": "{items[0].path.name}", "text": "a dog", "split": "dev"}}\n')
    assert pointing.main(["--data", str(tmp_path / "dogs.jsonl"), "--data", str(captions)]) == 1
    printed = capsys.readouterr()
    assert "dogs: these photographs show no two different things" in printed.err
    assert printed.out.startswith("captions: 100%")
    assert pointing.main(["--data", str(tmp_path / "gone.csv")]) == 1
    assert "cannot read the captions in" in capsys.readouterr().err


def test_photographs_of_one_thing_alone_are_refused(items):
    with pytest.raises(ValueError, match="no two different things"):
        pointing.check_pointing(Pointer(True), items[::2])


def test_captions_that_name_neither_thing_are_refused(items):
    silent = Pointer(True)
    silent.stream = lambda pictures, alternatives, evidence: (
        Caption(("hm",), (0.0, 0.0), np.full((1, 2, 2), 0.25, np.float32), picture) for picture in pictures
    )
    with pytest.raises(ValueError, match="none of 3 captions"):
        pointing.check_pointing(silent, items, pairs=3)


def test_the_default_model_looks_at_what_it_names(flickr8k: Path):
    items = read_dataset("flickr8k", flickr8k).splits["dev"]
    found = pointing.check_pointing(Captioner.from_pretrained(), items, pairs=120)
    assert found.words > 100
    # 150 tosses of a coin come out at 0.6 or more once in a hundred times.
    assert found.hits > 0.6
    assert found.weight > 0.51
