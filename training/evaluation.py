"""The evaluation of a model: captions of images, their scores, and the tables that show them."""

import dataclasses
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from captioner.api import Captioner
from captioner.captions import Caption
from captioner.heatmap import shrink
from captioner.images import ImageError

from .data.items import CaptionedImage
from .distributed import ALONE, Distributed
from .metrics import Calibration, all_maps, attention_entropy, calibration, diversity, mean_of_each
from .scorers import METRICS, Scores, score

log = logging.getLogger("training")

PREVIEW = 160  # pixels, the width of a photograph that is kept with its caption
# The figures in the table beside the scores, and their formats.
FIGURES = {
    "distinct captions": "{:.0%}",
    "captions of the training set": "{:.0%}",
    "words in use": "{:.0f}",
    "mean length": "{:.1f}",
    "repeated pairs": "{:.1%}",
    "attention entropy": "{:.2f}",
    "attention entropy / maximum": "{:.0%}",
    "images/s": "{:.1f}",
}


@dataclass(frozen=True)
class Evaluation:
    """A model's captions of a split of one data set with one beam size, and their scores.

    captions: key of an image -> its caption, with a small copy of the photograph.
    figures: see `metrics.diversity` and `metrics.attention_entropy`.
    calibration: of the model's confidence, by the CIDEr of each caption.
    unreadable: a message for each image that was skipped.
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
    processes: Distributed = ALONE,
    **options: Any,
) -> Evaluation:
    """Caption every image and score the captions. The time includes reading the images, but not the scoring.

    Of several processes each captions its share of the images, the first one scores, and all return the same.

    Args:
        captioner: the model.
        items: images with reference captions.
        beam_size, batch_size, options: see `Captioner.caption`.
        known: the captions of the training set, as words.
        processes: that share the work.

    Raises:
        ValueError: no image could be read.
    """
    own_items = items[processes.rank :: processes.size]
    started = time.perf_counter()
    stream = captioner.stream(
        (item.source() for item in own_items), beam_size=beam_size, batch_size=batch_size, alternatives=0, **options
    )
    # There are thousands of photographs, and the report shows them in this size.
    share = [
        str(result)
        if isinstance(result, ImageError)
        else dataclasses.replace(result, image=shrink(result.image, PREVIEW))
        for result in tqdm(stream, f"beam {beam_size}", len(own_items), disable=processes.quiet)
    ]
    shares = processes.gather(share)
    seconds = time.perf_counter() - started
    found = {item.key: shares[number % processes.size][number // processes.size] for number, item in enumerate(items)}
    captions = {key: result for key, result in found.items() if isinstance(result, Caption)}
    unreadable = [result for result in found.values() if isinstance(result, str)]
    for reason in unreadable:
        log.warning("skipped: %s", reason)
    if not captions:
        raise ValueError(f"none of the {len(items)} images could be read")
    references = {item.key: item.captions for item in items if item.key in captions}
    texts = {key: str(caption) for key, caption in captions.items()}
    scores = processes.agree(score(texts, references) if processes.is_first else None)
    figures = diversity([caption.words for caption in captions.values()], known)
    maps = all_maps([caption for caption in captions.values() if caption.words])
    figures["attention entropy"], figures["attention entropy / maximum"] = attention_entropy(maps)
    own = calibration(
        [caption.confidence for caption in captions.values()], [scores.per_image[path]["CIDEr"] for path in captions]
    )
    return Evaluation(beam_size, captions, scores, figures, own, len(captions) / seconds, unreadable)


def all_together(evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
    """Variety of the captions of all data sets together, which is not the mean of that of each set."""
    figures = diversity([caption.words for one in evaluations.values() for caption in one.captions.values()])
    return {name: figures[name] for name in ("distinct captions", "words in use")}


def evaluations_json(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The figures for one beam size: of each data set, their means, and those of all captions together."""
    of_sets = list(evaluations.values())
    return {
        "beam_size": of_sets[0].beam_size,
        "sets": {name: one.to_dict() for name, one in evaluations.items()},
        "mean": {
            "scores": mean_of_each([one.scores.corpus for one in of_sets]),
            **mean_of_each([one.figures for one in of_sets]),
        },
        "all together": all_together(evaluations),
    }


def captions_json(evaluation: Evaluation, items: Sequence[CaptionedImage]) -> list[dict[str, Any]]:
    """Every image with its caption, its references, and the scores of the caption."""
    return [
        {
            "data": item.dataset,
            "image": item.name,
            **evaluation.captions[item.key].to_dict(),
            "references": list(item.captions),
            "scores": evaluation.scores.per_image[item.key],
        }
        for item in items
        if item.key in evaluation.captions
    ]


def table(beams: Sequence[Mapping[str, Evaluation]]) -> str:
    """The figures of several beam sizes as a Markdown table; scores are multiplied by 100.

    Args:
        beams: for each beam size, the evaluation of each data set by its name. Where there are several, rows with
            their means and with the figures of all captions together follow.
    """
    rows: list[tuple[str, int, dict[str, float]]] = []
    for evaluations in beams:
        beam_size = next(iter(evaluations.values())).beam_size
        of_sets = [
            {**one.scores.corpus, **one.figures, "images/s": one.images_per_second} for one in evaluations.values()
        ]
        rows += [(name, beam_size, figures) for name, figures in zip(evaluations, of_sets, strict=True)]
        if len(of_sets) > 1:
            rows.append(("mean", beam_size, mean_of_each(of_sets)))
            rows.append(("all together", beam_size, all_together(evaluations)))
    names = [name for name in (*METRICS, *FIGURES) if any(name in figures for _, _, figures in rows)]
    lines = [f"| data | beam | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for label, beam_size, figures in rows:
        cells = [cell(name, figures[name]) if name in figures else "" for name in names]
        lines.append(f"| {label} | {beam_size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(name: str, value: float) -> str:
    """A figure as the table shows it."""
    return FIGURES[name].format(value) if name in FIGURES else f"{100 * value:.1f}"
