"""From a folder of pictures to a caption: training, evaluation and comparison with captions of your own."""

import csv
import json
import shutil

import pytest
import tiny

from captioner import Captioner
from captioner.cli import main as caption
from training import compare, evaluate, scorers
from training.train import main as train


@pytest.fixture(scope="module")
def stars(tmp_path_factory):
    return tiny.draw_own(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Flags of a small run without its data and its output folder."""
    folder = tmp_path_factory.mktemp("cache")
    weights = tiny.encoder_weights(folder / "mobilenet_v2.safetensors")
    flags = ["--cache", str(folder), "--encoder-weights", str(weights), *tiny.SMALL]
    return [*flags, "--epochs", "2", "--finetune-epochs", "0", "--workers", "0"]


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(scorers, "why_no_java", lambda: scorers.NO_JAVA)


def test_twenty_pictures_train_a_model_that_captions_and_is_scored(stars, options, tmp_path, capsys):
    run = str(tmp_path / "run")
    flags = ["--epochs", "40", "--patience", "40", "--learning-rate", "0.01", "--ema-decay", "0.5"]
    assert train(["--data", str(stars), *options, *flags, "--output", run]) == 0
    picture = str(stars.parent / "photos" / "0.png")
    capsys.readouterr()
    assert caption([picture, "--model", run]) == 0
    printed = capsys.readouterr().out
    assert "star" in printed
    assert set(printed.split()) <= {*tiny.COLOURS, "a", "star", "all"}
    assert evaluate.main(["--model", run, "--data", str(stars), "--beam-size", "1"]) == 0
    scores = json.loads((tmp_path / "run" / "evaluation-dev" / "scores.json").read_text())
    assert scores["evaluations"][0]["sets"]["stars"]["scores"]["BLEU-1"] > 0


def test_a_config_file_mixes_them_with_a_public_data_set(stars, options, tmp_path):
    config = tmp_path / "recipe.toml"
    config.write_text(f'data = ["flickr8k={tiny.draw(tmp_path / "tiny")}", "sky={stars}"]\ndata_weight = ["sky=2"]\n')
    output = tmp_path / "run"
    assert train(["--config", str(config), *options, "--output", str(output)]) == 0
    assert {"circle", "star"} < set(Captioner.from_pretrained(output).vocabulary.words)
    with (output / "history.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    assert float(row["CIDEr"]) == pytest.approx((float(row["flickr8k CIDEr"]) + float(row["sky CIDEr"])) / 2)


def test_the_attention_mechanisms_are_compared_on_them(stars, options, tmp_path, capsys):
    output = tmp_path / "compare"
    flags = ["--kinds", "none", "dot", "--word", "star", "--sentence", "a red star"]
    assert compare.main(["--data", str(stars), *options, *flags, "--output", str(output)]) == 0
    assert "| `dot` |" in capsys.readouterr().out


def test_a_run_goes_on_where_the_folder_has_moved(stars, options, tmp_path):
    run = [*options, "--output", str(tmp_path / "run"), "--resume"]
    assert train(["--data", str(stars), *run]) == 0
    moved = shutil.copytree(stars.parent, tmp_path / "moved") / stars.name
    assert train(["--data", str(moved), *run]) == 0
    assert train(["--data", f"other={moved}", *run]) == 1


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        (40, ["--minimum-count", "11"], "only words that occur 11 times are kept; --minimum-count 1 keeps all"),
        (40, ["--minimum-count", "99"], "none of the 9 words in the training captions is known: only words that occur"),
        (40, [], "training images are 4 step(s) an epoch; with so few, a smaller --batch-size and more --epochs"),
        (2, [], "no usable image in the dev split of stars (captions in stars.csv; no splits named, split by a hash"),
    ],
)
def test_what_too_few_captions_lack_is_reported_with_the_remedy(stars, options, tmp_path, capsys, rows, flags, message):
    shutil.copytree(stars.parent, tmp_path / "own")
    file = tmp_path / "own" / "stars.csv"
    file.write_text("\n".join(file.read_text().splitlines()[: 1 + rows]) + "\n")
    train(["--data", str(file), *options, *flags, "--epochs", "1", "--output", str(tmp_path / "run")])
    assert message in capsys.readouterr().err
