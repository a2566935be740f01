"""Average the weights of several models of the same shape:
`python -m training.average runs/a runs/b --output runs/mean`.

The mean of models that were tuned from the same one in different ways is often better than each of them, at no
additional cost (Wortsman et al. 2022, "Model soups").
"""

import argparse
import sys
from collections.abc import Sequence

from captioner.api import find_model
from captioner.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint

from . import command
from .optimisation import mean_weights


def average(models: Sequence[Checkpoint]) -> Checkpoint:
    """A model with the mean of the weights; its words, preprocessing and integer buffers are those of the first.

    Raises:
        ValueError: there is no model, or two differ in shape or in words.
    """
    if not models:
        raise ValueError("there is no model to average")
    first = models[0]
    for other in models[1:]:
        if other.model.config != first.model.config or other.vocabulary != first.vocabulary:
            raise ValueError("models can be averaged where they have the same sizes, the same grid and the same words")
    states = [checkpoint.model.state_dict() for checkpoint in models]
    first.model.load_state_dict(mean_weights(states, [1 / len(states)] * len(states)))
    about = {"mean of": [checkpoint.about for checkpoint in models]}
    return Checkpoint(first.model, first.vocabulary, first.preprocessing, about, first.graphs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 done, 1 failed."""
    parser = argparse.ArgumentParser(prog=command("average"), description="Average the weights of models.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or names of models of the same shape")
    parser.add_argument("--output", required=True, help="folder of the new model")
    options = parser.parse_args(arguments)
    try:
        save_checkpoint(options.output, average([load_checkpoint(find_model(name)) for name in options.models]))
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
