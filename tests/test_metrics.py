"""Scores are pycocoevalcap's, and what is left out is said."""

import shutil
import subprocess

import pytest

from training.metrics import METRICS, diversity, quick_scores, score

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


def test_quick_scores_agree_with_the_whole_scorer_on_plain_words():
    plain = {"a": ["a dog runs", "the dog is running fast"], "b": ["two men play", "men playing with a ball"]}
    said = {"a": "a dog is running", "b": "two men with a ball"}
    quick = quick_scores([text.split() for text in said.values()], [[t.split() for t in ts] for ts in plain.values()])
    whole = score(said, plain).corpus
    assert quick == pytest.approx({name: whole[name] for name in quick}, abs=1e-12)


def test_diversity_counts_distinct_captions_and_words():
    figures = diversity([["a", "dog"], ["a", "dog"], ["two", "men", "play"], []])
    assert figures == {"distinct captions": 0.75, "words in use": 5, "mean length": 7 / 4}
