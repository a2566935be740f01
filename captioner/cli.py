"""The `captioner` command. Everything heavy is imported after the arguments are understood."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from captioner import __version__
from captioner.pretrained import DEFAULT_MODEL, list_models

if TYPE_CHECKING:
    from captioner.api import Caption, Captioner

SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .jp2 .ppm .pgm .pbm .tga".split())

EPILOG = """\
examples:
  captioner photo.jpg
  captioner photos/ --recursive --format jsonl --output captions.jsonl --heatmaps maps/
  captioner *.jpg --beam-size 3 --alternatives 2
  captioner photos/ --min-confidence 0.4
  captioner photo.jpg --model small
  captioner photo.jpg --temperature 0.8 --top-p 0.9 --seed 1
  cat photo.jpg | captioner -

One named image gives its caption alone, and its alternatives on lines of their own. Several images or a folder give a
line each: path, caption and alternatives with tabs between them, or JSON with --format jsonl.

exit status: 0 all captioned, 1 some could not be, 2 wrong usage, 130 interrupted
"""


class Input:
    """One image to caption.

    path: where it is, or "-" for standard input.
    name: what its heatmap is called: its path within the folder that was named.
    """

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    options = parse(arguments)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has had enough; Python must not complain when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options. Exits with status 2 and a message where they make no sense."""
    parser = argparse.ArgumentParser(
        prog="captioner",
        description="Say what is in photographs, and show where the network looked for every word.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image, a folder of images, or - for stdin")
    parser.add_argument("-r", "--recursive", action="store_true", help="also the folders within folders")
    parser.add_argument("--format", choices=("text", "jsonl"), default="text", help="of the output (default: text)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the captions there instead of to stdout")
    parser.add_argument("--heatmaps", metavar="DIR", help="write a picture for each image: every word over its map")
    parser.add_argument(
        "--heatmap-scale",
        choices=("caption", "word"),
        default="caption",
        help="brightness up to the largest weight of the whole caption, or of each word (default: caption)",
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="a model in the package, a model folder, or a Hugging Face Hub id (default: %(default)s)",
    )
    parser.add_argument(
        "--list-models", action=ListModels, nargs=0, help="show the models in the package, the default first, and exit"
    )
    parser.add_argument("--device", help="cpu, cuda, mps, or auto for a GPU where there is one (default: cpu)")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images at a time (default: 32)")
    search = parser.add_argument_group("search")
    search.add_argument("--beam-size", type=positive, default=5, metavar="N", help="1 is greedy search (default: 5)")
    search.add_argument("--alternatives", type=natural, default=0, metavar="N", help="other captions to show")
    search.add_argument("--max-length", type=positive, metavar="N", help="most words in a caption")
    search.add_argument(
        "--temperature", type=float, metavar="T", help="draw words by chance; below 1 safer, above bolder"
    )
    search.add_argument("--top-p", type=float, metavar="P", help="draw only among the likeliest words that reach P")
    search.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same captions")
    parser.add_argument(
        "--min-confidence",
        type=float,
        default=0.0,
        metavar="P",
        help="leave out captions that the model is less sure of, 0 to 1; the README says what to expect",
    )
    parser.add_argument("--max-megapixels", type=float, metavar="N", help="larger images are refused (default: 100)")
    parser.add_argument("--version", action="version", version=f"captioner {__version__}")
    options = parser.parse_args(arguments)
    if options.temperature is not None and not options.temperature > 0:
        parser.error(f"--temperature must be above 0, not {options.temperature}")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        parser.error(f"--top-p must be above 0 and at most 1, not {options.top_p}")
    if not 0 <= options.min_confidence <= 1:
        parser.error(f"--min-confidence must be from 0 to 1, not {options.min_confidence}")
    if options.images.count("-") > 1:
        parser.error("- can be given once only")
    return options


class ListModels(argparse.Action):
    """Prints the models in the package and ends the command, as `--version` does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Called by argparse where the option is given."""
        print(model_table())
        parser.exit()


def model_table() -> str:
    """A line for each model in the package, the default first: its size, encoder, image size and scores."""
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
    """Caption what the options name. Returns the exit status."""
    inputs = list(find_inputs(options.images, options.recursive))
    if not inputs:
        print(f"captioner: no image in {', '.join(options.images)}", file=sys.stderr)
        return 1
    from captioner.api import Captioner
    from captioner.checkpoint import CheckpointError

    try:
        captioner = Captioner.from_pretrained(options.model, options.device)
    except (CheckpointError, ValueError) as error:
        print(f"captioner: {error}", file=sys.stderr)
        return 2
    try:
        with open_output(options.output) as output:
            failed = caption_all(captioner, inputs, options, output)
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"captioner: cannot write: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


def find_inputs(named: Sequence[str], recursive: bool) -> Iterator[Input]:
    """The images named, and those in the folders named, by their suffix and in the order of their names."""
    for name in named:
        if name == "-" or not os.path.isdir(name):
            yield Input(name, "stdin" if name == "-" else os.path.basename(name))
            continue
        folder = Path(name)
        for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
            if path.suffix.lower() in SUFFIXES and not path.is_dir():
                yield Input(str(path), str(path.relative_to(folder)))


def caption_all(captioner: "Captioner", inputs: Sequence[Input], options: argparse.Namespace, output: TextIO) -> int:
    """Caption every input, write a line for each as soon as it is known. Returns how many failed."""
    search = {"beam_size": options.beam_size, "alternatives": options.alternatives, "batch_size": options.batch_size}
    for name in ("max_length", "temperature", "top_p", "seed"):
        if getattr(options, name) is not None:
            search[name] = getattr(options, name)
    alone = len(options.images) == 1 and not os.path.isdir(options.images[0])
    failed = done = 0
    taken: set[Path] = set()
    for batch in loaded(captioner, inputs, options):
        photos = [image for _, image in batch if not isinstance(image, Exception)]
        captions = iter(captioner.caption(photos, **search))
        for item, image in batch:
            caption, error = (None, str(image)) if isinstance(image, Exception) else (next(captions), "")
            if caption and caption.confidence < options.min_confidence:
                error = f"{item.path}: confidence {caption.confidence:.2f} is below {options.min_confidence:g}"
                caption = None
            if caption is None:
                failed += 1
                say(f"captioner: {error}")
            elif options.heatmaps and caption.words:
                save_heatmap(caption, Path(options.heatmaps), item.name, taken, options.heatmap_scale)
            output.write(line(item.path, caption, error, options.format, alone))
            output.flush()
            done += 1
            if sys.stderr.isatty() and len(inputs) > 1:
                print(f"\r{done}/{len(inputs)}", end="\n" if done == len(inputs) else "", file=sys.stderr, flush=True)
    return failed


def loaded(
    captioner: "Captioner", inputs: Sequence[Input], options: argparse.Namespace
) -> Iterator[list[tuple[Input, Any]]]:
    """Batches of inputs, each with its image or the ImageError that reading it gave.

    While the network works on one batch, threads read the next. Where no heatmap is wanted an image is at once
    resized to what the model reads, so that two batches of large photographs do not fill the memory.
    """
    from captioner.images import MAX_PIXELS, ImageError, load_image

    limit = round(options.max_megapixels * 1e6) if options.max_megapixels else MAX_PIXELS

    def load(item: Input) -> Any:
        try:
            image = load_image(sys.stdin.buffer.read() if item.path == "-" else item.path, limit)
        except ImageError as error:
            return error
        return image if options.heatmaps else captioner.preprocessing.resize(image)

    batches = [inputs[first : first + options.batch_size] for first in range(0, len(inputs), options.batch_size)]
    with ThreadPoolExecutor() as threads:
        try:
            ahead = [threads.submit(load, item) for item in batches[0]]
            for number, batch in enumerate(batches):
                current = ahead
                following = batches[number + 1] if number + 1 < len(batches) else []
                ahead = [threads.submit(load, item) for item in following]
                yield [(item, future.result()) for item, future in zip(batch, current, strict=True)]
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def line(path: str, caption: "Caption | None", error: str, style: str, alone: bool) -> str:
    """What is written of one image; nothing for a failed one in text, since the error is on stderr."""
    if style == "jsonl":
        return json.dumps({"path": path, **({"error": error} if caption is None else caption.to_dict())}) + "\n"
    if caption is None:
        return ""
    captions = [str(caption), *map(str, caption.alternatives)]
    if alone:
        return "".join(f"{text}\n" for text in captions)
    # A name with a tab or a newline in it must not look like another column or line.
    escaped = path.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
    return "\t".join([escaped, *captions]) + "\n"


def save_heatmap(caption: "Caption", folder: Path, name: str, taken: set[Path], scale: str) -> None:
    """Write the figure of a caption to `folder`/`name`.png, with a number where that name is taken in this run."""
    path = folder / f"{name}.png"
    number = 2
    while path in taken:
        path = folder / f"{name}-{number}.png"
        number += 1
    taken.add(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    caption.figure(scale=scale).save(path)


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[TextIO]:
    """The file to write captions to, or standard output. File names that are no UTF-8 pass through as they are."""
    if path:
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
            yield file
    else:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="surrogateescape")
        yield sys.stdout


def say(message: str) -> None:
    """Write a line to stderr, on a fresh line where a counter stands there."""
    text = message.encode(sys.stderr.encoding or "utf-8", "backslashreplace").decode(sys.stderr.encoding or "utf-8")
    print(f"\r{text}" if sys.stderr.isatty() else text, file=sys.stderr)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def natural(text: str) -> int:
    """A whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"cannot be negative, but is {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
