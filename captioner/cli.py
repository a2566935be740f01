"""The `captioner` command. Heavy modules are imported after the arguments are parsed."""

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from captioner import __version__
from captioner.files import SUFFIXES, is_shard
from captioner.options import ENGINES, LIMITS, check_option
from captioner.pretrained import DEFAULT_MODEL, list_models

if TYPE_CHECKING:
    from captioner.bulk import Outcome
    from captioner.captions import Caption
    from captioner.images import ImageError

EPILOG = """\
examples:
  captioner photo.jpg
  captioner photos/ --recursive --format jsonl --output captions.jsonl --heatmaps maps/
  captioner *.jpg --beam-size 3 --alternatives 2
  captioner photos/ --min-confidence 0.4
  captioner photo.jpg --hide 120,80,200,150
  captioner photo.jpg --model small
  captioner photo.jpg --temperature 0.8 --top-p 0.9 --seed 1
  cat photo.jpg | captioner -
  captioner 'shards/{000..099}.tar' --output captions/
  captioner table.parquet --column image --format parquet --output captions/

One named image gives its caption alone, and its alternatives on lines of their own. Several images or a folder give a
line each: path, caption and alternatives with tabs between them, or JSON with --format jsonl.
Shards (.tar as WebDataset writes them) and tables (.parquet) give a file each in the folder --output, JSON Lines or
Parquet; those that exist are left as they are, so the same command continues a run that was stopped.

exit status: 0 all captioned, 1 some could not be, 2 wrong usage, 130 interrupted
"""


class Input:
    """One image to caption.

    path: its path, or "-" for standard input.
    name: name of its heatmap: its path within the folder that was given.
    error: why it cannot be read, if that is known already.
    """

    def __init__(self, path: str, name: str, error: str = "") -> None:
        self.path, self.name, self.error = path, name, error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    options = parse(arguments)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        discard_output()  # the reader of the output has closed it
        return 1


def export(arguments: Sequence[str] | None = None) -> int:
    """Run the command `captioner-export`. Returns its exit status: 0, or 2 where the model cannot be exported."""
    parser = argparse.ArgumentParser(
        "captioner-export",
        description="Write the graphs of a model into its file. With them ONNX Runtime captions without torch. "
        "With --web, write a page that captions inside the browser instead.",
    )
    parser.add_argument("model", help="a model in the package, a .safetensors file, or a folder with one")
    parser.add_argument(
        "--web",
        metavar="DIR",
        help="write the page with the model there, for any web server, and leave the model's file as it is",
    )
    parser.add_argument(
        "--onnxruntime-web",
        metavar="FILE",
        help="with --web: npm's package of that name, instead of fetching it with npm",
    )
    options = parser.parse_args(arguments)
    if options.onnxruntime_web and not options.web:
        parser.error("--onnxruntime-web is for --web")
    from captioner.api import find_model
    from captioner.modelfile import CheckpointError, model_file

    try:
        file = model_file(find_model(options.model))
        if options.web:
            from captioner.web import read_runtime, write_page

            write_page(file, Path(options.web), read_runtime(options.onnxruntime_web and Path(options.onnxruntime_web)))
            server = shlex.join(["python3", "-m", "http.server", "--directory", options.web])
            print(f"wrote {options.web}; to try it, run `{server}` and open http://localhost:8000")
        else:
            from captioner.network.export import export_file

            export_file(file)
            print(f"wrote the graphs into {file}")
    except (CheckpointError, ImportError, OSError, ValueError) as error:
        report(f"captioner-export: {error}")
        return 2
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Exits with status 2 and a message where it cannot be used."""
    parser = argparse.ArgumentParser(
        prog="captioner",
        description="Caption images, and draw the attention of the network for every word.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="an image, a folder of images, a shard, or - for stdin"
    )
    parser.add_argument("-r", "--recursive", action="store_true", help="also the folders within folders")
    parser.add_argument(
        "--format",
        choices=("text", "jsonl", "parquet"),
        help="of the output (default: text, and for shards jsonl; parquet is for shards alone)",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="write the captions there instead of to stdout; for shards a folder"
    )
    parser.add_argument("--heatmaps", metavar="DIR", help="write a picture for each image: every word over its map")
    parser.add_argument(
        "--heatmap-scale",
        choices=("caption", "word"),
        default="caption",
        help="brightness up to the largest weight of the whole caption, or of each word (default: caption)",
    )
    parser.add_argument(
        "--heatmaps-of",
        choices=("attention", "evidence"),
        default="attention",
        help="where the network looked, or what each word rests on: how far its log-probability falls when a region "
        "and its neighbours are hidden from attention (default: attention)",
    )
    for option, meaning in (("--hide", "hide a box from attention"), ("--attend", "let attention use only this box")):
        parser.add_argument(
            option,
            type=box,
            action="append",
            metavar="X,Y,W,H",
            help=f"{meaning}: left, top, width and height in pixels; may be given several times",
        )
    parser.add_argument(
        "--list-models", action=ListModels, nargs=0, help="show the models in the package, the default first, and exit"
    )
    parser.add_argument("--device", help="cpu, cuda, mps, or auto for a GPU where there is one (default: cpu)")
    parser.add_argument(
        "--engine", choices=ENGINES, help="default: ONNX Runtime on the CPU where the model has graphs for it"
    )
    add_caption_options(parser)
    parser.add_argument("--version", action="version", version=f"captioner {__version__}")
    options = parser.parse_args(arguments)
    if options.images.count("-") > 1:
        parser.error("- can be given once only")
    options.shards = [name for name in options.images if is_shard(name)]
    if options.shards:
        check_bulk(parser, options)
    elif options.format == "parquet":
        parser.error("--format parquet is for shards (.tar) and tables (.parquet)")
    options.format = options.format or ("jsonl" if options.shards else "text")
    return options


def add_caption_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `captioner` and `training.bulk` share; see `stream_options`."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="a model in the package, a model folder, or a Hugging Face Hub id (default: %(default)s)",
    )
    parser.add_argument("--column", default="image", help="of Parquet tables: the pictures (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=number("batch_size"), default=32, metavar="N", help="images at a time (default: 32)"
    )
    search = parser.add_argument_group("search")
    search.add_argument(
        "--beam-size", type=number("beam_size"), default=5, metavar="N", help="1 is greedy search (default: 5)"
    )
    search.add_argument(
        "--alternatives", type=number("alternatives"), default=0, metavar="N", help="other captions to show"
    )
    search.add_argument("--max-length", type=number("max_length"), metavar="N", help="most words in a caption")
    search.add_argument(
        "--temperature",
        type=number("temperature"),
        metavar="T",
        help="sample words; below 1 from a sharper distribution, above 1 from a flatter one",
    )
    search.add_argument(
        "--top-p",
        type=number("top_p"),
        metavar="P",
        help="sample from the likeliest words that together reach the probability P",
    )
    search.add_argument("--seed", type=number("seed"), metavar="N", help="the same seed gives the same samples")
    parser.add_argument(
        "--min-confidence",
        type=number("min_confidence"),
        default=0.0,
        metavar="P",
        help="leave out captions of lower confidence (geometric mean of the words' probabilities), 0 to 1",
    )
    parser.add_argument(
        "--max-megapixels",
        type=number("max_megapixels"),
        default=100,
        metavar="N",
        help="larger images are refused (default: 100)",
    )


def check_bulk(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with status 2 and a message where the options do not suit shards."""
    if others := [name for name in options.images if name not in options.shards]:
        parser.error(f"{options.shards[0]} is a shard and {others[0]} is not; give shards in a command of their own")
    if not options.output:
        parser.error("for shards, --output names a folder, which gets a file of captions for each")
    if options.format == "text" or options.heatmaps:
        parser.error(f"shards have no {'heatmaps' if options.heatmaps else '--format text; give jsonl or parquet'}")


class ListModels(argparse.Action):
    """Print the models in the package and exit, as `--version` does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Called by argparse where the option is given."""
        print(model_table())
        parser.exit()


def model_table() -> str:
    """A table of the models in the package, the default first: size, encoder, image size and scores."""
    rows = [("name", "MB", "encoder", "image size", "scores")]
    for model in list_models():
        scores = [
            f"{data}: " + ", ".join(f"{metric} {100 * score[metric]:.1f}" for metric in ("BLEU-4", "CIDEr"))
            for data, score in model.scores.items()
        ]
        height, width = model.image_size
        rows.append((model.name, f"{model.megabytes:.1f}", model.encoder, f"{height} x {width}", "; ".join(scores)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def run(options: argparse.Namespace) -> int:
    """Caption the inputs. Returns the exit status."""
    if options.shards:
        return run_shards(options)
    inputs = list(find_inputs(options.images, options.recursive))
    if not inputs:
        print(f"captioner: no image in {', '.join(options.images)}", file=sys.stderr)
        return 1
    from captioner.api import Captioner
    from captioner.images import quieten_pillow
    from captioner.modelfile import CheckpointError

    quieten_pillow()
    try:
        captioner = Captioner.from_pretrained(options.model, options.device, options.engine)
        # Options that do not suit the model raise here, before any image is read.
        results = captioner.stream(
            (sys.stdin.buffer if item.path == "-" else item.path for item in inputs if not item.error),
            evidence=bool(options.heatmaps) and options.heatmaps_of == "evidence",
            **stream_options(options),
        )
    except (CheckpointError, ImportError, ValueError) as error:
        report(f"captioner: {error}")
        return 2
    try:
        with contextlib.closing(results), open_output(options.output) as output:
            failed = write_all(results, inputs, options, output)
    except BrokenPipeError:
        raise
    except OSError as error:
        report(f"captioner: cannot write {options.output or 'the output'}: {error.strerror or error}")
        if not options.output:
            discard_output()
        return 1
    return 1 if failed else 0


def run_shards(options: argparse.Namespace) -> int:
    """Caption the shards that are not done, each into a file of its own. Returns the exit status."""
    from captioner.api import Captioner
    from captioner.bulk import caption_jobs, plan, remaining
    from captioner.images import quieten_pillow
    from captioner.modelfile import CheckpointError
    from captioner.shards import shard_names

    quieten_pillow()
    try:
        jobs = remaining(plan(shard_names(options.shards), Path(options.output), options.format))
        captioner = Captioner.from_pretrained(options.model, options.device, options.engine)
        outcomes = caption_jobs(captioner, jobs, **job_options(options))
        failed = report_outcomes(outcomes, len(jobs), "captioner")
    except (CheckpointError, ImportError, ValueError) as error:
        report(f"captioner: {error}")
        return 2
    except OSError as error:
        report(f"captioner: cannot write to {options.output}: {error.strerror or error}")
        return 1
    return 1 if failed else 0


def report_outcomes(outcomes: "Iterable[Outcome]", total: int, command: str) -> int:
    """Report what could not be captioned, and on a terminal the progress. Returns the number of shards concerned."""
    failed = 0
    for done, outcome in enumerate(outcomes, 1):
        if outcome.problem:
            failed += 1
            report(f"{command}: {outcome.problem}")
        if sys.stderr.isatty():
            print(f"\r{done}/{total} shards", end="\n" if done == total else "", file=sys.stderr, flush=True)
    return failed


def job_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `captioner.bulk.caption_shard`."""
    return {"column": options.column, "min_confidence": options.min_confidence, **stream_options(options)}


def stream_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `Captioner.stream` that were given."""
    names = ("beam_size", "alternatives", "batch_size", "max_length", "temperature", "top_p", "seed", "hide", "attend")
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    return given | {"max_pixels": options.max_megapixels * 1e6}


def find_inputs(named: Sequence[str], recursive: bool) -> Iterator[Input]:
    """The images given, and those in the folders given, which are found by their suffix and sorted by name."""
    for name in named:
        if name == "-":
            yield Input(name, "stdin", "" if sys.stdin else "standard input is closed")
        elif os.path.isdir(name):
            yield from find_in_folder(Path(name), recursive)
        else:
            yield Input(name, os.path.basename(name))


def find_in_folder(folder: Path, recursive: bool) -> Iterator[Input]:
    """The images in a folder, sorted by path, then an error for each folder that cannot be listed."""
    errors: list[OSError] = []
    paths: list[Path] = []
    for place, _, names in os.walk(folder, onerror=errors.append):
        paths += [path for path in (Path(place, name) for name in names) if path.suffix.lower() in SUFFIXES]
        if not recursive:
            break
    for path in sorted(paths):
        yield Input(str(path), str(path.relative_to(folder)))
    for error in errors:
        yield Input(error.filename, "", f"{error.filename} cannot be listed: {error.strerror}")


def write_all(
    results: Iterator["Caption | ImageError"], inputs: Sequence[Input], options: argparse.Namespace, output: TextIO
) -> int:
    """Write a line for every input as soon as its result is known. Returns the number of failures.

    Args:
        results: of the inputs without an error.
    """
    from captioner.bulk import doubt

    alone = len(options.images) == 1 and not os.path.isdir(options.images[0])
    failed = 0
    taken: set[Path] = set()
    for done, item in enumerate(inputs, 1):
        result = item.error or next(results)
        caption, error = (None, str(result)) if isinstance(result, str | Exception) else (result, "")
        if caption and (error := doubt(caption, item.path, options.min_confidence)):
            caption = None
        elif caption and caption.words and options.heatmaps:
            error = save_heatmap(
                caption, Path(options.heatmaps), item.name, taken, options.heatmap_scale, options.heatmaps_of
            )
        if error:
            failed += 1
            report(f"captioner: {error}")
        output.write(line(item.path, caption, error, options.format, alone))
        output.flush()
        if sys.stderr.isatty() and len(inputs) > 1:
            print(f"\r{done}/{len(inputs)}", end="\n" if done == len(inputs) else "", file=sys.stderr, flush=True)
    return failed


def line(path: str, caption: "Caption | None", error: str, style: str, alone: bool) -> str:
    """The line written for one image; in text format empty for a failed one, since the error is on stderr."""
    if style == "jsonl":
        return json.dumps({"path": path, **({"error": error} if caption is None else caption.to_dict())}) + "\n"
    if caption is None:
        return ""
    captions = [str(caption), *map(str, caption.alternatives)]
    if alone:
        return "".join(f"{text}\n" for text in captions)
    return "\t".join(map(escape, [path, *captions])) + "\n"


def escape(text: str) -> str:
    """Escape tabs and newlines, which separate columns and lines."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def save_heatmap(caption: "Caption", folder: Path, name: str, taken: set[Path], scale: str, of: str) -> str:
    """Write the figure of a caption to `folder`/`name`.png, with a number where that name is taken in this run.

    Returns an error message, or an empty string.
    """
    path = folder / f"{name}.png"
    number = 2
    while path in taken:
        path = folder / f"{name}-{number}.png"
        number += 1
    taken.add(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        caption.figure(scale=scale, of=of).save(path)
    except OSError as error:
        return f"cannot write {path}: {error.strerror or error}"
    return ""


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[TextIO]:
    """The output file, or standard output. File names that are not UTF-8 are written as they are."""
    if path:
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
            yield file
    else:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="surrogateescape")
        yield sys.stdout


def discard_output() -> None:
    """Redirect stdout to the null device, so that flushing it at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(message: str) -> None:
    """Write a line to stderr, over the progress counter on a terminal. Control characters are escaped."""
    encoding = sys.stderr.encoding or "utf-8"
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
    text = shown.encode(encoding, "backslashreplace").decode(encoding)
    print(f"\r{text}" if sys.stderr.isatty() else text, file=sys.stderr)


def positive(text: str) -> int:
    """Parse an integer of at least 1, for options of other commands, which have no other limits."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def box(text: str) -> list[float]:
    """Parse a box of `Captioner.caption`, such as "120,80,200,150"."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"must be four numbers with commas between them, not {text!r}")
    return numbers


def number(option: str) -> Callable[[str], float]:
    """A parser of that option's value for argparse."""

    def read(text: str) -> float:
        try:
            return check_option(option, int(text) if LIMITS[option].whole else float(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {LIMITS[option]}, not {text!r}") from None

    return read


if __name__ == "__main__":
    sys.exit(main())
