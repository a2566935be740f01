"""The comparison trains every kind under one budget, goes on where it was stopped, and shows what it found."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from PIL import Image

from captioner import Captioner
from captioner.heatmap import overlay
from training import compare, comparison, pointing, scorers, truth

SCORES = dict.fromkeys(["seconds an epoch", *comparison.SCORES], 2.0)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    flags = ["--data", f"flickr8k={tiny.draw(folder / 'tiny')}", "--cache", str(folder / "cache"), *tiny.SMALL]
    flags += ["--encoder-weights", str(tiny.encoder_weights(folder / "weights.safetensors")), "--heads", "2"]
    flags += ["--attention-options", "heads=2"]  # of multi_head; the other kinds do not have it
    return [*flags, "--epochs", "1", "--finetune-epochs", "0", "--word", "red", "--sentence", "a red circle"]


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(scorers, "why_no_java", lambda: scorers.NO_JAVA)


def test_every_kind_is_trained_and_shown_and_not_again(options, tmp_path, capsys, monkeypatch):
    output = tmp_path / "compare"
    assert compare.main([*options, "--seeds", "0", "1", "--output", str(output)]) == 0
    table = capsys.readouterr().out
    assert table.strip() == (output / "compare.md").read_text().strip()
    assert re.findall(r"\| `(\w+)`", table) == list(compare.KINDS)
    assert "left out" in table  # METEOR, without Java
    with (output / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == [kind for kind in compare.KINDS for _ in range(2)]
    figures = {row["kind"]: row for row in rows}
    assert float(figures["none"]["entropy"]) == pytest.approx(np.log(4), abs=1e-3)  # 2 x 2 regions
    assert float(figures["hard"]["entropy"]) == 0
    assert float(figures["none"]["parameters"]) < float(figures["additive"]["parameters"])
    heads = Captioner.from_pretrained(output / "multi_head-0-0.001-0.5").model.config.attention_options
    assert heads == {"heads": 2}
    for name in ("compare.png", "maps.png"):
        assert Image.open(output / name).width > 300

    monkeypatch.setattr(compare, "measure", lambda *_: pytest.fail("measured again"))
    states = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    assert len(states) == 2 * 2 * len(compare.KINDS)
    assert compare.main([*options, "--seeds", "0", "1", "--output", str(output)]) == 0
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == states


def test_several_data_sets_have_scores_of_their_own_beside_the_means(options, tmp_path, capsys):
    coco = tiny.draw_karpathy(tmp_path / "coco")
    data = [*options[:2], "--data", f"coco={coco}"]
    output = tmp_path / "compare"
    assert compare.main([*data, *options[2:], "--kinds", "none", "additive", "--output", str(output)]) == 0
    head, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().splitlines()]
    assert head[6:15] == [*compare.SCORES, *(f"{name} {of}" for name in ("flickr8k", "coco") for of in compare.SCORES)]
    assert len(rows) == 2
    with (output / "compare.csv").open() as file:
        for row in csv.DictReader(file):
            for score in ("BLEU-4", "CIDEr"):
                mean = (float(row[f"flickr8k {score}"]) + float(row[f"coco {score}"])) / 2
                assert float(row[score]) == pytest.approx(mean, rel=1e-4)


def test_every_kind_has_the_same_tries_and_the_best_is_trained_with_the_other_seeds(options, tmp_path, monkeypatch):
    scores = {1e-3: 0.2, 2e-3: 0.4, 3e-3: 0.3}
    trained = []

    def train(config, _):
        trained.append((config.attention, config.seed, config.learning_rate, config.dropout))
        return scores[config.learning_rate] + (0.1 if config.attention == "dot" and config.dropout == 0.3 else 0)

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(compare, "measure", lambda *_: dict.fromkeys(["parameters", "epochs", "entropy"], 1.0) | SCORES)
    flags = ["--learning-rates", "1e-3", "2e-3", "3e-3", "--dropouts", "0.5", "0.3", "--seeds", "4", "5"]
    assert compare.main([*options, "--kinds", "none", "dot", *flags, "--output", str(tmp_path)]) == 0
    tries = [*((4, rate, 0.5) for rate in scores), (4, 2e-3, 0.3)]
    for kind, best in (("none", (2e-3, 0.5)), ("dot", (2e-3, 0.3))):
        of_kind = list(dict.fromkeys(run[1:] for run in trained if run[0] == kind))
        assert of_kind == [*tries, (5, *best)]
    with (tmp_path / "compare.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "dot"]
    assert [float(row["dev score"]) for row in rows if row["dropout"] == "0.3"] == pytest.approx([50, 50])
    assert {(row["seed"], row["learning_rate"], row["dropout"]) for row in rows if row["CIDEr"]} == {
        ("4", "0.002", "0.3"),
        ("5", "0.002", "0.3"),
    }


def test_a_table_from_another_machine_is_not_trained_again(options, tmp_path, capsys, monkeypatch):
    flags = [*options, "--kinds", "none", "dot", "--table", str(tmp_path / "all.csv")]
    assert compare.main([*flags, "--output", str(tmp_path / "here")]) == 0
    table = capsys.readouterr().out
    monkeypatch.setattr(compare, "train", lambda *_: pytest.fail("trained again"))
    weights = tmp_path / "elsewhere.safetensors"
    weights.write_bytes(Path(options[options.index("--encoder-weights") + 1]).read_bytes())
    elsewhere = ["--encoder-weights", str(weights), "--output", str(tmp_path / "there")]
    assert compare.main([*flags, *elsewhere]) == 0
    out, messages = capsys.readouterr()
    assert out == table
    assert "there is no model of dot, none" in messages
    assert compare.main([*flags, "--epochs", "2", "--output", str(tmp_path / "there")]) == 1
    assert "other options" in capsys.readouterr().err
    (tmp_path / "all.csv").write_text("name,age\nx,3\n")
    assert compare.main([*flags, "--output", str(tmp_path / "there")]) == 1
    assert "is not a table of this command" in capsys.readouterr().err


def test_maps_are_measured_where_asked_for(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pointing, "THINGS", {colour: frozenset({colour}) for colour in tiny.COLOURS})
    monkeypatch.setattr(truth, "NOUNS", frozenset({*tiny.COLOURS, "circle"}))
    flags = [*options, "--epochs", "12", "--kinds", "additive", "--output", str(tmp_path)]
    assert compare.main(flags) == 0
    assert "maps" not in capsys.readouterr().out
    monkeypatch.setattr(compare, "measure", lambda *_: pytest.fail("measured again"))
    assert compare.main([*flags, "--pictures", "6"]) == 0
    with (tmp_path / "compare.csv").open() as file:
        (row,) = csv.DictReader(file)
    values = {name: float(row[name]) for name in comparison.MAPS}
    assert not any(map(np.isnan, values.values()))
    assert 0 <= values["pointing hits"] <= 100
    assert -1 <= values["attention, evidence"] <= 1
    maps = capsys.readouterr().out.split("\n\n")[1]
    assert maps.splitlines()[2].startswith("| `additive` | ")


def test_maps_of_some_runs_are_shown_without_those_of_the_others(options, tmp_path, capsys, monkeypatch):
    maps = dict.fromkeys(comparison.MAPS, 0.5)
    monkeypatch.setattr(compare, "train", lambda *_: 0.2)
    monkeypatch.setattr(compare, "measure", lambda *_: dict.fromkeys(["parameters", "epochs", "entropy"], 1.0) | SCORES)
    monkeypatch.setattr(compare, "measure_maps", lambda config, _: maps | {comparison.MAPS[0]: float(config.seed)})
    flags = [*options, "--output", str(tmp_path)]
    assert compare.main([*flags, "--kinds", "none", "--seeds", "3", "--pictures", "6"]) == 0
    assert compare.main([*flags, "--kinds", "dot", "--seeds", "5", "7", "--pictures", "6"]) == 0
    capsys.readouterr()
    assert compare.main([*flags, "--kinds", "none", "additive", "dot", "--seeds", "3", "5", "7"]) == 0
    scores, of_maps = capsys.readouterr().out.split("\n\n")
    assert re.findall(r"\| `(\w+)`", scores) == ["none", "additive", "dot"]
    rows = [line.strip("| ").split(" | ")[:3] for line in of_maps.splitlines()[2:]]
    assert rows == [["`none`", "1", "3.00"], ["`dot`", "2", "6.00 ± 1.41"]]


def test_a_map_of_one_region_leaves_the_other_kinds_their_colours():
    soft = np.full((4, 4), 0.7 / 15, np.float32)
    soft[1, 2] = 0.3
    hard = np.eye(1, 16, dtype=np.float32).reshape(4, 4)

    def model(weights):
        caption = SimpleNamespace(attention=weights[None], index=lambda word: 0, displacement=(0.0, 0.0))
        return SimpleNamespace(teacher_forced=lambda photo, sentence: caption)

    photo = Image.new("RGB", (224, 224), "grey")
    picture = comparison.same_word(photo, "a red circle", "red", {"soft": model(soft), "hard": model(hard)})
    beside = picture.crop((224 + 5, 24, 2 * 224 + 5, 24 + 224))  # after the photograph and a gap, below its title
    assert np.array_equal(np.asarray(beside), np.asarray(overlay(photo, soft)))


def test_a_mean_and_a_spread_are_over_the_seeds():
    row = comparison.summary("dot", [{"CIDEr": 40.0}, {"CIDEr": 44.0}])
    assert row == {"kind": "dot", "seeds": 2, "CIDEr": 42.0, "CIDEr spread": pytest.approx(8**0.5)}
    assert comparison.summary("dot", [{"CIDEr": 40.0}])["CIDEr spread"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--word", "cat"], "does not hold the --word 'cat'"), (["--kinds", "telepathy"], "telepathy")],
)
def test_wrong_usage_is_reported_before_anything_is_trained(options, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        compare.main([*options, "--output", str(tmp_path / "run"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_compared_is_one_clear_error(options, tmp_path, capsys):
    assert compare.main([*options, "--data", "coco=/no/such/root", "--output", str(tmp_path / "run")]) == 1
    assert "/no/such/root" in capsys.readouterr().err
