"""The options of captioning and their limits. Nothing heavy is imported here, so that the command starts quickly."""

import operator
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypedDict


class Grid(Protocol):
    """A Boolean array (rows, columns). NumPy is not imported here."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""


# Some regions of a picture: a Boolean grid (rows, columns), or one box or several (left, top, width, height) in pixels.
Regions = Grid | Sequence[Sequence[bool]] | Sequence[float] | Sequence[Sequence[float]]

ENGINES = ("onnx", "onnx-float32", "torch")


class Options(TypedDict, total=False):
    """The options of `captioner.Captioner.caption`, which describes them."""

    batch_size: int
    beam_size: int
    alternatives: int | None
    max_length: int
    length_penalty: float
    block_ngrams: int
    temperature: float | None
    top_p: float | None
    seed: int | None
    max_pixels: float
    keep_annotations: bool
    evidence: bool
    evidence_window: int
    hide: Regions | None
    attend: Regions | None


class Limits(NamedTuple):
    """The limits of one option: from `low` (excluded if `above`) to `high`; only integers if `whole`."""

    whole: bool
    low: float
    high: float
    above: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} {f'above {self.low:g}' if self.above else f'from {self.low}'} to {self.high}"


LIMITS = {
    "batch_size": Limits(True, 1, 1024),
    "beam_size": Limits(True, 1, 1000),
    "alternatives": Limits(True, 0, 999),
    "max_length": Limits(True, 1, 1000),
    "length_penalty": Limits(False, -10, 10),
    "block_ngrams": Limits(True, 0, 1000),
    "temperature": Limits(False, 0, 1000, above=True),
    "top_p": Limits(False, 0, 1, above=True),
    "seed": Limits(True, -(2**63), 2**63 - 1),  # 64 bits
    "evidence_window": Limits(True, 1, 999),
    "max_pixels": Limits(False, 1, 10**12),
    "max_megapixels": Limits(False, 1e-6, 10**6),
    "min_confidence": Limits(False, 0, 1),
}


def check_option(name: str, value: object) -> int | float:
    """Check the value of an option and return it as a Python number.

    Raises:
        ValueError: the value is outside the limits; the message names the option, its limits and the value.
    """
    limits = LIMITS[name]
    try:
        number = operator.index(value) if limits.whole else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    # Not a number fails every comparison.
    if not (limits.low < number if limits.above else limits.low <= number) or not number <= limits.high:
        raise ValueError(f"{name} must be {limits}, not {value!r}")
    return number
