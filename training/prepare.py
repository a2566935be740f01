"""Download and unpack the public data sets: `python -m training.prepare flickr8k --root data/flickr8k`.

If it is interrupted at any point, the same command continues there.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from . import command
from .data.download import PrepareError, say
from .data.items import CaptionDataset, DatasetError
from .data.prepare import RECIPES, Recipe, prepare


def main(
    argv: Sequence[str] | None = None,
    recipes: Mapping[str, Recipe] = RECIPES,
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """Run the command line. Returns the exit status: 0 the data set is ready, 1 it is not, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog=command("prepare"),
        description="Download, verify and unpack a captioning data set. Run again to continue what was interrupted.",
        epilog="coco has the photographs of 2014 in Karpathy's splits, on which scores are published; coco2014 and "
        "coco2017 have COCO's own train and val. Train with --data coco for all three.",
    )
    parser.add_argument("dataset", choices=list(recipes))
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder to make the data set in")
    arguments = parser.parse_args(argv)
    recipe, root = recipes[arguments.dataset], arguments.root
    say(f"{arguments.dataset}: {recipe.terms}")
    try:
        _report(prepare(recipe, root, wait))
    except DatasetError as error:
        say(f"error: {error}")
        if recipe.by_hand:
            say(recipe.by_hand.format(root=root))
        return 1
    except PrepareError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; run the same command again to continue")
        return 130
    return 0


def _report(dataset: CaptionDataset) -> None:
    print(f"{dataset.name}: {dataset.layout}")
    for split, images in dataset.splits.items():
        print(f"{split}: {len(images)} images, {sum(len(image.captions) for image in images)} captions")
    print(f"problems: {len(dataset.problems)}")
    for problem in dataset.problems[:10]:
        say(problem)


if __name__ == "__main__":
    sys.exit(main())
