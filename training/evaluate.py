"""Score a model: `python -m training.evaluate --model runs/flickr8k --data flickr8k --root DIR --split dev`."""

import argparse
import dataclasses
import json
import logging
import platform
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from captioner.api import Caption, Captioner
from captioner.checkpoint import CheckpointError, replacing
from captioner.cli import positive
from captioner.heatmap import shrink
from captioner.images import ImageError
from captioner.pretrained import DEFAULT_MODEL
from training.datasets import DATASETS, SPLITS, CaptionedImage, DatasetError, read_dataset
from training.metrics import METRICS, Calibration, Scores, attention_entropy, calibration, diversity, score
from training.pointing import check_pointing
from training.report import TILE, write_report
from training.words import tokenize

log = logging.getLogger("training")

# What the table shows beside the scores, and how.
FIGURES = {
    "distinct captions": "{:.0%}",
    "captions of the training set": "{:.0%}",
    "words in use": "{:.0f}",
    "mean length": "{:.1f}",
    "repeated pairs": "{:.1%}",
    "attention entropy": "{:.2f}",
}


@dataclass(frozen=True)
class Evaluation:
    """What a model said of a split with one beam size, and what that is worth.

    captions: image's path -> its caption; the photograph in it is as small as the report shows it.
    figures: what overlap with references does not tell; see `training.metrics.diversity`, and the entropy of the
        attention weights.
    calibration: how the captions' own CIDEr goes with the model's confidence.
    unreadable: a message for each image that was passed over.
    """

    beam_size: int
    captions: dict[str, Caption]
    scores: Scores
    figures: dict[str, float]
    calibration: Calibration
    images_per_second: float
    unreadable: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            "beam_size": self.beam_size,
            "images": len(self.captions),
            "scores": self.scores.corpus,
            "left_out": self.scores.left_out,
            **self.figures,
            "calibration": dataclasses.asdict(self.calibration),
            "images_per_second": self.images_per_second,
            "unreadable": self.unreadable,
        }


def evaluate(
    captioner: Captioner,
    items: Sequence[CaptionedImage],
    beam_size: int,
    batch_size: int = 32,
    known: Collection[tuple[str, ...]] | None = None,
    **options: Any,
) -> Evaluation:
    """Caption every image and score the captions. The time counts reading the images, not the scoring.

    Args:
        captioner: the model.
        items: images with the captions people wrote.
        beam_size, batch_size, options: see `Captioner.caption`.
        known: the captions of the training set, as words.

    Raises:
        ValueError: no image could be read.
    """
    captions: dict[str, Caption] = {}
    unreadable: list[str] = []
    started = time.perf_counter()
    for first in tqdm(range(0, len(items), batch_size), f"beam {beam_size}", disable=not sys.stderr.isatty()):
        paths = [item.path for item in items[first : first + batch_size]]
        try:
            found = captioner.caption(paths, beam_size=beam_size, batch_size=batch_size, alternatives=0, **options)
        except ImageError:
            paths, found = one_by_one(captioner, paths, unreadable, beam_size=beam_size, alternatives=0, **options)
        for path, caption in zip(paths, found, strict=True):
            # The photographs of a whole split, as large as they are, would not fit in the memory.
            captions[str(path)] = dataclasses.replace(caption, image=shrink(caption.image, TILE))
    seconds = time.perf_counter() - started
    if not captions:
        raise ValueError(f"none of the {len(items)} images could be read")
    references = {str(item.path): item.captions for item in items if str(item.path) in captions}
    scores = score({path: str(caption) for path, caption in captions.items()}, references)
    figures = diversity([caption.words for caption in captions.values()], known)
    said = [caption for caption in captions.values() if caption.words]
    maps = [caption.attention if caption.head_attention is None else caption.head_attention for caption in said]
    figures["attention entropy"] = attention_entropy(maps)
    own = calibration(
        [caption.confidence for caption in captions.values()], [scores.per_image[path]["CIDEr"] for path in captions]
    )
    return Evaluation(beam_size, captions, scores, figures, own, len(captions) / seconds, unreadable)


def one_by_one(
    captioner: Captioner, paths: Sequence[Path], unreadable: list[str], **options: Any
) -> tuple[list[Path], list[Caption]]:
    """The captions of those images that can be read; the others are added to `unreadable`."""
    good, found = [], []
    for path in paths:
        try:
            found.append(captioner.caption(path, **options))
            good.append(path)
        except ImageError as error:
            log.warning("skipped: %s", error)
            unreadable.append(str(error))
    return good, found


def captions_json(evaluation: Evaluation, items: Sequence[CaptionedImage]) -> list[dict[str, Any]]:
    """Every image with its caption, what people wrote, and the caption's own scores."""
    return [
        {
            "image": item.path.name,
            **evaluation.captions[str(item.path)].to_dict(),
            "references": list(item.captions),
            "scores": evaluation.scores.per_image[str(item.path)],
        }
        for item in items
        if str(item.path) in evaluation.captions
    ]


def table(evaluations: Sequence[Evaluation]) -> str:
    """The figures of several beam sizes as Markdown; scores times 100, as papers give them."""
    names = [metric for metric in METRICS if metric in evaluations[0].scores.corpus]
    others = [name for name in FIGURES if name in evaluations[0].figures]
    lines = [
        "| beam | " + " | ".join([*names, *others]) + " | images/s |",
        "|---" * (len(names) + len(others) + 2) + "|",
    ]
    for one in evaluations:
        cells = [f"{100 * one.scores.corpus[name]:.1f}" for name in names]
        cells += [FIGURES[name].format(one.figures[name]) for name in others]
        lines.append(f"| {one.beam_size} | " + " | ".join(cells) + f" | {one.images_per_second:.1f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description="Caption a split of a data set and score the captions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or name of the model")
    parser.add_argument("--data", default="flickr8k", choices=list(DATASETS), help="data set")
    parser.add_argument("--root", required=True, help="folder of the data set")
    parser.add_argument("--split", default="dev", choices=SPLITS, help="which part of it")
    parser.add_argument("--beam-size", type=positive, nargs="+", default=[1, 3, 5], metavar="K", help="beam sizes")
    parser.add_argument("--length-penalty", type=float, help="see Captioner.caption")
    parser.add_argument("--batch-size", type=positive, default=32, help="images that go through the network together")
    parser.add_argument("--limit", type=positive, help="only so many images, the first ones")
    parser.add_argument("--device", default="auto", help="cpu, cuda; auto takes a GPU where there is one")
    parser.add_argument("--output", help="folder of the report; default: evaluation-SPLIT in the model's")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    try:
        run(options)
    except (CheckpointError, DatasetError, ValueError, OSError) as error:
        log.error("error: %s", error)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    captioner = Captioner.from_pretrained(options.model, options.device)
    dataset = read_dataset(options.data, options.root)
    if dataset.problems:
        log.warning("skipped %d in the data set, the first: %s", len(dataset.problems), dataset.problems[0])
    items = dataset.splits[options.split][: options.limit]
    if not items:
        raise DatasetError(f"{options.root} has no image in its {options.split} split")
    home = Path(options.model) if Path(options.model).is_dir() else Path()
    folder = Path(options.output or home / f"evaluation-{options.split}")
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before the captioning, not after
    search = {} if options.length_penalty is None else {"length_penalty": options.length_penalty}
    train = dataset.splits.get("train", ())
    known = {tuple(tokenize(caption)) for item in train for caption in item.captions} if train else None
    evaluations = []
    for beam_size in options.beam_size:
        evaluations.append(evaluate(captioner, items, beam_size, options.batch_size, known, **search))
    widest = max(evaluations, key=lambda evaluation: evaluation.beam_size)
    for metric, why in widest.scores.left_out.items():
        log.warning("%s left out: %s", metric, why)
    print(table(evaluations))
    print(f"\nconfidence and CIDEr, Spearman's correlation: {widest.calibration.correlation:.2f}")
    pointing = None
    try:
        pointing = check_pointing(captioner, items)
        print(f"attention on the right half of two photographs side by side: {pointing}")
    except ValueError as error:
        log.warning("pointing left out: %s", error)

    figures = {
        "model": str(options.model),
        "data": options.data,
        "split": options.split,
        "options": {"batch_size": options.batch_size, "device": str(captioner.model.device), **search},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "pycocoevalcap")}},
        "pointing": pointing and dataclasses.asdict(pointing),
        "evaluations": [evaluation.to_dict() for evaluation in evaluations],
    }
    with replacing(folder / "scores.json", folder / "captions.json") as (scores_path, captions_path):
        scores_path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")
        captions_path.write_text(json.dumps(captions_json(widest, items), indent=1, ensure_ascii=False) + "\n", "utf-8")
    title = f"{options.model} on {options.data} {options.split}"
    write_report(folder / "report.html", title, table(evaluations), widest, items)
    log.info("report: %s", folder / "report.html")


if __name__ == "__main__":
    sys.exit(main())
