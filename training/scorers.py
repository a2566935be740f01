"""Scores of captions by pycocoevalcap, the scorer of published results. What cannot be computed is named."""

import contextlib
import io
import json
import math
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .words import tokenize

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
METRICS = (*BLEU, "METEOR", "ROUGE-L", "CIDEr", "SPICE")
NEED_JAVA = ("METEOR", "SPICE")
NO_JAVA = "it runs on Java, and there is no `java` command here (Debian: apt install default-jre-headless)"


@dataclass(frozen=True)
class Scores:
    """Scores of captions against their references, as fractions.

    corpus: metric -> score of all captions together.
    per_image: image -> metric -> score of its caption.
    left_out: metric, or "tokenizer" -> why it is missing.
    """

    corpus: dict[str, float]
    per_image: dict[Hashable, dict[str, float]]
    left_out: dict[str, str] = field(default_factory=dict)


def score(
    candidates: Mapping[Any, str], references: Mapping[Any, Sequence[str]], metrics: Iterable[str] | None = None
) -> Scores:
    """Score one caption an image against its references with pycocoevalcap.

    Captions are tokenised by the scorer's PTB tokenizer, which needs Java; without Java by NLTK's, which differs in
    about one caption of 3,000, and METEOR and SPICE are left out. SPICE also needs Stanford CoreNLP, which
    `python -m pycocoevalcap.spice.get_stanford_models` downloads.

    Args:
        candidates: image -> caption.
        references: image -> captions that people wrote; the same images, at least one caption each.
        metrics: a selection of `METRICS`; all by default.

    Raises:
        ValueError: the two do not have the same images, there is no image, an image has no reference, or a metric is
            unknown.
    """
    if not candidates or candidates.keys() != references.keys():
        raise ValueError(
            f"{len(candidates)} captions and references for {len(references)} images: "
            "they should be for the same images, and at least one"
        )
    for key, of_image in references.items():
        if not of_image:
            raise ValueError(f"{key} has no reference caption")
    wanted = set(METRICS if metrics is None else metrics)
    if unknown := wanted - set(METRICS):
        raise ValueError(f"there is no metric {', '.join(sorted(unknown))}; there are {', '.join(METRICS)}")

    no_java = why_no_java()
    truths, hypotheses, left_out = tokenise(candidates, references, no_java)
    corpus: dict[str, float] = {}
    per_image: dict[Hashable, dict[str, float]] = {key: {} for key in candidates}
    for names, scorer in SCORERS.items():
        asked = [name for name in names if name in wanted]
        try:
            found = run_scorer(names, scorer, truths, hypotheses, no_java) if asked else {}
        except CannotScore as error:
            left_out.update({name: str(error) for name in asked})
            continue
        for name in asked:
            corpus[name], singles = found[name]
            for key, value in zip(truths, singles, strict=True):
                per_image[key][name] = value
    return Scores(corpus, per_image, left_out)


Tokenised = Mapping[Any, Sequence[str]]
Scored = tuple[Sequence[float], Sequence[Sequence[float]]]


class CannotScore(RuntimeError):
    """A metric that this machine cannot compute; the message says why."""


def run_scorer(
    names: Sequence[str],
    scorer: Callable[[Tokenised, Tokenised], Scored],
    truths: Tokenised,
    hypotheses: Tokenised,
    no_java: str | None,
) -> dict[str, tuple[float, list[float]]]:
    """Run a scorer: metric -> score of all captions together, and score of each caption.

    Raises:
        CannotScore: it cannot run on this machine.
    """
    if no_java and names[0] in NEED_JAVA:
        raise CannotScore(no_java)
    # The scorers print their progress; standard output belongs to the program that asked for scores.
    with contextlib.redirect_stdout(io.StringIO()):
        totals, singles = scorer(truths, hypotheses)
    return {
        name: (float(total), [float(value) for value in of_images])
        for name, total, of_images in zip(names, totals, singles, strict=True)
    }


def tokenise(
    candidates: Mapping[Any, str], references: Mapping[Any, Sequence[str]], no_java: str | None
) -> tuple[Tokenised, Tokenised, dict[str, str]]:
    """References and captions tokenised, and the reason if the PTB tokenizer could not be used."""
    lists = {key: [caption] for key, caption in candidates.items()}
    try:
        if no_java:
            raise CannotScore(no_java)
        return ptb_tokenize(references), ptb_tokenize(lists), {}
    except CannotScore as error:
        left_out = {"tokenizer": f"the PTB tokenizer is replaced by NLTK's: {error}"}
        return nltk_tokenize(references), nltk_tokenize(lists), left_out


def ptb_tokenize(captions: Mapping[Any, Sequence[str]]) -> dict[Any, list[str]]:
    """Captions tokenised by Stanford's PTB tokenizer (Java), as for published scores.

    Raises:
        CannotScore: it fails, or cannot write the temporary file that it puts into its own folder.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    try:
        found = PTBTokenizer().tokenize(
            {key: [{"caption": " ".join(text.split())} for text in of_image] for key, of_image in captions.items()}
        )
    except (OSError, ValueError) as error:
        raise CannotScore(f"it failed: {error}") from error
    if [len(found.get(key, ())) for key in captions] != [len(of_image) for of_image in captions.values()]:
        raise CannotScore("its Java program failed and returned too few captions")
    return found


def nltk_tokenize(captions: Mapping[Any, Sequence[str]]) -> dict[Any, list[str]]:
    """Captions tokenised without Java."""
    return {key: [" ".join(tokenize(caption)) for caption in of_image] for key, of_image in captions.items()}


def why_no_java() -> str | None:
    """Why Java programs cannot run here; None if they can. On some systems `java` only prints an error."""
    if not shutil.which("java"):
        return NO_JAVA
    try:
        subprocess.run(["java", "-version"], check=True, capture_output=True, timeout=60)
    except subprocess.CalledProcessError as error:
        return f"it runs on Java, and the `java` command here fails: {first_line(error.stderr) or error}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"it runs on Java, and the `java` command here fails: {error}"
    return None


def first_line(printed: bytes | None) -> str:
    """The first line that a program printed, empty where it printed none."""
    return (printed or b"").decode(errors="replace").strip().partition("\n")[0]


def time_limit(images: int) -> float:
    """Seconds after which a Java program is assumed to hang: many times what it needs."""
    return 600 + images


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
    """METEOR 1.5 (Denkowski and Lavie 2014), by its Java program, which is always ended."""
    from pycocoevalcap.meteor.meteor import Meteor

    scorer, seconds, started = Meteor(), time_limit(len(truths)), time.monotonic()
    watchdog = threading.Timer(seconds, scorer.meteor_p.kill)
    watchdog.start()
    try:
        total, singles = scorer.compute_score(truths, hypotheses)
    except (OSError, ValueError) as error:
        if time.monotonic() - started >= seconds:
            raise CannotScore(f"its Java program took longer than {seconds:g} seconds") from error
        raise CannotScore(f"its Java program failed: {first_line(end(scorer.meteor_p)) or error}") from error
    finally:
        watchdog.cancel()
        end(scorer.meteor_p)
        # Meteor.__del__ waits for this lock, which is never released if scoring fails while it is held.
        scorer.lock = threading.Lock()
    return [total], [singles]


def end(process: subprocess.Popen[bytes]) -> bytes:
    """End a program and close its pipes. Returns its standard error; nothing if it has been ended before."""
    process.kill()
    if process.stdin is None or process.stdin.closed:
        return b""
    return process.communicate()[1]


def spice(truths: Tokenised, hypotheses: Tokenised) -> Scored:
    """SPICE (Anderson et al. 2016), by the Java program in pycocoevalcap, if its libraries are installed.

    The program is started here, not by `pycocoevalcap.spice.spice.Spice`, which has no time limit, prints to standard
    output, and leaves files in its own folder where it fails. Captions that have no score count as NaN there and here.
    """
    import pycocoevalcap.spice.spice as package
    from pycocoevalcap.spice.get_stanford_models import JAR

    home = Path(package.__file__).parent
    cache = home / package.CACHE_DIR
    if not all((home / "lib" / name).exists() for name in (f"{JAR}.jar", f"{JAR}-models.jar")):
        raise CannotScore("it needs Stanford CoreNLP; `python -m pycocoevalcap.spice.get_stanford_models` downloads it")
    seconds = time_limit(len(truths))
    asked = [
        {"image_id": number, "test": hypotheses[key][0], "refs": list(of_image)}
        for number, (key, of_image) in enumerate(truths.items())
    ]
    try:
        cache.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            captions, answer = Path(folder) / "captions.json", Path(folder) / "scores.json"
            captions.write_text(json.dumps(asked))
            command = [
                "java",
                "-jar",
                "-Xmx8G",
                package.SPICE_JAR,
                str(captions),
                "-cache",
                str(home / package.CACHE_DIR),
            ]
            command += ["-out", str(answer), "-subset", "-silent"]
            subprocess.run(command, cwd=home, check=True, capture_output=True, timeout=seconds)
            found = {one["image_id"]: one["scores"]["All"]["f"] for one in json.loads(answer.read_text())}
        singles = [math.nan if found[number] is None else float(found[number]) for number in range(len(asked))]
    except subprocess.TimeoutExpired as error:
        raise CannotScore(f"its Java program took longer than {seconds:g} seconds") from error
    except (OSError, ValueError, KeyError, TypeError, subprocess.CalledProcessError) as error:
        why = first_line(getattr(error, "stderr", None)) or error
        raise CannotScore(f"its Java program failed; it was written for Java 8: {why}") from error
    return [float(np.mean(singles))], [singles]


SCORERS: dict[tuple[str, ...], Callable[[Tokenised, Tokenised], Scored]] = {
    BLEU: bleu,
    ("METEOR",): meteor,
    ("ROUGE-L",): rouge,
    ("CIDEr",): cider,
    ("SPICE",): spice,
}


def quick_scores(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> dict[str, float]:
    """BLEU-1 to 4 and CIDEr of tokenised captions without Java, for selecting a model during training.

    Args:
        candidates: one caption for each image, as words.
        references: several captions for each image, as words.

    Returns:
        Metric -> score, by pycocoevalcap.
    """
    hypotheses = {number: [" ".join(words)] for number, words in enumerate(candidates)}
    truths = {number: [" ".join(words) for words in of_image] for number, of_image in enumerate(references)}
    with contextlib.redirect_stdout(io.StringIO()):
        scores = dict(zip(BLEU, map(float, bleu(truths, hypotheses)[0]), strict=True))
        return scores | {"CIDEr": float(cider(truths, hypotheses)[0][0])}
