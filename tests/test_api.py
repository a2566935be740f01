"""What a user imports: photographs in, captions out."""

import dataclasses
import io
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PHOTOS
from PIL import Image

import captioner
from captioner import Caption, Captioner, CheckpointError, ImageError, caption, list_models
from captioner.pretrained import DEFAULT_MODEL

PATHS = sorted(PHOTOS.glob("*.jpg"))


def same(one: Caption, other: Caption) -> bool:
    return one.words == other.words and one.word_log_probabilities == pytest.approx(
        other.word_log_probabilities, abs=1e-5
    )


def test_one_image_gives_a_caption_and_a_list_gives_a_list(small):
    one = small.caption(PATHS[0])
    assert isinstance(one, Caption)
    assert [same(one, other) for other in small.caption([PATHS[0]])] == [True]
    assert small.caption([]) == []


@pytest.mark.parametrize("options", [{"beam_size": 1}, {"beam_size": 4}, {"seed": 3, "temperature": 1.2}])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_batch_gives_the_captions_of_its_images_alone_in_their_order(small, options, batch_size):
    together = small.caption(PATHS * 2, batch_size=batch_size, **options)
    alone = [small.caption(path, **options) for path in PATHS * 2]
    assert all(same(one, other) for one, other in zip(together, alone, strict=True))


def test_every_kind_of_input_gives_the_same_caption(small):
    path = PATHS[0]
    image = Image.open(path).convert("RGB")
    array = np.asarray(image)
    sources = [
        str(path),
        path.read_bytes(),
        io.BytesIO(path.read_bytes()),
        image,
        array,
        array / 255,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ]
    expected = small.caption(path)
    assert all(same(found, expected) for found in small.caption(sources))


def test_attention_is_a_map_for_each_word_that_sums_to_one(small):
    found = small.caption(PATHS[0])
    assert found.attention.shape == (len(found.words), 2, 3)
    assert found.attention.dtype == np.float32
    assert np.allclose(found.attention.sum(axis=(1, 2)), 1, atol=1e-5)
    assert (found.attention >= 0).all()


def test_a_caption_knows_how_likely_it_is(small):
    found = small.caption(PATHS[0], max_length=5)
    assert len(found.words) <= len(found.word_log_probabilities) <= len(found.words) + 1
    assert found.log_probability == pytest.approx(sum(found.word_log_probabilities))
    mean = found.log_probability / len(found.word_log_probabilities)
    assert found.confidence == pytest.approx(math.exp(mean))


def test_alternatives_are_the_rest_of_the_beam_best_first(small):
    found = small.caption(PATHS[0], beam_size=4)
    captions = [found, *found.alternatives]
    assert len({one.text for one in captions}) == 4
    assert len(small.caption(PATHS[0], beam_size=4, alternatives=1).alternatives) == 1
    assert len(small.caption(PATHS[0], beam_size=1, alternatives=3).alternatives) == 3
    assert len(small.caption(PATHS[0], seed=1, temperature=1.0, alternatives=2).alternatives) == 2


def test_words_may_be_drawn_by_chance_and_again_by_the_same_seed(small):
    drawn = [small.caption(PATHS[0], temperature=1.5, seed=seed).text for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_length": 0}, "max_length"),
        ({"batch_size": 10**9}, "batch_size must be a whole number from 1 to 1024, not 1000000000"),
        ({"beam_size": 2.5}, "beam_size must be a whole number"),
        ({"beam_size": 5000}, "beam_size"),
        ({"alternatives": 3000}, "alternatives"),
        ({"alternatives": 40}, "alternatives 40 is too many"),
        ({"max_length": 10**9}, "max_length"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"length_penalty": 1e9}, "length_penalty"),
        ({"block_ngrams": -1}, "block_ngrams"),
        ({"temperature": float("inf")}, "temperature must be a number above 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature must be a number above 0 to 1000, not 'hot'"),
        ({"top_p": float("nan")}, "top_p"),
        ({"seed": 2**70, "temperature": 1.0}, "seed"),
        ({"seed": 1.5, "temperature": 1.0}, "seed"),
        ({"max_pixels": float("nan")}, "max_pixels"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"alternatives": -1}, "alternatives"),
        ({"beam_size": 41}, "beam_size"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(small, options, message):
    with pytest.raises(ValueError, match=message):
        small.caption(PATHS[0], **options)


def test_a_bad_image_is_named(small):
    with pytest.raises(ImageError, match=r"no-such\.jpg"):
        small.caption([PATHS[0], "no-such.jpg"])
    with pytest.raises(ImageError, match="too many pixels"):
        small.caption(PATHS[0], max_pixels=100)


def made(text: str) -> Caption:
    words = tuple(text.split())
    maps = np.full((len(words), 2, 2), 0.25, np.float32)
    return Caption(words, (-0.5,) * (len(words) + 1), maps, Image.new("RGB", (60, 40), "grey"))


@pytest.mark.parametrize(
    ("words", "text", "sentence"),
    [
        ("a dog runs", "a dog runs", "A dog runs."),
        ("the man 's dog does n't bark", "the man's dog doesn't bark", "The man's dog doesn't bark."),
        ("a dog , a cat", "a dog, a cat", "A dog, a cat."),
        ("they can not fly", "they cannot fly", "They cannot fly."),
        ("", "", ""),
    ],
)
def test_a_caption_prints_as_people_write(words, text, sentence):
    assert (str(made(words)), made(words).sentence()) == (text, sentence)


def test_a_word_may_be_named_or_counted():
    found = made("a dog and a cat")
    assert (found.index("dog"), found.index("a"), found.index("Cat"), found.index(-1)) == (1, 0, 4, 4)
    for missing in ("horse", 5, -6):
        with pytest.raises(KeyError, match=str(missing)):
            found.index(missing)


def test_pictures_of_a_caption_cover_the_whole_photo():
    found = made("a dog runs")
    assert found.heatmap("dog").size == (60, 40)
    assert found.figure(tile=60, columns=4).width == 4 * 60 + 3 * 2
    assert len(found.animation(width=100)) == 3


def test_a_caption_has_one_scale_for_all_words_unless_each_is_to_have_its_own():
    found = made("a dog runs")
    sharp = np.zeros_like(found.attention)
    sharp[:, 0, 0] = 0.5, 0.25, 1
    found = dataclasses.replace(found, attention=sharp)
    pictures = {scale: [found.heatmap(n, scale=scale).tobytes() for n in range(3)] for scale in ("caption", "word")}
    assert len(set(pictures["word"])) == 1
    assert len(set(pictures["caption"])) == 3
    assert pictures["caption"][2] == pictures["word"][2]
    assert found.heatmap("dog").tobytes() == pictures["caption"][1]
    assert found.figure().tobytes() == found.figure(scale="caption").tobytes() != found.figure(scale="word").tobytes()
    assert found.animation(scale="word")[1].tobytes() != found.animation()[1].tobytes()
    with pytest.raises(ValueError, match="no scale 'image'"):
        found.heatmap("dog", scale="image")


def test_a_caption_is_ready_for_json(small):
    found = small.caption(PATHS[0], beam_size=3)
    plain = json.loads(json.dumps(found.to_dict(attention=True)))
    assert plain["caption"] == str(found)
    assert [word["word"] for word in plain["words"]] == list(found.words)
    assert len(plain["alternatives"]) == 2
    assert np.allclose(plain["attention"], found.attention)
    assert "attention" not in found.to_dict()


def test_a_saved_model_gives_the_same_captions(small, small_folder):
    loaded = Captioner.from_pretrained(small_folder)
    assert loaded.about == {"a": 1}
    assert same(loaded.caption(PATHS[0]), small.caption(PATHS[0]))


def test_the_function_keeps_the_model_in_memory(small_folder, monkeypatch):
    first = caption(PATHS[0], model=small_folder)
    monkeypatch.setattr(Captioner, "from_pretrained", None)
    assert same(caption(PATHS[0], model=str(small_folder)), first)


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "/no/such/folder"])
def test_an_unknown_model_is_refused_with_the_names_that_exist(name):
    names = ", ".join(model.name for model in list_models())
    with pytest.raises(CheckpointError, match=rf"no model '{name}'.*\({names}\)"):
        Captioner.from_pretrained(name)


def test_a_path_that_does_not_exist_is_refused_as_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model folder .*nowhere"):
        Captioner.from_pretrained(tmp_path / "nowhere")


def test_a_name_means_the_model_in_the_package_and_a_path_the_folder(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small.save_pretrained(DEFAULT_MODEL)
    for packaged in (None, DEFAULT_MODEL):
        assert Captioner.from_pretrained(packaged).about != {"a": 1}
    for folder in (f"./{DEFAULT_MODEL}", Path(DEFAULT_MODEL)):
        assert Captioner.from_pretrained(folder).about == {"a": 1}
        assert same(caption(PATHS[0], model=folder), small.caption(PATHS[0]))


def test_a_model_of_the_hub_needs_its_extra_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"captioner\[hub\]"):
        Captioner.from_pretrained("someone/model")


def test_a_model_of_the_hub_is_fetched_and_loaded(small, small_folder, tmp_path, monkeypatch):
    asked = []

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            asked.append(name)
            for path in small_folder.iterdir():
                if any(path.match(pattern) for pattern in allow_patterns):
                    shutil.copy(path, tmp_path)
            return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert same(Captioner.from_pretrained("someone/model").caption(PATHS[0]), small.caption(PATHS[0]))
    assert asked == ["someone/model"]


def test_a_model_that_the_hub_does_not_give_is_one_clear_error(monkeypatch):
    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    with pytest.raises(CheckpointError, match=r"someone/model.*no route to host"):
        Captioner.from_pretrained("someone/model")


def test_a_device_that_is_not_there_is_refused(small_folder):
    with pytest.raises(ValueError, match="quantum"):
        Captioner.from_pretrained(small_folder, device="quantum")


def test_the_package_has_a_small_face():
    assert sorted(captioner.__all__) == [
        "Caption", "Captioner", "CheckpointError", "ImageError", "caption", "list_models",
    ]  # fmt: skip
    assert all(hasattr(captioner, name) for name in captioner.__all__)
    with pytest.raises(AttributeError):
        _ = captioner.nothing


def test_teacher_forcing_a_models_own_caption_gives_its_probabilities_and_maps(small):
    own = small.caption(PATHS[0], beam_size=2, block_ngrams=0)
    forced = small.teacher_forced(PATHS[0], own.text)
    assert forced.words == own.words
    said = len(own.word_log_probabilities)
    assert forced.word_log_probabilities[:said] == pytest.approx(own.word_log_probabilities, abs=1e-5)
    assert np.allclose(forced.attention, own.attention, atol=1e-5)


def test_what_cannot_be_said_is_refused_by_name(small):
    with pytest.raises(ValueError, match=r"does not know 'xylophone', '<unk>'"):
        small.teacher_forced(PATHS[0], "word1 xylophone <unk>")
    with pytest.raises(ValueError, match="no word"):
        small.teacher_forced(PATHS[0], " ")


def test_a_caption_that_is_there_is_likelier_than_one_that_is_not():
    captioner = Captioner.from_pretrained()
    photo = PHOTOS / "photographer.jpg"
    right, wrong = (
        captioner.teacher_forced(photo, text) for text in (captioner.caption(photo).text, "a dog swims in the water")
    )
    assert right.confidence > 2 * wrong.confidence
