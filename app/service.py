"""What the page and the API ask for: captions of files as plain data, and errors as sentences for people."""

import base64
import csv
import ctypes
import dataclasses
import io
import json
import logging
import math
import os
import reprlib
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from captioner import Caption, Captioner, ImageError
from captioner.explain import explain
from captioner.heatmap import shrink, upsample
from captioner.images import MAX_PIXELS
from captioner.options import Options

PHOTO_WIDTH = 720  # pixels of the photograph on the page, which is at most twice as high
MAP_SIZE = 28  # rows and columns of a map on the page, which the browser makes smooth
MOST_CAPTIONS, MOST_WORDS = 10, 50
FAILED = "The server failed on this request. The cause is in its log; the other requests are not affected."

log = logging.getLogger("captioner.app")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to caption. Requests with the same settings are captioned in one batch.

    model: a name of `Service.models`; empty for the first.
    beam_size, captions, max_length: see `Captioner.caption`; captions counts the best one too.
    temperature, top_p, seed: used where `sampling` is set.
    """

    model: str = ""
    beam_size: int = 5
    captions: int = 3
    max_length: int = 22
    sampling: bool = False
    temperature: float = 1.0
    top_p: float = 0.9
    seed: int = 0

    def options(self) -> Options:
        """The options of `Captioner.caption`."""
        shared: Options = {"alternatives": self.captions - 1, "max_length": self.max_length}
        if self.sampling:
            return {**shared, "temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return {**shared, "beam_size": max(self.beam_size, self.captions)}


class Refused(ValueError):
    """A request that cannot be answered; the message is a sentence for the person who asked.

    file: the name of the file that it is about, where that is known.
    """

    def __init__(self, message: str, file: str = "") -> None:
        super().__init__(message)
        self.file = file


# The path of an uploaded file and how to caption it; either may be known to be bad.
Request = tuple[str | Refused | None, Settings | Refused]


def settings_of(model: Any, beam_size: Any, captions: Any, max_length: Any, sampling: Any, *chance: Any) -> Settings:
    """Settings as they come from sliders and from the API, where they may be anything that JSON can say.

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
    """As `settings_of`, but what is wrong is returned, as part of a `Request`."""
    try:
        return settings_of(*values)
    except Refused as error:
        return error


def number(name: str, value: Any, low: float, high: float, whole: bool = False) -> Any:
    """`value` as a float, or as an int where it has to be whole. Raises Refused where it is no such number."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        limit = f"{high:g}" if high < 1e6 else f"{high:,.0f}"
        raise Refused(f"The {name} should be a {kind} from {low:g} to {limit}, not {shown(value)}.")
    return int(value) if whole else float(value)


def shown(value: Any) -> str:
    """A value as a message shows it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not write out an integer of more than 4,300 digits
        return "a number of thousands of digits"


def guarded(answer: Callable[[], T]) -> T | str:
    """What `answer` returns, or a sentence for the person who asked; what nobody expected is in the server's log."""
    try:
        return answer()
    except Refused as error:
        return str(error)
    except Exception:
        log.exception("a request failed")
        return FAILED


class Service:
    """The models that were loaded, and what can be asked of them.

    Args:
        models: by the name that the page shows; at least one.
        max_pixels: larger images are refused before they are decoded.
        concurrency: batches that are captioned at the same time.
    """

    def __init__(self, models: dict[str, Captioner], max_pixels: int = MAX_PIXELS, concurrency: int = 1) -> None:
        self.models = models
        self.max_pixels = max_pixels
        # The network always runs in the same few threads: each that ever ran it keeps memory of its own.
        self.workers = ThreadPoolExecutor(concurrency, thread_name_prefix="captions")

    def close(self) -> None:
        """End the threads; those who still wait get an error."""
        self.workers.shutdown(wait=False, cancel_futures=True)

    def captioner(self, name: str) -> Captioner:
        """The model of that name, the first where the name is empty. Raises Refused where there is none."""
        if not name:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise Refused(f"There is no model {shown(name)}; there are {', '.join(self.models)}.")
        return self.models[name]

    def answer(self, requests: Sequence[Request], keep_annotations: bool = False) -> list[Caption | str]:
        """As `caption`, in a thread for the network."""
        found = self.workers.submit(self.caption, requests, keep_annotations).result()
        return_memory()
        return found

    def caption(self, requests: Sequence[Request], keep_annotations: bool = False) -> list[Caption | str]:
        """A caption for each file, or a sentence that says why there is none; equal settings go through together.

        Whatever goes wrong with one request, the others have their answers.

        Args:
            requests: the files.
            keep_annotations: keep what `explain` needs.
        """
        answers: dict[int, Caption | str] = {}
        groups: dict[Settings, dict[int, str]] = {}
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
                # One of them is enough to make all fail, so each is tried alone. What fails again is logged.
                alone = [guarded(partial(run, path)) for path in paths.values()]
                found = [one if isinstance(one, str) else one[0] for one in alone]
            answers |= dict(zip(paths, found, strict=True))
        return [answers[number] for number in range(len(requests))]

    def check(self, path: str | Refused | None, settings: Settings | Refused) -> tuple[str, Settings]:
        """The file of a request and its settings. Raises Refused where either cannot be used."""
        if isinstance(path, Refused):
            raise path
        if isinstance(settings, Refused):
            raise settings
        self.captioner(settings.model)
        if not path:
            raise Refused("Choose a photo first.")
        return path, settings

    def run(self, settings: Settings, keep_annotations: bool, *paths: str) -> list[Caption | str]:
        """The captions of files with the same settings, or sentences about those that cannot be read."""
        options: Options = {
            **settings.options(),
            "max_pixels": self.max_pixels,
            "keep_annotations": keep_annotations,
        }
        found = self.captioner(settings.model).caption(paths, errors="return", **options)
        return [sentence_for(result) if isinstance(result, ImageError) else result for result in found]

    def explain(self, caption: Caption, model: str) -> list[dict[str, Any]]:
        """The numbers of every step of a caption; see `captioner.explain`. In a thread for the network."""
        return [step.to_dict() for step in self.workers.submit(explain, self.captioner(model), caption).result()]


def sentence_for(error: ImageError) -> str:
    """What people are told of an image that cannot be read, without the server's paths."""
    reason = str(error)
    if "too many pixels" in reason:
        return "This picture is too large: it has too many pixels."
    if "is empty" in reason:
        return "This file is empty."
    if "damaged" in reason:
        return "This picture is damaged and cannot be read to its end."
    return "This file is not a picture that can be read."


# Linux's C library keeps freed memory for each thread that used it; it gives it back when asked to.
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def return_memory() -> None:
    """Give memory that is no longer used back to the system."""
    if TRIM:
        TRIM(0)


def view(caption: Caption) -> dict[str, Any]:
    """A caption as the page shows it: the photograph, and for every word its maps, which the browser lays over it."""
    photo = shrink(caption.image, PHOTO_WIDTH, enlarge=False)
    return {
        "photo": data_uri(photo),
        "width": photo.width,
        "height": photo.height,
        "heads": caption.heads,
        "regions": math.prod(caption.attention.shape[1:]),
        "captions": [caption_view(each) for each in (caption, *caption.alternatives)],
    }


def caption_view(caption: Caption) -> dict[str, Any]:
    """The text of a caption, how sure the model is of it and of each word, and each word's maps (mean first)."""
    heads = [None, *range(caption.heads)] if caption.heads > 1 else [None]
    return {
        "text": caption.sentence(),
        "confidence": caption.confidence,
        "log_probability": caption.log_probability,
        "words": [
            {
                "word": word,
                "confidence": float(np.exp(caption.word_log_probabilities[number])),
                "maps": [packed_map(caption.maps(head)[number], caption.displacement) for head in heads],
            }
            for number, word in enumerate(caption.words)
        ],
    }


def packed_map(weights: np.ndarray, displacement: tuple[float, float]) -> dict[str, Any]:
    """A map for the browser.

    Returns:
        bytes: base64 of MAP_SIZE * MAP_SIZE bytes, the largest 255; peak: the map's largest weight, as a multiple of
        an even map's, for which that 255 stands.
    """
    heat = upsample(weights, (MAP_SIZE, MAP_SIZE), displacement)
    packed = base64.b64encode((255 * heat).round().astype(np.uint8).tobytes()).decode()
    return {"bytes": packed, "peak": float(weights.max() * weights.size)}


def data_uri(picture: Image.Image) -> str:
    """A picture as a JPEG inside an address."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def as_json(rows: Sequence[dict[str, Any]]) -> bytes:
    """The table of many photographs as JSON."""
    return (json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n").encode()


def as_csv(rows: Sequence[dict[str, Any]]) -> bytes:
    """The table of many photographs as CSV."""
    text = io.StringIO()
    table = csv.DictWriter(text, ["file", "caption", "confidence", "error"], extrasaction="ignore")
    table.writeheader()
    # A cell that begins like a formula is text to a spreadsheet only with a quote before it.
    table.writerows(
        {key: f"'{value}" if str(value)[:1] in tuple("=+-@") else value for key, value in row.items()} for row in rows
    )
    return text.getvalue().encode("utf-8-sig")


def as_zip(names: Sequence[str], captions: Sequence[Caption]) -> bytes:
    """A picture for each photograph: every word over its map. Equal names are numbered."""
    buffer = io.BytesIO()
    taken: set[str] = set()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, caption in zip(names, captions, strict=True):
            stem, number = Path(name).stem or "photo", 1
            while (entry := f"{stem}{'' if number == 1 else f'-{number}'}.jpg") in taken:
                number += 1
            taken.add(entry)
            picture = io.BytesIO()
            figure = caption.figure() if caption.words else shrink(caption.image, PHOTO_WIDTH, enlarge=False)
            figure.save(picture, "JPEG", quality=88)
            archive.writestr(entry, picture.getvalue())
    return buffer.getvalue()
