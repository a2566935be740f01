"""Captions for the page and the API: settings that are checked, batches, and errors as sentences for people."""

import ctypes
import dataclasses
import json
import logging
import os
import reprlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from captioner import Caption, Captioner, ImageError
from captioner.explain import Explanation, explain, without_most_attended
from captioner.images import MAX_PIXELS
from captioner.options import Options

MOST_CAPTIONS, MOST_WORDS = 10, 50
MOST_ATTENDED = 9  # a word's probability is shown without one in so many regions, those that it looked at most
FAILED = "The server failed on this request. The cause is in its log; the other requests are not affected."

log = logging.getLogger("captioner.app")
T = TypeVar("T")


Box = tuple[float, float, float, float]  # left, top, width, height


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to caption. Requests with the same settings are captioned in one batch.

    model: a name of `Service.models`; empty for the first.
    beam_size, max_length: see `Captioner.caption`.
    captions: number of captions, the best one included.
    temperature, top_p, seed: see `Captioner.caption`; used only with `sampling`.
    evidence: see `Captioner.caption`.
    hide: boxes of the photo that attention may not use, (left, top, width, height) in pixels.
    """

    model: str = ""
    beam_size: int = 5
    captions: int = 3
    max_length: int = 22
    sampling: bool = False
    temperature: float = 1.0
    top_p: float = 0.9
    seed: int = 0
    evidence: bool = False
    hide: tuple[Box, ...] = ()

    def options(self) -> Options:
        """The options of `Captioner.caption`."""
        shared: Options = {
            "alternatives": self.captions - 1,
            "max_length": self.max_length,
            "evidence": self.evidence,
            "hide": self.hide or None,
        }
        if self.sampling:
            return {**shared, "temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return {**shared, "beam_size": max(self.beam_size, self.captions)}


class Refused(ValueError):
    """A request that cannot be answered. The message is a sentence for the person who sent it.

    file: name of the file that is at fault, if known.
    """

    def __init__(self, message: str, file: str = "") -> None:
        super().__init__(message)
        self.file = file


# The path of an uploaded file, or its caption with annotation vectors, and how to caption it; or what is wrong with it.
Request = tuple[str | Caption | Refused | None, Settings | Refused]


def settings_of(model: Any, beam_size: Any, captions: Any, max_length: Any, sampling: Any, *chance: Any) -> Settings:
    """Settings from the values that the page or the API sent, which may be any JSON.

    Raises:
        Refused: a value is of the wrong type or out of its range.
    """
    temperature, top_p, seed = chance
    if not (model is None or isinstance(model, str)):
        raise Refused(f"The model should be a name, not {shown(model)}.")
    if not isinstance(sampling, bool):
        raise Refused(f"Sampling should be true or false, not {shown(sampling)}.")
    return Settings(
        model or "",
        number("beam size", beam_size, 1, 20, whole=True),
        number("number of captions", captions, 1, MOST_CAPTIONS, whole=True),
        number("maximum length", max_length, 1, MOST_WORDS, whole=True),
        sampling,
        number("temperature", temperature, 0.05, 5),
        number("top-p", top_p, 0.01, 1),
        number("seed", seed, 0, 2**31 - 1, whole=True),
    )


def read_settings(*values: Any) -> Settings | Refused:
    """As `settings_of`, but `Refused` is returned, as part of a `Request`."""
    try:
        return settings_of(*values)
    except Refused as error:
        return error


def number(name: str, value: Any, low: float, high: float, whole: bool = False) -> Any:
    """`value` as a float, or as an int if `whole`. Raises Refused if it is not a number from `low` to `high`."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        limit = f"{high:g}" if high < 1e6 else f"{high:,.0f}"
        raise Refused(f"The {name} should be a {kind} from {low:g} to {limit}, not {shown(value)}.")
    return int(value) if whole else float(value)


def shown(value: Any) -> str:
    """A value for a message, shortened if it is long."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not print integers of more than 4,300 digits
        return "a number of thousands of digits"


def guarded(answer: Callable[[], T]) -> T | str:
    """What `answer` returns, or a sentence that says why it failed. Unexpected errors are logged."""
    try:
        return answer()
    except Refused as error:
        return str(error)
    except Exception:
        log.exception("a request failed")
        return FAILED


class Service:
    """Captions files with the models that were loaded.

    Args:
        models: by the name that the page shows; at least one.
        max_pixels: larger images are refused before they are decoded.
        concurrency: batches that are captioned at the same time.
    """

    def __init__(self, models: dict[str, Captioner], max_pixels: int = MAX_PIXELS, concurrency: int = 1) -> None:
        self.models = models
        self.max_pixels = max_pixels
        # The networks run in a fixed set of threads, because each thread that ran one keeps memory of its own.
        self.workers = ThreadPoolExecutor(concurrency, thread_name_prefix="captions")

    def close(self) -> None:
        """End the threads; requests that wait get an error."""
        self.workers.shutdown(wait=False, cancel_futures=True)

    def captioner(self, name: str) -> Captioner:
        """The model of that name, or the first if the name is empty. Raises Refused if there is no such model."""
        if not name:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise Refused(f"There is no model {shown(name)}; there are {', '.join(self.models)}.")
        return self.models[name]

    def answer(self, requests: Sequence[Request], keep_annotations: bool = False) -> list[Caption | str]:
        """As `caption`, in one of the threads for the networks."""
        found = self.workers.submit(self.caption, requests, keep_annotations).result()
        return_memory()
        return found

    def caption(self, requests: Sequence[Request], keep_annotations: bool = False) -> list[Caption | str]:
        """A caption for each request, or a sentence that says why there is none.

        Requests with equal settings are captioned in one batch. An error in one request does not affect the others.

        Args:
            requests: the files and their settings.
            keep_annotations: keep the annotation vectors, which `explain` needs.
        """
        answers: dict[int, Caption | str] = {}
        groups: dict[Settings, dict[int, str | Caption]] = {}
        for number, request in enumerate(requests):
            try:
                path, settings = self.check(*request)
                groups.setdefault(settings, {})[number] = path
            except Refused as error:
                answers[number] = str(error)
        for settings, paths in groups.items():
            run = partial(self.run, settings, keep_annotations)
            try:
                found = run(*paths.values())
            except Exception:
                # One file can make its batch fail, so each is tried alone. Those that fail again are logged.
                alone = [guarded(partial(run, path)) for path in paths.values()]
                found = [one if isinstance(one, str) else one[0] for one in alone]
            answers |= dict(zip(paths, found, strict=True))
        return [answers[number] for number in range(len(requests))]

    def check(
        self, path: str | Caption | Refused | None, settings: Settings | Refused
    ) -> tuple[str | Caption, Settings]:
        """The file and the settings of a request. Raises Refused if either cannot be used."""
        if isinstance(path, Refused):
            raise path
        if isinstance(settings, Refused):
            raise settings
        self.captioner(settings.model)
        if not path:
            raise Refused("Choose a photo first.")
        return path, settings

    def run(self, settings: Settings, keep_annotations: bool, *photos: str | Caption) -> list[Caption | str]:
        """Captions of photos with the same settings; for a file that cannot be read, a sentence."""
        options: Options = {
            **settings.options(),
            "max_pixels": self.max_pixels,
            "keep_annotations": keep_annotations,
        }
        found = self.captioner(settings.model).caption(photos, errors="return", **options)
        return [sentence_for(result) if isinstance(result, ImageError) else result for result in found]

    def explain(self, caption: Caption, model: str, **options: Any) -> list[Explanation]:
        """The numbers of every step of a caption (see `captioner.explain`), computed in a thread for the networks."""
        return self.workers.submit(explain, self.captioner(model), caption, **options).result()

    def without_most_attended(self, caption: Caption, model: str) -> tuple[list[float], int]:
        """The probability of each word without the regions that it looked at most, and how many these are."""
        regions = max(1, caption.attention[0].size // MOST_ATTENDED) if len(caption.words) else 0
        work = self.workers.submit(without_most_attended, self.captioner(model), caption, regions)
        return work.result().tolist(), regions


def sentence_for(error: ImageError) -> str:
    """What the page says of an image that cannot be read, without the server's paths."""
    reason = str(error)
    if "too many pixels" in reason:
        return "This picture is too large: it has too many pixels."
    if "leave attention none" in reason:
        return "All regions are hidden: leave the network one to look at."
    if "is empty" in reason:
        return "This file is empty."
    if "damaged" in reason:
        return "This picture is damaged and cannot be read to its end."
    return "This file is not a picture that can be read."


# glibc keeps the memory that a thread freed until it is asked to return it.
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def return_memory() -> None:
    """Return freed memory to the operating system."""
    if TRIM:
        TRIM(0)
