"""Train every kind of attention under one budget and compare them:
`python -m training.compare --data flickr8k=data/flickr8k --output runs/compare --seeds 0 1`.

All other flags are those of `train` and apply to every kind, attention options to the kinds that have them. A
comparison that was stopped continues when the same command is given again.
"""

import argparse
import csv
import dataclasses
import io
import json
import logging
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioner.api import Captioner
from captioner.checkpoint import CheckpointError
from captioner.files import replacing
from captioner.heatmap import figure
from captioner.images import ImageError, load_image
from captioner.network.attention import MECHANISMS, MultiHeadAttention

from . import command
from .config import TrainConfig, parse_arguments
from .data.items import CaptionedImage, DatasetError
from .data.sources import read_sources
from .distributed import Distributed, distributed
from .evaluation import evaluate
from .interruption import Interrupted
from .metrics import mean_of_each
from .scorers import NEED_JAVA
from .state import TrainingError
from .train import train

log = logging.getLogger("training")

# The options that make each kind: every attention mechanism, then the other places where attention can stand.
KINDS: dict[str, dict[str, Any]] = {
    **{name: {"attention": name} for name in MECHANISMS},
    "self_attention": {"encoder_self_attention": 2},
    "transformer": {"decoder": "transformer", "attention": MultiHeadAttention.name},
}
SCORES = ("BLEU-4", "METEOR", "CIDEr")
RESULT = "result.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by a signal."""
    parser = argparse.ArgumentParser(
        prog=command("compare"),
        description="Train every kind of attention under one budget and compare them. Further flags: those of `train`.",
        allow_abbrev=False,
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each kind is trained once for each")
    parser.add_argument("--photo", help="photograph for the picture of maps; default: a dev image that has the word")
    parser.add_argument("--word", default="dog", help="the word whose map is drawn under every kind")
    parser.add_argument("--sentence", default="a dog is running", help="the caption in which it stands")
    options, others = parser.parse_known_args(arguments)
    base = parse_arguments(others)
    if options.word not in options.sentence.split():
        parser.error(f"--sentence {options.sentence!r} does not hold the --word {options.word!r}")
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    log.setLevel(level)
    try:
        with distributed(base.device) as processes:
            compare(base, options, processes)
    except Interrupted:
        log.error("stopped; give the same command again to go on from here")
        return 130
    except (TrainingError, DatasetError, CheckpointError, ImageError, ValueError, OSError) as error:
        log.error("error: %s", error)
        return 1
    return 0


def compare(base: TrainConfig, options: argparse.Namespace, processes: Distributed) -> None:
    """Train and measure the models that are missing, then write the table, the plot and the picture."""
    folder = Path(base.output)
    results: dict[str, list[dict[str, float]]] = {}
    for kind in options.kinds:
        for seed in options.seeds:
            log.info("--- %s, seed %d", kind, seed)
            results.setdefault(kind, []).append(run(base, kind, seed, folder / f"{kind}-{seed}", processes))
    if not processes.is_first:
        return
    rows = [summary(kind, of_kind) for kind, of_kind in results.items()]
    text = markdown(rows)
    with replacing(folder / "compare.md") as path:
        path.write_text(text + "\n", "utf-8")
    with replacing(folder / "compare.csv") as path:
        path.write_text(as_csv(results), "utf-8")
    with replacing(folder / "compare.png") as path:
        draw_scores(rows, path)
    photo = Path(options.photo) if options.photo else photo_of(options.word, base)
    models = {kind: Captioner.from_pretrained(folder / f"{kind}-{options.seeds[0]}") for kind in options.kinds}
    picture = same_word(load_image(photo), options.sentence, options.word, models)
    with replacing(folder / "maps.png") as path:
        picture.save(path, format="png")
    print(text)
    log.info("table, plot and picture: %s", folder)


def run(base: TrainConfig, kind: str, seed: int, output: Path, processes: Distributed) -> dict[str, float]:
    """The figures of one kind and one seed, read from its folder if it has been trained and measured before."""
    asked = {**dataclasses.asdict(base), **KINDS[kind], "seed": seed, "output": str(output), "resume": True}
    own = MECHANISMS[asked["attention"]].option_defaults()
    asked["attention_options"] = tuple(text for text in base.attention_options if text.partition("=")[0] in own)
    config = TrainConfig(**asked)
    train(config, processes)  # returns at once if the run is complete
    if processes.is_first and not (output / RESULT).exists():
        with replacing(output / RESULT) as path:
            path.write_text(json.dumps(measure(config), indent=1) + "\n", "utf-8")
    processes.barrier()
    return dict(json.loads((output / RESULT).read_text("utf-8")))


def measure(config: TrainConfig) -> dict[str, float]:
    """The scores of a trained model on the dev images (beam size 5), its size, and the time of an epoch.

    Scores and entropy are means over the data sets that have dev images; where there are several, the scores on each
    of them follow as "NAME CIDEr".
    """
    captioner = Captioner.from_pretrained(config.output, config.device, engine="torch")
    dev = {
        dataset.name: dataset.splits["dev"]
        for dataset in read_sources(config.data, config.cache)
        if dataset.splits["dev"]
    }
    evaluations = {name: evaluate(captioner, items, beam_size=5) for name, items in dev.items()}
    left_out = {metric: why for one in evaluations.values() for metric, why in one.scores.left_out.items()}
    for metric, why in left_out.items():
        if metric in (*SCORES, "tokenizer"):
            log.warning("%s left out: %s", metric, why)
    of_sets = {
        name: {metric: 100 * one.scores.corpus.get(metric, math.nan) for metric in SCORES}
        for name, one in evaluations.items()
    }
    each = {f"{name} {metric}": of_set[metric] for name, of_set in of_sets.items() for metric in of_set}
    with (Path(config.output) / "history.csv").open(encoding="utf-8") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    parameters = sum(
        weights.numel() for name, weights in captioner.model.named_parameters() if not name.startswith("encoder.")
    )
    return {
        "parameters": parameters,
        "seconds an epoch": statistics.median(seconds),
        **mean_of_each(list(of_sets.values())),
        "entropy": statistics.mean(one.figures["attention entropy"] for one in evaluations.values()),
        **(each if len(of_sets) > 1 else {}),
    }


def summary(kind: str, results: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The mean and the standard deviation ("spread") of each figure over the seeds."""
    row: dict[str, Any] = {"kind": kind, "seeds": len(results)}
    for name in results[0]:
        values = [result[name] for result in results]
        row[name] = float(np.mean(values))
        row[f"{name} spread"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return row


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table; scores as mean ± standard deviation over the seeds, first the means over several data sets."""
    of_sets = [name for name in rows[0] if name.endswith(tuple(f" {score}" for score in SCORES))]

    def cell(row: Mapping[str, Any], name: str, digits: int = 1) -> str:
        if math.isnan(row[name]):
            return "left out" if name.rpartition(" ")[2] in NEED_JAVA else "-"
        spread = f" ± {row[f'{name} spread']:.{digits}f}" if row["seeds"] > 1 else ""
        return f"{row[name]:.{digits}f}{spread}"

    lines = [
        f"| attention | parameters | s an epoch | {' | '.join([*SCORES, *of_sets])} | entropy of alpha |",
        "|---" + "|--:" * (len(SCORES) + len(of_sets) + 3) + "|",
    ]
    for row in rows:
        scores = " | ".join(cell(row, name) for name in (*SCORES, *of_sets))
        lines.append(
            f"| `{row['kind']}` | {row['parameters'] / 1e6:.2f} M | {row['seconds an epoch']:.0f} | {scores} "
            f"| {cell(row, 'entropy', 2)} |"
        )
    return "\n".join(lines)


def as_csv(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """One line for each run."""
    text = io.StringIO()
    first = next(iter(results.values()))[0]
    table = csv.DictWriter(text, ["kind", *first])
    table.writeheader()
    table.writerows({"kind": kind, **result} for kind, of_kind in results.items() for result in of_kind)
    return text.getvalue()


def draw_scores(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the scores of every kind as bars, with their standard deviation."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(11, 3.6), layout="constrained")
    kinds = [row["kind"] for row in rows]
    for axes, name in zip(plot.subplots(1, len(SCORES)), SCORES, strict=True):
        values = [row[name] for row in rows]
        axes.barh(kinds, values, xerr=[row[f"{name} spread"] for row in rows], color="#4c72b0")
        axes.invert_yaxis()
        axes.set_title(f"{name} on dev")
        known = [value for value in values if not math.isnan(value)]
        if known:
            axes.set_xlim(0.85 * min(known), 1.05 * max(known))
    plot.savefig(path, format="png", dpi=110)


def photo_of(word: str, config: TrainConfig) -> Path | bytes:
    """The dev image with the word in most of its captions."""
    items = [item for dataset in read_sources(config.data, config.cache) for item in dataset.splits["dev"]]

    def mentions(item: CaptionedImage) -> int:
        return sum(word in caption.lower().split() for caption in item.captions)

    return max(items, key=mentions).source()


def same_word(photo: Image.Image, sentence: str, word: str, models: Mapping[str, Captioner]) -> Image.Image:
    """One photograph with the map of each kind for one word, under teacher forcing with the same sentence.

    Args:
        photo: the photograph.
        sentence, word: the caption that all read, and the word in it whose maps are drawn.
        models: by the title of their map; all have the same encoder.
    """
    captions = [captioner.teacher_forced(photo, sentence) for captioner in models.values()]
    maps = np.stack([caption.attention[caption.index(word)] for caption in captions])
    return figure(
        photo, list(models), maps, columns=math.ceil((len(models) + 1) / 2), displacement=captions[0].displacement
    )


if __name__ == "__main__":
    sys.exit(main())
