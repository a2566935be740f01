"""Training, evaluation and data preparation for `captioner`. It is installed as `captioner_training`."""

import sys
from pathlib import Path


def command(name: str) -> str:
    """The command line that runs a module of this package, for help and messages.

    Args:
        name: such as "train": `captioner-train` where the running program is such a console command, else
            `python -m` and the module.
    """
    installed = Path(sys.argv[0]).stem.startswith("captioner-")
    return f"captioner-{name}" if installed else f"python -m {__name__}.{name}"
