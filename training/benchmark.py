"""Speed, as ratios within one run: `python -m training.benchmark`.

Captioning time is divided by the time of one encoder pass, the minimum for any captioner with that encoder. Training
and search are compared with the usual tutorial implementation of the same model (`speed/tutorial.py`), which must give
the same results before it is timed. Beside each figure stands its physical limit, from the matrix rate and the memory
bandwidth that are measured in the same run.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from captioner.checkpoint import CheckpointError
from captioner.cli import positive
from captioner.network.engine import choose_device
from captioner.pretrained import DEFAULT_MODEL

from . import command
from .speed.captioning import Subject, measure_captions, measure_parts, measure_stream
from .speed.measure import Figure, Skipped
from .speed.processes import measure_cold_start, measure_demo, measure_peer
from .speed.steps import measure_decoder, measure_self_critical, measure_throughput, measure_tutorial

SECTIONS: dict[str, Callable[[Subject], list[Figure]]] = {
    "caption": measure_captions,
    "parts": measure_parts,
    "cold": measure_cold_start,
    "demo": measure_demo,
    "training": measure_decoder,
    "self-critical": measure_self_critical,
    "tutorial": measure_tutorial,
    "throughput": measure_throughput,
    "stream": measure_stream,
    "blip": measure_peer,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 done, 1 something could not be measured that should be."""
    options, status = parse(arguments), 0
    figures: list[Figure] = []
    print(f"{'figure':>9} {'target':>8} {'limit':>9} {'share':>7}")
    try:
        device = str(choose_device(options.device))
        subject = Subject(options.model, device, options.images, options.repeats, options.recipe, options.photographs)
        for name in options.only:
            try:
                found = SECTIONS[name](subject)
            except Skipped as reason:
                print(f"skipped {name}: {reason}", file=sys.stderr)
            except RuntimeError as error:
                print(f"error: {name}: {error}", file=sys.stderr)
                status = 1
            else:
                for figure in found:
                    print(line_of(figure), flush=True)
                figures += found
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for figure in measured_rates(subject):
        print(line_of(figure))
        figures.append(figure)
    if options.output:
        options.output.write_text(json.dumps(by_name(figures), indent=1) + "\n", "utf-8")
    return status


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog=command("benchmark"),
        description="Measure the speed of a model. Each figure is printed with its target, where there is one, its "
        "physical limit, and its share of the whole or of the matrix rate.",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or name of the model")
    parser.add_argument(
        "--only", type=sections, default=list(SECTIONS), help=f"of {','.join(SECTIONS)}; all by default"
    )
    parser.add_argument("--device", default="cpu", help="where to measure; on a GPU what needs the CPU is skipped")
    parser.add_argument("--images", type=positive, default=32, help="images in a batch")
    parser.add_argument("--repeats", type=positive, default=5, help="number of runs, of which the median is taken")
    parser.add_argument("--recipe", type=Path, help="TOML file of the training run (default: the model's)")
    parser.add_argument("--photographs", type=int, default=16, help="files of 12 megapixels in a stream; 0 for none")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the figures there")
    return parser.parse_args(arguments)


def sections(text: str) -> list[str]:
    """The names in a list with commas. Raises ArgumentTypeError for one that is no section."""
    names = text.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"no section {unknown[0]!r}; choose some of {','.join(SECTIONS)}")
    return names


def measured_rates(subject: Subject) -> list[Figure]:
    """The rates of the machine that the limits were computed from."""
    return [Figure(f"measured: {name}", rate / 1e9) for name, rate in subject.rates.found.items()]


def line_of(figure: Figure) -> str:
    """A figure in one line of the table."""
    target, limit = ("" if number is None else f"{number:.2f}" for number in (figure.target, figure.limit))
    share = "" if figure.share is None else f"{100 * figure.share:.1f} %"
    return f"{figure.value:9.2f} {target:>8} {limit:>9} {share:>7}  {figure.name}"


def by_name(figures: Sequence[Figure]) -> dict[str, float]:
    """The figures, and the limits and shares of those that have them, by their names."""
    found = {}
    for figure in figures:
        found[figure.name] = figure.value
        for kind in ("target", "limit", "share"):
            if (number := getattr(figure, kind)) is not None:
                found[f"{figure.name}, {kind}"] = number
    return found


if __name__ == "__main__":
    sys.exit(main())
