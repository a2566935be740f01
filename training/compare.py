"""Train every kind of attention under one budget and compare them:
`python -m training.compare --data flickr8k=data/flickr8k --output runs/compare --seeds 0 1`.

All other flags are those of `train` and apply to every kind, attention options to the kinds that have them. Several
learning rates are tried with the first seed and the first value of dropout, then the other values of dropout with the
best learning rate: every kind has the same number of tries. The best by the dev score is trained with the other seeds.

Each result goes into a table as soon as it is there. A comparison that was stopped continues when the same command is
given again, on another machine too where the table is copied to it.
"""

import argparse
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from captioner.api import Captioner
from captioner.checkpoint import CheckpointError
from captioner.cli import positive
from captioner.files import replacing
from captioner.images import ImageError, load_image
from captioner.modelfile import MODEL_FILE
from captioner.network.attention import MECHANISMS, MultiHeadAttention
from captioner.network.model import ShowAttendTell

from . import command
from .comparison import MAPS, SCORES, draw_scores, markdown, same_word, summary
from .config import TrainConfig, check, parse_arguments
from .data.items import CaptionedImage, DatasetError
from .data.sources import read_sources
from .distributed import Distributed, distributed
from .evaluation import evaluate
from .interruption import Interrupted
from .metrics import mean_of_each
from .pointing import check_pointing
from .state import FREE_OPTIONS, TrainingError, options_for_resuming
from .train import train
from .truth import check_truth

log = logging.getLogger("training")

# The options that make each kind: every attention mechanism, then the other places where attention can stand.
KINDS: dict[str, dict[str, Any]] = {
    **{name: {"attention": name} for name in MECHANISMS},
    "self_attention": {"encoder_self_attention": 2},
    "transformer": {"decoder": "transformer", "attention": MultiHeadAttention.name},
}
TUNED = ("learning_rate", "dropout")  # in the order in which they are tried
RUN = ("kind", "seed", *TUNED)  # the columns that name a run
TRIED = "dev score"  # by which the best try is chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by a signal."""
    parser = argparse.ArgumentParser(
        prog=command("compare"),
        description="Train every kind of attention under one budget and compare them. Further flags: those of `train`.",
        allow_abbrev=False,
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each kind is trained once for each")
    parser.add_argument("--learning-rates", nargs="+", type=float, help="peak learning rates of stage one to try first")
    parser.add_argument("--dropouts", nargs="+", type=float, help="values of dropout to try with the best rate")
    parser.add_argument(
        "--pictures",
        type=positive,
        help="also measure the maps (pointing, deletion, insertion, correlations) on so many pictures of each data set",
    )
    parser.add_argument("--table", help="CSV file of all runs; default: compare.csv in the output folder")
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
    """Train and measure the models that are missing, then write the tables, the plot and the picture."""
    folder = Path(base.output)
    table = Table(Path(options.table or folder / "compare.csv"), base, processes)
    given = (options.learning_rates or [base.learning_rate], options.dropouts or [base.dropout])
    tries = dict(zip(TUNED, given, strict=True))
    configs = {}
    results: dict[str, list[dict[str, float]]] = {}
    for kind in options.kinds:
        best = best_try(base, kind, options.seeds[0], tries, table, processes)
        runs = [configure(base, kind, seed, best) for seed in options.seeds]
        results[kind] = [figures_of(config, kind, options.pictures, table, processes) for config in runs]
        configs[kind] = runs[0]
    if not processes.is_first:
        return
    rows = [summary(kind, of_kind) for kind, of_kind in results.items()]
    mapped = {kind: [run for run in of_kind if MAPS[0] in run] for kind, of_kind in results.items()}
    text = markdown(rows, [summary(kind, of_kind) for kind, of_kind in mapped.items() if of_kind])
    folder.mkdir(parents=True, exist_ok=True)  # where every run is in the table, nothing has made it
    with replacing(folder / "compare.md") as path:
        path.write_text(text + "\n", "utf-8")
    with replacing(folder / "compare.png") as path:
        draw_scores(rows, path)
    print(text)
    # Models that were trained on another machine need not be here.
    here = [kind for kind, config in configs.items() if Path(config.output, MODEL_FILE).exists()]
    if absent := configs.keys() - here:
        log.warning("without a picture of maps: there is no model of %s in %s", ", ".join(sorted(absent)), folder)
    if here:
        photo = Path(options.photo) if options.photo else photo_of(options.word, base)
        models = {kind: Captioner.from_pretrained(configs[kind].output) for kind in here}
        with replacing(folder / "maps.png") as path:
            same_word(load_image(photo), options.sentence, options.word, models).save(path, format="png")
    log.info("results: %s", folder)


class Table:
    """The table of all runs, a CSV file with a row for each.

    Args:
        path: of the file, which need not be there yet.
        base: the options of all runs.
        processes: of which the first one writes the file.

    Raises:
        ValueError: the file is another one, or its runs had other options.
    """

    def __init__(self, path: Path, base: TrainConfig, processes: Distributed) -> None:
        self.path, self.processes = path, processes
        self.options = digest_of_options(base)
        rows: list[dict[str, str]] = []
        if processes.is_first and path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        self.rows = processes.agree(rows)
        if any(name not in row for row in self.rows for name in (*RUN, "options")):
            raise ValueError(f"{path} is not a table of this command: it has no columns {', '.join(RUN)}")
        if any(row["options"] != self.options for row in self.rows):
            raise ValueError(f"the runs in {path} were trained with other options; give another --table")

    def find(self, config: TrainConfig, kind: str) -> dict[str, float]:
        """The figures of a run as far as they are known."""
        key = self.key(config, kind)
        found: dict[str, str] = next((row for row in self.rows if tuple(row[name] for name in RUN) == key), {})
        return {name: float(text) for name, text in found.items() if text and name not in (*RUN, "options")}

    def add(self, config: TrainConfig, kind: str, figures: Mapping[str, float]) -> None:
        """Write the figures of a run, in place of those that were known."""
        key = self.key(config, kind)
        row = {**dict(zip(RUN, key, strict=True)), "options": self.options}
        row |= {name: f"{value:.6g}" for name, value in figures.items()}
        self.rows = [other for other in self.rows if tuple(other[name] for name in RUN) != key] + [row]
        if self.processes.is_first:
            text = io.StringIO()
            file = csv.DictWriter(text, list(dict.fromkeys(itertools.chain(*self.rows))), restval="")
            file.writeheader()
            file.writerows(self.rows)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as path:
                path.write_text(text.getvalue(), "utf-8")

    @staticmethod
    def key(config: TrainConfig, kind: str) -> tuple[str, ...]:
        """The columns `RUN` of a run."""
        return kind, str(config.seed), *(f"{getattr(config, name):g}" for name in TUNED)


def digest_of_options(base: TrainConfig) -> str:
    """A digest of the options of all runs, as far as they are not the defaults; without what differs between runs.

    A file with the encoder's weights counts by its content, as it may be elsewhere on another machine.
    """
    ignored = {*FREE_OPTIONS, *TUNED, "seed", "export"}
    defaults = options_for_resuming(TrainConfig())
    options = options_for_resuming(base)
    given = {name: value for name, value in options.items() if name not in ignored and value != defaults[name]}
    if Path(base.encoder_weights).is_file():
        with Path(base.encoder_weights).open("rb") as file:
            given["encoder_weights"] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]


def configure(base: TrainConfig, kind: str, seed: int, tuned: Mapping[str, float]) -> TrainConfig:
    """The options of one run. Raises ValueError where they do not go together."""
    name = "-".join([kind, str(seed), *(f"{value:g}" for value in tuned.values())])
    asked = {**dataclasses.asdict(base), **KINDS[kind], **tuned, "seed": seed, "resume": True}
    asked["output"] = str(Path(base.output) / name)
    own = MECHANISMS[asked["attention"]].option_defaults()
    asked["attention_options"] = tuple(text for text in base.attention_options if text.partition("=")[0] in own)
    config = TrainConfig(**asked)
    check(config)
    return config


def best_try(
    base: TrainConfig,
    kind: str,
    seed: int,
    tries: Mapping[str, Sequence[float]],
    table: Table,
    processes: Distributed,
) -> dict[str, float]:
    """The best values of the options in `tries`: one option after another, those after it at their first value."""
    best = {name: values[0] for name, values in tries.items()}
    for name, values in tries.items():
        if len(values) > 1:
            configs = [configure(base, kind, seed, {**best, name: value}) for value in values]
            scores = [score_of(config, kind, table, processes) for config in configs]
            best[name] = values[scores.index(max(scores))]
    return best


def score_of(config: TrainConfig, kind: str, table: Table, processes: Distributed) -> float:
    """The dev score of a run, which is trained first if it is not in the table."""
    if TRIED not in table.find(config, kind):
        log.info(
            "--- %s, seed %d, learning rate %g, dropout %g", kind, config.seed, config.learning_rate, config.dropout
        )
        table.add(config, kind, {TRIED: 100 * train(config, processes)})  # goes on where it was stopped
    return table.find(config, kind)[TRIED]


def figures_of(
    config: TrainConfig, kind: str, pictures: int | None, table: Table, processes: Distributed
) -> dict[str, float]:
    """All figures of a run, which is trained and measured first as far as they are not in the table."""
    tuned = {"learning_rate": config.learning_rate, "dropout": config.dropout}
    score_of(config, kind, table, processes)
    measures: dict[str, Callable[[], dict[str, float]]] = {"CIDEr": lambda: measure(config)}
    if pictures:
        measures[MAPS[0]] = lambda: measure_maps(config, pictures)
    for name, action in measures.items():
        if name in table.find(config, kind):
            continue
        if not Path(config.output, MODEL_FILE).exists():
            train(config, processes)  # on this machine it has not been
        found = processes.agree(action() if processes.is_first else None)
        table.add(config, kind, {**table.find(config, kind), **found})
    return {**tuned, **table.find(config, kind)}


def measure(config: TrainConfig) -> dict[str, float]:
    """The scores of a trained model on the dev images (beam size 5), its size, and the time of an epoch.

    Scores are means over the data sets that have dev images; where there are several, those on each of them follow as
    "NAME CIDEr".
    """
    captioner = Captioner.from_pretrained(config.output, config.device, engine="torch")
    sets = dev_images(config)
    evaluations = {name: evaluate(captioner, items, beam_size=5) for name, items in sets.items()}
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
        "epochs": len(seconds),
        "seconds an epoch": statistics.median(seconds),
        **mean_of_each(list(of_sets.values())),
        "entropy": statistics.mean(one.figures["attention entropy"] for one in evaluations.values()),
        **(each if len(of_sets) > 1 else {}),
    }


def measure_maps(config: TrainConfig, pictures: int) -> dict[str, float]:
    """What `training.pointing` and `training.truth` measure of a trained model, under the names of `MAPS`.

    The figures are means over the data sets that have dev images.

    Args:
        config: of the run.
        pictures: how many of each data set to measure on.
    """
    captioner = Captioner.from_pretrained(config.output, config.device)
    network = Captioner.from_pretrained(config.output, config.device, engine="torch").model
    sets = dev_images(config).values()
    return mean_of_each([measure_maps_on(items, captioner, network, pictures) for items in sets])


def measure_maps_on(
    items: Sequence[CaptionedImage], captioner: Captioner, network: ShowAttendTell, pictures: int
) -> dict[str, float]:
    """The figures of `MAPS`; NaN where there is no word.

    Deletion and insertion are those of the largest regions first, less a random map's.

    Args:
        items: photographs of one data set.
        captioner, network: see `check_truth`.
        pictures: how many of them, and how many pairs, to measure on.
    """
    figures = dict.fromkeys(MAPS, math.nan)
    try:
        pointing = check_pointing(captioner, items, pictures)
        figures |= {"pointing hits": 100 * pointing.hits, "pointing weight": 100 * pointing.weight}
        truth = check_truth(captioner, network, items, pictures)
    except ValueError as error:
        log.warning("maps left out: %s", error)
        return figures
    for name in ("attention", "evidence"):
        figures[f"{name} deletion"] = truth.excess[name][0]
        figures[f"{name} insertion"] = truth.insertion[name][0] - truth.insertion["random"][0]
    for name in ("evidence", "input gradient"):
        figures[f"attention, {name}"] = truth.correlations[f"attention, {name}"][0]
    return figures


def dev_images(config: TrainConfig) -> dict[str, tuple[CaptionedImage, ...]]:
    """The dev images of each data set that has some."""
    sets = read_sources(config.data, config.cache)
    return {dataset.name: dataset.splits["dev"] for dataset in sets if dataset.splits["dev"]}


def photo_of(word: str, config: TrainConfig) -> Path | bytes:
    """The dev image with the word in most of its captions."""
    items = itertools.chain(*dev_images(config).values())

    def mentions(item: CaptionedImage) -> int:
        return sum(word in caption.lower().split() for caption in item.captions)

    return max(items, key=mentions).source()


if __name__ == "__main__":
    sys.exit(main())
