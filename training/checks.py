"""What the commands share that check a model on one data set after the other: their options, and the loop."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from captioner.checkpoint import CheckpointError
from captioner.pretrained import DEFAULT_MODEL

from .config import add_data_flag
from .data.items import SPLITS, CaptionedImage, DatasetError
from .data.sources import read_sources, read_split
from .memory import keep_freed_memory

log = logging.getLogger("training")

# Checks the pictures of the data set of that name, and gives the text to print. It raises ValueError where they allow
# no check.
Check = Callable[[str, Sequence[CaptionedImage]], str]


def add_check_flags(parser: argparse.ArgumentParser) -> None:
    """Add the model, the data sets and their split, and the device."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or name of the model")
    add_data_flag(parser)
    parser.add_argument("--split", default="dev", choices=SPLITS, help="which part of the data sets")
    parser.add_argument("--device", default="auto", help="cpu, cuda; auto takes a GPU where there is one")


def run_check(options: argparse.Namespace, prepare: Callable[[], Check]) -> int:
    """Print the result for each data set. Where one cannot be checked, that is said and the others go on.

    Args:
        options: of the flags above.
        prepare: loads the model, and gives the check.

    Returns:
        The exit status: 0 done, 1 failed.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    keep_freed_memory()
    try:
        check = prepare()
        sets = read_split(read_sources(options.data), options.split)
    except (CheckpointError, DatasetError, ValueError, OSError) as error:
        log.error("error: %s", error)
        return 1
    failed = False
    for name, items in sets.items():
        try:
            print(check(name, items))
        except ValueError as error:
            log.error("error: %s: %s", name, error)
            failed = True
    return int(failed)
