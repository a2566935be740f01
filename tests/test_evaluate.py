"""Evaluation captions a split, scores it, and leaves a report that anyone can open."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from captioner.api import Captioner
from captioner.checkpoint import Checkpoint
from captioner.images import Preprocessing
from captioner.network.model import ModelConfig, ShowAttendTell
from captioner.vocabulary import Vocabulary
from training import evaluate, shard
from training.data.datasets import read_dataset
from training.evaluation import evaluate as evaluate_model
from training.scorers import NO_JAVA
from training.truth import MAPS

COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    vocabulary = Vocabulary(["a", "picture", "of", *COLOURS])
    sizes = {"annotation_size": 16, "attention_size": 16, "embedding_size": 16, "hidden_size": 16}
    network = ShowAttendTell(ModelConfig(len(vocabulary), grid=(2, 2), **sizes))
    folder = tmp_path_factory.mktemp("model")
    Captioner(Checkpoint(network, vocabulary, Preprocessing(size=(64, 64)))).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    """Java takes seconds to start; what it computes is the business of the tests of the scores."""
    monkeypatch.setattr("training.scorers.why_no_java", lambda: NO_JAVA)


@pytest.fixture
def root(tmp_path):
    """Six pictures in the layout of Flickr8k's release, the last of them broken, all in the dev split."""
    (tmp_path / "Flicker8k_Dataset").mkdir()
    (tmp_path / "Flickr8k_text").mkdir()
    lines = []
    for colour in COLOURS:
        Image.new("RGB", (40, 30), colour).save(tmp_path / "Flicker8k_Dataset" / f"{colour}.jpg")
        lines += [f"{colour}.jpg#{n}\ta picture of <b>{colour}</b> & more" for n in range(5)]
    broken = tmp_path / "Flicker8k_Dataset" / f"{COLOURS[-1]}.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    (tmp_path / "Flickr8k_text" / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    names = "\n".join(f"{colour}.jpg" for colour in COLOURS) + "\n"
    (tmp_path / "Flickr8k_text" / "Flickr_8k.devImages.txt").write_text(names)
    (tmp_path / "Flickr8k_text" / "Flickr_8k.trainImages.txt").write_text("")
    return tmp_path


def run(model, root, output, *more):
    return evaluate.main(
        ["--model", str(model), "--data", f"flickr8k={root}", "--output", str(output), "--batch-size", "4", *more]
    )


def test_whether_maps_tell_the_truth_is_measured_where_asked_for(model, root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.truth.NOUNS", frozenset(["picture", *COLOURS]))
    assert run(model, root, tmp_path / "without", "--beam-size", "1") == 0
    assert "deletion" not in capsys.readouterr().out
    assert run(model, root, tmp_path / "report", "--beam-size", "1", "--truth", "6") == 0
    assert "deletion, largest first" in capsys.readouterr().out
    figures = json.loads((tmp_path / "report" / "scores.json").read_text())["truth"]["flickr8k"]
    assert figures["images"] == 5  # one is broken
    assert set(figures["deletion"]) == set(MAPS)


def test_two_processes_give_the_scores_of_one(model, root, tmp_path):
    assert run(model, root, tmp_path / "one", "--beam-size", "1", "3") == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    arguments = ["--model", model, "--data", f"flickr8k={root}", "--beam-size", "1", "3", "--output", tmp_path / "two"]
    # Without Java, which is looked for in the PATH.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "PATH": ""}
    done = subprocess.run(
        [*launcher, "training.evaluate", *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| flickr8k |") == 2  # printed by one process
    one, two = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two"))
    for alone, shared in zip(one["evaluations"], two["evaluations"], strict=True):
        ours, theirs = shared["sets"]["flickr8k"], alone["sets"]["flickr8k"]
        assert ours["scores"] == theirs["scores"]
        assert (ours["images"], ours["unreadable"]) == (theirs["images"], theirs["unreadable"])
        assert shared["mean"] == {
            **alone["mean"],
            "attention entropy": pytest.approx(alone["mean"]["attention entropy"]),
        }
    captions = [json.loads((tmp_path / name / "captions.json").read_text()) for name in ("one", "two")]
    assert [entry["caption"] for entry in captions[0]] == [entry["caption"] for entry in captions[1]]


def test_images_in_shards_are_evaluated_like_those_in_files(model, root, tmp_path):
    cache = ["--cache", str(tmp_path / "cache")]
    assert shard.main(["--data", f"flickr8k={root}", "--output", str(tmp_path / "shards"), *cache]) == 0
    assert run(model, root, tmp_path / "files", "--beam-size", "3") == 0
    assert run(model, f"{tmp_path}/shards/*.tar", tmp_path / "out", "--beam-size", "3", *cache) == 0
    figures = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("files", "out")]
    scores = [found["evaluations"][0]["sets"]["flickr8k"]["scores"] for found in figures]
    assert scores[0] == scores[1]
    captions = [json.loads((tmp_path / name / "captions.json").read_text()) for name in ("files", "out")]
    assert [entry["image"] for entry in captions[0]] == [entry["image"] for entry in captions[1]]
    assert "red.jpg" in (tmp_path / "out" / "report.html").read_text()


def test_a_broken_image_is_named_and_the_rest_are_scored(model, root, tmp_path, capsys):
    assert run(model, root, tmp_path / "out", "--beam-size", "1", "3") == 0
    printed = capsys.readouterr()
    assert "white.jpg" in printed.err
    assert "METEOR left out: it runs on Java" in printed.err
    table = [line for line in printed.out.splitlines() if line.startswith("|")]
    assert [line.split("|")[2].strip() for line in table] == ["beam", "---", "1", "3"]
    figures = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [evaluation["beam_size"] for evaluation in figures["evaluations"]] == [1, 3]
    for evaluation in figures["evaluations"]:
        one = evaluation["sets"]["flickr8k"]
        assert one["images"] == 5
        assert len(one["unreadable"]) == 1
        assert 0 <= one["scores"]["BLEU-1"] <= 1
        assert one["images_per_second"] > 0


def test_every_caption_is_written_with_its_own_scores(model, root, tmp_path):
    run(model, root, tmp_path / "out", "--beam-size", "2")
    captions = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert [one["image"] for one in captions] == [f"{colour}.jpg" for colour in COLOURS[:-1]]
    found = Captioner.from_pretrained(model).caption(root / "Flicker8k_Dataset" / "red.jpg", beam_size=2)
    assert captions[0]["caption"] == str(found)
    assert captions[0]["log_probability"] == pytest.approx(found.log_probability, abs=1e-4)
    assert len(captions[0]["references"]) == 5
    assert {"BLEU-4", "CIDEr", "ROUGE-L"} <= set(captions[0]["scores"])


def test_the_report_needs_no_other_file_and_escapes_what_people_wrote(model, root, tmp_path):
    run(model, root, tmp_path / "out", "--beam-size", "1")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>red</b>" not in page
    assert "&lt;b&gt;red&lt;/b&gt; &amp; more" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page
    pictures = re.findall(r"<img [^>]*>", page)
    assert len(pictures) == 10  # five images, each among the worst and among the best
    assert all(re.search(r'alt="[^"]+"', picture) for picture in pictures)


class Page(HTMLParser):
    """What a browser makes of a page: its tags with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_names_and_words_that_look_like_html_are_text_in_the_report(root, tmp_path):
    script, picture = "<script>alert(1)</script>", "<img src=x onerror=alert(1)>"
    words = [f"\"'><img/src='x'/onerror='alert({number})'>&lt;" for number in range(6)]
    torch.manual_seed(0)
    sizes = {"annotation_size": 16, "attention_size": 16, "embedding_size": 16, "hidden_size": 16}
    network = ShowAttendTell(ModelConfig(len(words) + 4, grid=(2, 2), **sizes))
    model = tmp_path / picture
    Captioner(Checkpoint(network, Vocabulary(words), Preprocessing(size=(64, 64)))).save_pretrained(model)
    photos, texts = root / "Flicker8k_Dataset", root / "Flickr8k_text"
    (photos / "red.jpg").rename(photos / f"{picture}.jpg")
    for file in texts.iterdir():
        file.write_text(file.read_text().replace("red.jpg", f"{picture}.jpg").replace("<b>red</b>", script))
    assert run(model, root, tmp_path / "out", "--beam-size", "1") == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert {tag for tag, _ in page.tags} <= set(
        "html head meta title style body h1 h2 h3 p a table tr th td code article img ul li".split()
    )
    for tag, attributes in page.tags:
        assert set(attributes) <= {"lang", "charset", "name", "content", "id", "href", "class", "alt", "src", "loading"}
        if tag == "img":
            assert attributes["src"].startswith("data:image/jpeg;base64,")
    captions = {one["caption"] for one in json.loads((tmp_path / "out" / "captions.json").read_text())}
    assert {attributes["alt"] for tag, attributes in page.tags if tag == "img"} == captions
    for caption in captions:
        assert set(caption.split()) <= set(words)
        assert f"{caption[0].upper()}{caption[1:]}." in page.text
    for text in (script, f"{picture}.jpg", f"{model} on flickr8k dev"):
        assert text in page.text


def test_the_worst_stand_before_the_best(model, root, tmp_path):
    run(model, root, tmp_path / "out", "--beam-size", "1")
    scores = {
        one["image"]: one["scores"]["CIDEr"] for one in json.loads((tmp_path / "out" / "captions.json").read_text())
    }
    worst, best = (tmp_path / "out" / "report.html").read_text().split('<h2 id="best-0">')
    order = [scores[name] for name in re.findall(r"(\w+\.jpg) ·", worst)]
    assert order == sorted(order)
    order = [scores[name] for name in re.findall(r"(\w+\.jpg) ·", best)]
    assert order == sorted(order, reverse=True)


def test_one_beam_gives_the_captions_of_the_public_interface(model, root):
    items = read_dataset("flickr8k", root).splits["dev"][:3]
    captioner = Captioner.from_pretrained(model)
    result = evaluate_model(captioner, items, beam_size=1, batch_size=2)
    expected = captioner.caption([item.path for item in items], beam_size=1)
    assert [str(caption) for caption in result.captions.values()] == [str(caption) for caption in expected]


def test_photographs_are_kept_no_larger_than_the_report_shows_them(model, root):
    large = root / "Flicker8k_Dataset" / "red.jpg"
    Image.new("RGB", (2000, 1000), "red").save(large)
    item = next(item for item in read_dataset("flickr8k", root).splits["dev"] if item.path == large)
    result = evaluate_model(Captioner.from_pretrained(model), [item], beam_size=1)
    assert result.captions[str(large)].image.size == (160, 80)


@pytest.fixture
def own(tmp_path):
    """Captions of three more pictures, one of them for training."""
    (tmp_path / "own").mkdir()
    for name in ("grey", "pink", "brown"):
        Image.new("RGB", (30, 40), name).save(tmp_path / "own" / f"{name}.png")
    lines = ["file_name,text,split", "grey.png,grey,dev", "pink.png,a pink one,dev", "brown.png,brown,train"]
    (tmp_path / "own" / "captions.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "own" / "captions.csv"


def test_several_data_sets_are_scored_each_and_in_the_mean(model, root, own, tmp_path, capsys):
    assert run(model, root, tmp_path / "out", "--data", str(own), "--beam-size", "2") == 0
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("|")
    ]
    assert [row[:2] for row in rows] == [[name, "2"] for name in ("flickr8k", "captions", "mean", "all together")]
    shown = {row[0]: dict(zip(head, row, strict=True)) for row in rows}

    figures = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert figures["data"] == ["flickr8k", "captions"]
    (evaluation,) = figures["evaluations"]
    flickr8k, captions = evaluation["sets"].values()
    assert (flickr8k["images"], captions["images"]) == (5, 2)
    for metric in ("BLEU-1", "CIDEr"):
        mean = (flickr8k["scores"][metric] + captions["scores"][metric]) / 2
        assert evaluation["mean"]["scores"][metric] == pytest.approx(mean)
        assert float(shown["mean"][metric]) == pytest.approx(100 * mean, abs=0.06)
        assert shown["all together"][metric] == ""
    written = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert [one["data"] for one in written] == ["flickr8k"] * 5 + ["captions"] * 2
    words = {word["word"] for one in written for word in one["words"]}
    assert evaluation["all together"] == {
        "words in use": len(words),
        "distinct captions": len({tuple(word["word"] for word in one["words"]) for one in written}) / 7,
    }
    assert shown["all together"]["words in use"] == str(len(words))
    page = (tmp_path / "out" / "report.html").read_text()
    for number, name in enumerate(("flickr8k: the 5", "captions: the 2")):
        assert f'<h2 id="worst-{number}">{name} worst</h2>' in page
        assert f'href="#best-{number}"' in page


def test_captions_are_compared_with_the_training_captions_of_all_sets(model, root, own, tmp_path):
    """A picture of Flickr8k gets a caption that only the other data set trains on."""
    red = root / "Flicker8k_Dataset" / "red.jpg"
    own.write_text(
        f"file_name,text,split\nbrown.png,{Captioner.from_pretrained(model).caption(red)},train\ngrey.png,g,dev\n"
    )
    run(model, root, tmp_path / "alone", "--beam-size", "5")
    run(model, root, tmp_path / "both", "--data", str(own), "--beam-size", "5")
    alone, both = (
        json.loads((tmp_path / name / "scores.json").read_text())["evaluations"][0]["sets"]["flickr8k"]
        for name in ("alone", "both")
    )
    assert "captions of the training set" not in alone
    assert both["captions of the training set"] >= 1 / 5


def test_the_entropy_of_attention_is_also_given_as_a_share_of_its_maximum(model, root, tmp_path, capsys):
    run(model, root, tmp_path / "out", "--beam-size", "1")
    one = json.loads((tmp_path / "out" / "scores.json").read_text())["evaluations"][0]["sets"]["flickr8k"]
    assert one["attention entropy / maximum"] == pytest.approx(one["attention entropy"] / math.log(2 * 2))
    assert "| attention entropy | attention entropy / maximum |" in capsys.readouterr().out


def test_a_data_set_without_the_split_is_named_with_where_its_splits_come_from(model, own, tmp_path, capsys):
    arguments = ["--model", str(model), "--data", str(own), "--split", "test", "--output", str(tmp_path / "out")]
    assert evaluate.main(arguments) == 1
    assert "captions has no image in its test split (captions in captions.csv; splits" in capsys.readouterr().err


def test_what_the_data_set_lacks_is_reported(model, root, tmp_path, capsys):
    (root / "Flicker8k_Dataset" / "red.jpg").unlink()
    assert run(model, root, tmp_path / "out", "--beam-size", "1") == 0
    assert re.search(r"skipped \d+ in flickr8k, the first: .*red\.jpg", capsys.readouterr().err)


def test_an_output_that_cannot_be_written_is_reported_before_the_captioning(model, root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: pytest.fail("captioned in vain"))
    (tmp_path / "file").touch()
    assert run(model, root, tmp_path / "file" / "out") == 1
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--beam-size", "--batch-size", "--limit"])
def test_numbers_below_one_are_wrong_usage(model, root, tmp_path, capsys, option):
    with pytest.raises(SystemExit, match="2"):
        run(model, root, tmp_path / "out", option, "0")
    assert f"{option}: must be at least 1, not 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/model"], "no model"),
        (["--split", "test"], "no image in its test split"),
        (["--data", "coco=/no/such/root"], "/no/such/root"),
        (["--data", "/no/such.csv"], "cannot read the captions in /no/such.csv"),
    ],
)
def test_what_cannot_be_evaluated_is_one_clear_error(model, root, tmp_path, capsys, arguments, message):
    assert run(model, root, tmp_path / "out", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
