"""The console commands. Their modules are imported here, so that a missing package is one sentence."""

import importlib
import sys

from . import command


def run(name: str) -> int:
    """Run the module of that name as a command. Returns its exit status; 1 if a package that it needs is missing."""
    try:
        module = importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError as error:
        print(f"{command(name)} needs the package {error.name}: pip install 'captioner[training]'", file=sys.stderr)
        return 1
    return int(module.main())


def train() -> int:
    """`captioner-train`."""
    return run("train")


def evaluate() -> int:
    """`captioner-evaluate`."""
    return run("evaluate")


def compare() -> int:
    """`captioner-compare`."""
    return run("compare")


def prepare() -> int:
    """`captioner-prepare`."""
    return run("prepare")


def bulk() -> int:
    """`captioner-bulk`."""
    return run("bulk")


def shard() -> int:
    """`captioner-shard`."""
    return run("shard")
