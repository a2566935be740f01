"""Score a model: `python -m training.evaluate --model runs/flickr8k --data flickr8k=data/flickr8k --split dev`.

The same command under `torchrun --nproc-per-node N -m training.evaluate ...` shares the images over N processes.
"""

import argparse
import dataclasses
import json
import logging
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from captioner.api import Captioner
from captioner.checkpoint import CheckpointError
from captioner.cli import positive
from captioner.files import replacing
from captioner.options import ENGINES
from captioner.pretrained import DEFAULT_MODEL

from . import command
from .config import add_data_flag
from .data.items import SPLITS, CaptionedImage, DatasetError
from .data.sources import read_sources, read_split
from .distributed import Distributed, distributed
from .evaluation import captions_json, evaluate, evaluations_json, table
from .pointing import check_pointing
from .report import write_report
from .truth import check_truth
from .words import tokenize

log = logging.getLogger("training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog=command("evaluate"),
        description="Caption a split of one or several data sets and score the captions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or name of the model")
    add_data_flag(parser)
    parser.add_argument("--split", default="dev", choices=SPLITS, help="split of the data sets")
    parser.add_argument("--beam-size", type=positive, nargs="+", default=[1, 3, 5], metavar="K", help="beam sizes")
    parser.add_argument("--length-penalty", type=float, help="see Captioner.caption")
    parser.add_argument("--batch-size", type=positive, default=32, help="images that go through the network together")
    parser.add_argument("--limit", type=positive, help="at most this number of images of each data set, the first ones")
    parser.add_argument(
        "--truth", type=positive, metavar="N", help="also measure on N images of each set whether maps tell the truth"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda; auto takes a GPU where there is one")
    parser.add_argument("--engine", choices=ENGINES, help="what computes the captions; default: as in Captioner")
    parser.add_argument("--cache", default="", help="folder for copies and indexes of shards; as in training")
    parser.add_argument("--output", help="folder of the report; default: evaluation-SPLIT in the model's")
    options = parser.parse_args(arguments)
    # Of several processes one logs.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    try:
        with distributed(options.device) as processes:
            run(options, processes)
    except (CheckpointError, DatasetError, ValueError, OSError) as error:
        log.error("error: %s", error)
        return 1
    return 0


def run(options: argparse.Namespace, processes: Distributed) -> None:
    """Evaluate a model, print the table, and write the figures, the captions and the report, from the first process."""
    device = options.device if processes.size == 1 else str(processes.device)
    captioner = Captioner.from_pretrained(options.model, device, options.engine)
    datasets = read_sources(options.data, options.cache, processes)
    sets = read_split(datasets, options.split, options.limit)
    home = Path(options.model) if Path(options.model).is_dir() else Path()
    folder = Path(options.output or home / f"evaluation-{options.split}")
    folder.mkdir(parents=True, exist_ok=True)  # an error is raised before the captioning, not after
    search = {} if options.length_penalty is None else {"length_penalty": options.length_penalty}
    train = [caption for dataset in datasets for item in dataset.splits["train"] for caption in item.captions]
    known = {tuple(tokenize(caption)) for caption in train} or None
    beams = [
        {
            name: evaluate(captioner, items, beam_size, options.batch_size, known, processes, **search)
            for name, items in sets.items()
        }
        for beam_size in options.beam_size
    ]
    if not processes.is_first:
        return
    widest = max(beams, key=lambda evaluations: next(iter(evaluations.values())).beam_size)
    left_out = {metric: why for one in widest.values() for metric, why in one.scores.left_out.items()}
    for metric, why in left_out.items():
        log.warning("%s left out: %s", metric, why)
    print(table(beams) + "\n")
    pointing = {}
    for name, items in sets.items():
        print(f"{name}, confidence and CIDEr, Spearman's correlation: {widest[name].calibration.correlation:.2f}")
        try:
            found = check_pointing(captioner, items)
            pointing[name] = dataclasses.asdict(found)
            print(f"{name}, two photographs side by side: {found}")
        except ValueError as error:
            log.warning("%s, pointing left out: %s", name, error)
    truth = measure_truth(options, captioner, sets) if options.truth else {}

    figures = {
        "model": str(options.model),
        "data": list(sets),
        "split": options.split,
        "options": {"batch_size": options.batch_size, "device": captioner.engine.device, **search},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "pycocoevalcap")}},
        "pointing": pointing,
        "truth": truth,
        "evaluations": [evaluations_json(evaluations) for evaluations in beams],
    }
    captions = [entry for name, items in sets.items() for entry in captions_json(widest[name], items)]
    for name, values in (("scores.json", figures), ("captions.json", captions)):
        with replacing(folder / name) as path:
            path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")
    title = f"{options.model} on {' and '.join(sets)} {options.split}"
    write_report(folder / "report.html", title, table(beams), {name: (widest[name], sets[name]) for name in sets})
    log.info("report: %s", folder / "report.html")


def measure_truth(
    options: argparse.Namespace, captioner: Captioner, sets: Mapping[str, Sequence[CaptionedImage]]
) -> dict[str, dict[str, Any]]:
    """Print what `training.truth` measures on each data set. Returns the figures."""
    network = Captioner.from_pretrained(options.model, options.device, engine="torch").model
    truth = {}
    for name, items in sets.items():
        try:
            found = check_truth(captioner, network, items, options.truth)
            truth[name] = dataclasses.asdict(found)
            print(f"\n{name}, whether maps tell the truth\n\n{found}")
        except ValueError as error:
            log.warning("%s, truth left out: %s", name, error)
    return truth


if __name__ == "__main__":
    sys.exit(main())
