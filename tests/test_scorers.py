"""Scores are those of pycocoevalcap, and scores that are left out are named."""

import importlib
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from training import scorers
from training.scorers import METRICS, CannotScore, quick_scores, score, spice

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs a Java runtime")

REFERENCES = {
    "one.jpg": ["A brown dog runs through the grass .", "A dog is running on grass", "The dog's in the field!"],
    "two.jpg": ["Two men in t-shirts play football.", "Men are playing soccer", "two players and a ball"],
    "three.jpg": ["A child swims in a pool", "a girl swimming", "A young girl is under water ."],
}
CANDIDATES = {"one.jpg": "a dog runs on the grass", "two.jpg": "two men play soccer", "three.jpg": "a girl in a pool"}


def scored_directly(scorer, candidates, references):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokenize(captions):
        return PTBTokenizer().tokenize({key: [{"caption": text} for text in texts] for key, texts in captions.items()})

    return scorer.compute_score(tokenize(references), tokenize({key: [text] for key, text in candidates.items()}))


@needs_java
def test_scores_are_those_of_pycocoevalcap_digit_for_digit():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    scores = score(CANDIDATES, REFERENCES)
    bleu, singles = scored_directly(Bleu(4), CANDIDATES, REFERENCES)
    assert [scores.corpus[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == bleu
    assert [scores.per_image[key]["BLEU-2"] for key in REFERENCES] == singles[1]
    for name, scorer in (("CIDEr", Cider()), ("METEOR", Meteor()), ("ROUGE-L", Rouge())):
        total, singles = scored_directly(scorer, CANDIDATES, REFERENCES)
        assert scores.corpus[name] == float(total)
        assert [scores.per_image[key][name] for key in REFERENCES] == [float(value) for value in singles]


@needs_java
def test_no_java_process_outlives_the_scoring(monkeypatch):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    score(CANDIDATES, REFERENCES)
    assert any("meteor-1.5.jar" in process.args for process in started)
    assert all(process.returncode is not None for process in started)


def test_every_metric_is_either_there_or_left_out_with_a_reason(capsys):
    scores = score(CANDIDATES, REFERENCES)
    assert set(scores.corpus) | (set(scores.left_out) - {"tokenizer"}) == set(METRICS)
    assert not set(scores.corpus) & set(scores.left_out)
    assert all(scores.left_out.values())
    assert capsys.readouterr().out == ""


def test_without_java_what_needs_it_is_left_out_and_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    scores = score(CANDIDATES, REFERENCES)
    assert {"METEOR", "SPICE", "tokenizer"} == set(scores.left_out)
    assert "Java" in scores.left_out["METEOR"]
    assert set(scores.corpus) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Puts a `java` on the path that runs the lines of shell given to it, and hides the real one."""

    def install(script):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "java").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return install


def test_a_java_that_only_says_there_is_none_counts_as_none(fake_java):
    fake_java("echo 'Unable to locate a Java Runtime.' >&2; exit 1")
    scores = score(CANDIDATES, REFERENCES)
    assert {"METEOR", "SPICE", "tokenizer"} == set(scores.left_out)
    assert all("Unable to locate a Java Runtime." in why for why in scores.left_out.values())
    assert "CIDEr" in scores.corpus


def test_a_meteor_that_fails_is_left_out_and_ends(fake_java):
    # In a process of its own: it is the end of pycocoevalcap's Meteor object that may wait for ever.
    fake_java('case "$*" in -version) ;; *) echo "no heap" >&2; exit 1;; esac')
    program = (
        "from training.scorers import score\n"
        "scores = score({'a': 'a dog', 'b': 'two men'}, {'a': ['a dog'], 'b': ['men']})\n"
        "print(scores.left_out['METEOR'], '/', scores.left_out['tokenizer'], '/', scores.corpus['BLEU-1'])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env=os.environ,
        timeout=60,
        check=True,
        capture_output=True,
        text=True,
    )
    why_meteor, why_tokenizer, bleu = printed.stdout.split("/")
    assert "no heap" in why_meteor
    assert "too few captions" in why_tokenizer
    assert 0 < float(bleu) <= 1
    assert "Exception ignored" not in printed.stderr


def test_a_meteor_that_hangs_is_ended_and_left_out(fake_java, monkeypatch):
    fake_java('case "$*" in *meteor*) exec /bin/sleep 60;; esac')
    monkeypatch.setattr(scorers, "time_limit", lambda images: 0.5)
    assert "longer than 0.5 seconds" in score(CANDIDATES, REFERENCES).left_out["METEOR"]


@pytest.fixture
def installed_spice(tmp_path, monkeypatch):
    """SPICE's folder with the files that a download adds, empty."""
    package = pytest.importorskip("pycocoevalcap.spice.spice")
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / "spice" / "lib" / name).touch()
    monkeypatch.setattr(package, "__file__", str(tmp_path / "spice" / "spice.py"))
    monkeypatch.setitem(package.get_stanford_models.__globals__, "SPICEDIR", str(tmp_path / "spice"))
    return tmp_path / "spice"


def test_spice_gives_every_image_its_own_score(installed_spice, tmp_path, monkeypatch, capfd):
    answer = """
        import json, sys
        print("noise")
        asked = json.load(open(sys.argv[4]))
        scores = [{"image_id": one["image_id"], "scores": {"All": {"f": len(one["test"])}}} for one in asked]
        json.dump(scores[::-1], open(sys.argv[sys.argv.index("-out") + 1], "w"))
    """
    (tmp_path / "java").write_text("\n".join([f"#!{sys.executable}", *map(str.strip, answer.splitlines())]))
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    total, singles = spice({"z": ["a"], "a": ["b"], "m": ["c"]}, {"z": ["one"], "a": ["three"], "m": ["seven!!"]})
    assert singles == [[3, 5, 7]]
    assert total == [5]
    assert capfd.readouterr().out == ""


def test_spice_asks_its_program_as_pycocoevalcap_does(installed_spice, tmp_path, monkeypatch):
    answer = """
        import json, sys
        with open(sys.argv[0] + ".calls", "a") as calls:
            asked = json.load(open(sys.argv[4]))
            options = sys.argv[1:4] + [one for one in sys.argv[5:] if not one.startswith("/")]
            print(json.dumps([options, [[one["test"], one["refs"]] for one in asked]]), file=calls)
        scores = [{"image_id": one["image_id"], "scores": {"All": {"f": n or None}}} for n, one in enumerate(asked)]
        json.dump(scores, open(sys.argv[sys.argv.index("-out") + 1], "w"))
    """
    (tmp_path / "java").write_text(f"#!{sys.executable}\n{textwrap.dedent(answer)}")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    truths, hypotheses = {1: ["a", "b"], 2: ["c"]}, {1: ["one"], 2: ["two"]}
    total, singles = spice(truths, hypotheses)
    their_total, their_singles = (
        importlib.import_module("pycocoevalcap.spice.spice").Spice().compute_score(truths, hypotheses)
    )
    ours, theirs = (tmp_path / "java.calls").read_text().splitlines()
    assert ours == theirs
    assert np.array_equal(singles[0], [single["All"]["f"] for single in their_singles], equal_nan=True)
    assert np.array_equal(total[0], their_total, equal_nan=True)


def test_a_spice_that_fails_or_hangs_is_left_out_and_leaves_no_files(installed_spice, fake_java, monkeypatch):
    fake_java('[ "$hang" ] && exec /bin/sleep 60; echo "UnsupportedClassVersionError" >&2; exit 1')
    with pytest.raises(CannotScore, match="Java 8: UnsupportedClassVersionError"):
        spice({"a": ["a dog"]}, {"a": ["a dog"]})
    monkeypatch.setenv("hang", "yes")
    monkeypatch.setattr(scorers, "time_limit", lambda images: 0.5)
    with pytest.raises(CannotScore, match=r"longer than 0\.5 seconds"):
        spice({"a": ["a dog"]}, {"a": ["a dog"]})
    assert {path.name for path in installed_spice.iterdir()} <= {"lib", "cache"}


def test_only_the_metrics_that_are_asked_for_are_computed(monkeypatch):
    monkeypatch.setenv("PATH", "")
    scores = score(CANDIDATES, REFERENCES, metrics=["CIDEr", "BLEU-4", "METEOR"])
    assert list(scores.corpus) == ["BLEU-4", "CIDEr"]
    assert all(set(own) == {"BLEU-4", "CIDEr"} for own in scores.per_image.values())
    assert set(scores.left_out) == {"tokenizer", "METEOR"}
    with pytest.raises(ValueError, match="no metric BLUE-4"):
        score(CANDIDATES, REFERENCES, metrics=["BLUE-4"])


@needs_java
def test_without_java_the_scores_are_nearly_those_with_it(monkeypatch):
    with_java = score(CANDIDATES, REFERENCES).corpus
    monkeypatch.setenv("PATH", "")
    without = score(CANDIDATES, REFERENCES).corpus
    assert {name: with_java[name] for name in without} == pytest.approx(without, abs=1e-9)


def test_a_caption_that_is_a_reference_is_worth_more_than_one_that_is_not():
    right = score({key: texts[0] for key, texts in REFERENCES.items()}, REFERENCES)
    wrong = score(dict(zip(REFERENCES, [texts[0] for texts in reversed(REFERENCES.values())], strict=True)), REFERENCES)
    assert right.corpus["BLEU-4"] == pytest.approx(1.0)
    for name in right.corpus:
        assert right.corpus[name] > wrong.corpus[name]


def test_an_empty_caption_is_scored_and_not_a_crash():
    assert score(CANDIDATES | {"two.jpg": ""}, REFERENCES).per_image["two.jpg"]["CIDEr"] == 0


def test_captions_and_references_of_different_images_are_refused():
    with pytest.raises(ValueError, match="same images"):
        score({"one.jpg": "a dog"}, REFERENCES)
    with pytest.raises(ValueError, match="at least one"):
        score({}, {})
    with pytest.raises(ValueError, match=r"one\.jpg has no reference"):
        score({"one.jpg": "a dog"}, {"one.jpg": []})


def test_quick_scores_agree_with_the_whole_scorer_on_plain_words():
    plain = {"a": ["a dog runs", "the dog is running fast"], "b": ["two men play", "men playing with a ball"]}
    candidates = {"a": "a dog is running", "b": "two men with a ball"}
    quick = quick_scores(
        [text.split() for text in candidates.values()], [[t.split() for t in ts] for ts in plain.values()]
    )
    whole = score(candidates, plain).corpus
    assert quick == pytest.approx({name: whole[name] for name in quick}, abs=1e-12)
