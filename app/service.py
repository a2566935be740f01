"""What the page and the API ask for: captions of files as plain data, and errors as sentences for people."""

import base64
import csv
import ctypes
import dataclasses
import io
import json
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioner import Caption, Captioner, ImageError
from captioner.explain import explain
from captioner.heatmap import shrink, upsample
from captioner.images import MAX_PIXELS, load_image

PHOTO_WIDTH = 720  # pixels of the photograph on the page, which is at most twice as high
MAP_SIZE = 28  # rows and columns of a map on the page, which the browser makes smooth
MOST_CAPTIONS, MOST_WORDS = 10, 50


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

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `Captioner.caption`."""
        shared = {"alternatives": self.captions - 1, "max_length": self.max_length}
        if self.sampling:
            return shared | {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return shared | {"beam_size": max(self.beam_size, self.captions)}


class Refused(ValueError):
    """A request that cannot be answered; the message is a sentence for the person who asked."""


def settings_of(
    model: str, beam_size: float, captions: float, max_length: float, sampling: bool, *chance: float
) -> Settings:
    """Settings as they come from sliders and from the API.

    Raises:
        Refused: a number is out of its range.
    """
    temperature, top_p, seed = chance
    limits = {
        "beam size": (beam_size, 1, 20),
        "number of captions": (captions, 1, MOST_CAPTIONS),
        "maximum length": (max_length, 1, MOST_WORDS),
        "temperature": (temperature, 0.05, 5),
        "top-p": (top_p, 0.01, 1),
        "seed": (seed, 0, 2**31 - 1),
    }
    for name, (value, low, high) in limits.items():
        if not isinstance(value, int | float) or not low <= value <= high:
            raise Refused(f"The {name} should be a number from {low:g} to {high:g}, not {value}.")
    whole = (int(beam_size), int(captions), int(max_length))
    return Settings(model, *whole, bool(sampling), float(temperature), float(top_p), int(seed))


class Service:
    """The models that were loaded, and what can be asked of them.

    Args:
        models: by the name that the page shows; at least one.
        max_pixels: larger images are refused before they are decoded.
    """

    def __init__(self, models: dict[str, Captioner], max_pixels: int = MAX_PIXELS) -> None:
        self.models = models
        self.max_pixels = max_pixels

    def captioner(self, name: str) -> Captioner:
        """The model of that name, the first where the name is empty. Raises Refused where there is none."""
        if not name:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise Refused(f"There is no model {name!r}; there are {', '.join(self.models)}.")
        return self.models[name]

    def caption(self, requests: Sequence[tuple[str | None, Settings]]) -> list[Caption | str]:
        """A caption for each file, or a sentence that says why there is none; equal settings go through together."""
        answers: dict[int, Caption | str] = {}
        photos: dict[Settings, dict[int, Image.Image]] = {}
        for number, (path, settings) in enumerate(requests):
            try:
                self.captioner(settings.model)
                photos.setdefault(settings, {})[number] = self.load(path)
            except Refused as error:
                answers[number] = str(error)
        for settings, group in photos.items():
            found = self.captioner(settings.model).caption(list(group.values()), **settings.options())
            answers |= dict(zip(group, found, strict=True))
        return [answers[number] for number in range(len(requests))]

    def load(self, path: str | None) -> Image.Image:
        """The photograph in a file. Raises Refused."""
        if not path:
            raise Refused("Choose a photo first.")
        try:
            return load_image(path, self.max_pixels)
        except ImageError as error:
            raise Refused(sentence_for(error)) from error

    def explain(self, caption: Caption, model: str) -> list[dict[str, Any]]:
        """The numbers of every step of a caption; see `captioner.explain`."""
        return [step.to_dict() for step in explain(self.captioner(model), caption.image, caption)]


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
