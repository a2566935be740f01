"""Scores of captions, the field's way: pycocoevalcap's own code, and nothing left out without saying so."""

import contextlib
import io
import shutil
import subprocess
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.words import tokenize

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
METRICS = (*BLEU, "METEOR", "ROUGE-L", "CIDEr", "SPICE")
NO_JAVA = "it runs on Java, and there is no `java` command here (Debian: apt install default-jre-headless)"


@dataclass(frozen=True)
class Scores:
    """What captions are worth against their references; fractions, as the scorer gives them.

    corpus: metric -> score of all captions together.
    per_image: image -> metric -> score of its caption.
    left_out: metric, or "tokenizer" -> why it could not be had.
    """

    corpus: dict[str, float]
    per_image: dict[Hashable, dict[str, float]]
    left_out: dict[str, str] = field(default_factory=dict)


def score(candidates: Mapping[Any, str], references: Mapping[Any, Sequence[str]]) -> Scores:
    """Score one caption an image against its references with pycocoevalcap.

    Captions are tokenised by the scorer's PTB tokenizer, which needs Java; without Java by NLTK's, which differs in
    about one caption of 3,000, and METEOR and SPICE are left out. SPICE also needs Stanford CoreNLP, which
    `python -m pycocoevalcap.spice.get_stanford_models` downloads.

    Args:
        candidates: image -> caption.
        references: image -> captions that people wrote; the same images.

    Raises:
        ValueError: the two do not have the same images, or there is none.
    """
    if not candidates or candidates.keys() != references.keys():
        raise ValueError(
            f"{len(candidates)} captions and references for {len(references)} images: "
            "they should be for the same images, and at least one"
        )
    left_out: dict[str, str] = {}
    if shutil.which("java"):
        hypotheses, truths = ptb_tokenize({k: [v] for k, v in candidates.items()}), ptb_tokenize(references)
    else:
        left_out["tokenizer"] = f"the PTB tokenizer is replaced by NLTK's: {NO_JAVA}"
        hypotheses = {key: [" ".join(tokenize(caption))] for key, caption in candidates.items()}
        truths = {key: [" ".join(tokenize(caption)) for caption in of_image] for key, of_image in references.items()}

    corpus: dict[str, float] = {}
    per_image: dict[Hashable, dict[str, float]] = {key: {} for key in candidates}
    for names, scorer in ((BLEU, bleu), (("ROUGE-L",), rouge), (("CIDEr",), cider), (("METEOR",), meteor)):
        add_scores(names, scorer, truths, hypotheses, corpus, per_image, left_out)
    add_scores(("SPICE",), spice, truths, hypotheses, corpus, per_image, left_out)
    ordered = {name: corpus[name] for name in METRICS if name in corpus}
    return Scores(ordered, per_image, left_out)


Tokenised = Mapping[Any, Sequence[str]]
Scored = tuple[Sequence[float], Sequence[Sequence[float]]]


class CannotScore(RuntimeError):
    """A metric that this machine cannot compute; the message says why."""


def add_scores(
    names: Sequence[str],
    scorer: Callable[[Tokenised, Tokenised], Scored],
    truths: Tokenised,
    hypotheses: Tokenised,
    corpus: dict[str, float],
    per_image: dict[Hashable, dict[str, float]],
    left_out: dict[str, str],
) -> None:
    """Put what `scorer` gives for the metrics of these names where it belongs."""
    try:
        # The scorers print their progress; standard output belongs to the program that asked for scores.
        with contextlib.redirect_stdout(io.StringIO()):
            totals, singles = scorer(truths, hypotheses)
    except CannotScore as error:
        left_out.update({name: str(error) for name in names})
        return
    for name, total, of_images in zip(names, totals, singles, strict=True):
        corpus[name] = float(total)
        for key, value in zip(truths, of_images, strict=True):
            per_image[key][name] = float(value)


def ptb_tokenize(captions: Mapping[Any, Sequence[str]]) -> dict[Any, list[str]]:
    """Captions tokenised as all published scores are, by Stanford's PTB tokenizer (Java)."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize(
        {key: [{"caption": " ".join(caption.split())} for caption in of_image] for key, of_image in captions.items()}
    )


def bleu(truths: Tokenised, hypotheses: Tokenised) -> Scored:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002)."""
    from pycocoevalcap.bleu.bleu import Bleu

    return Bleu(4).compute_score(truths, hypotheses, verbose=0)


def rouge(truths: Tokenised, hypotheses: Tokenised) -> Scored:
    """ROUGE-L (Lin 2004)."""
    from pycocoevalcap.rouge.rouge import Rouge

    total, singles = Rouge().compute_score(truths, hypotheses)
    return [total], [singles]


def cider(truths: Tokenised, hypotheses: Tokenised) -> Scored:
    """CIDEr with the document frequencies of the references themselves (Vedantam et al. 2015)."""
    from pycocoevalcap.cider.cider import Cider

    total, singles = Cider().compute_score(truths, hypotheses)
    return [total], [singles]


def meteor(truths: Tokenised, hypotheses: Tokenised) -> Scored:
    """METEOR 1.5 (Denkowski and Lavie 2014), by its Java program."""
    if not shutil.which("java"):
        raise CannotScore(NO_JAVA)
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        total, singles = scorer.compute_score(truths, hypotheses)
    except (OSError, ValueError) as error:
        raise CannotScore(f"its Java program failed: {error}") from error
    finally:
        scorer.meteor_p.kill()
        scorer.meteor_p.wait()
    return [total], [singles]


def spice(truths: Tokenised, hypotheses: Tokenised) -> Scored:
    """SPICE (Anderson et al. 2016), by its Java program, where that and what it needs are installed."""
    if not shutil.which("java"):
        raise CannotScore(NO_JAVA)
    import pycocoevalcap.spice.spice as package

    if not list((Path(package.__file__).parent / "lib").glob("stanford-corenlp-*.jar")):
        raise CannotScore("it needs Stanford CoreNLP; `python -m pycocoevalcap.spice.get_stanford_models` downloads it")
    try:
        # SPICE gives its scores in the order of the sorted images.
        numbered = {f"{number:09d}": key for number, key in enumerate(truths)}
        total, singles = package.Spice().compute_score(
            {number: truths[key] for number, key in numbered.items()},
            {number: hypotheses[key] for number, key in numbered.items()},
        )
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise CannotScore(f"its Java program failed; it was written for Java 8: {error}") from error
    return [total], [[single["All"]["f"] for single in singles]]


def quick_scores(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> dict[str, float]:
    """BLEU-1 to 4 and CIDEr of captions that are words already, for choosing a model while it trains.

    Args:
        candidates: one caption an image, as words.
        references: several an image, as words.

    Returns:
        Metric -> score, by pycocoevalcap's code, without Java.
    """
    hypotheses = {number: [" ".join(words)] for number, words in enumerate(candidates)}
    truths = {number: [" ".join(words) for words in of_image] for number, of_image in enumerate(references)}
    with contextlib.redirect_stdout(io.StringIO()):
        scores = dict(zip(BLEU, map(float, bleu(truths, hypotheses)[0]), strict=True))
        return scores | {"CIDEr": float(cider(truths, hypotheses)[0][0])}


def diversity(captions: Sequence[Sequence[str]]) -> dict[str, float]:
    """How varied captions are: the share of distinct ones, the number of words in use, the mean length."""
    count = max(len(captions), 1)
    return {
        "distinct captions": len({tuple(words) for words in captions}) / count,
        "words in use": len({word for words in captions for word in words}),
        "mean length": sum(len(words) for words in captions) / count,
    }
