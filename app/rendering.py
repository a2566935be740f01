"""Captions as the page shows them, as the API returns them, and as files to download."""

import base64
import csv
import io
import json
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioner import Caption
from captioner.heatmap import shrink, upsample

from .service import Refused

PHOTO_WIDTH = 720  # pixels of a photo on the page, which is at most twice as high
MAP_SIZE = 28  # rows and columns of a map on the page; the browser interpolates between them


def viewer_result(captions: Sequence[Caption], without: Sequence[tuple[list[float], int]] = ()) -> dict[str, Any]:
    """A caption for viewer.js: the photo, and each word's maps, which the browser draws over it.

    Args:
        captions: the caption; then, if regions are hidden, the caption without them.
        without: for each of them what `Service.without_most_attended` gives.

    Returns:
        photo: a data URI; width, height: its pixels; heads: maps of each word; regions: weights of each map; grid:
        their rows and columns; displacement: see `Caption`; most: the regions that `without` hides; captions: the
        caption and its alternatives, see `viewer_caption`; hidden: the same without the regions that are hidden, or
        None; hidden_regions: how many these are.
    """
    caption = captions[0]
    photo = page_photo(caption)
    shown = [
        [viewer_caption(one, without[n][0] if without else None), *map(viewer_caption, one.alternatives)]
        for n, one in enumerate(captions)
    ]
    return {
        "photo": data_uri(photo),
        "width": photo.width,
        "height": photo.height,
        "heads": caption.heads,
        "regions": math.prod(caption.attention.shape[1:]),
        "grid": caption.attention.shape[1:],
        "displacement": caption.displacement,
        "most": without[0][1] if without else None,
        "captions": shown[0],
        "hidden": shown[1] if len(shown) > 1 else None,
        "hidden_regions": 0 if captions[-1].mask is None else int((~captions[-1].mask).sum()),
    }


def viewer_caption(caption: Caption, without: Sequence[float] | None = None) -> dict[str, Any]:
    """The text of a caption, its confidence, and each word.

    A word has its probability, that without the regions it looked at most (where it is given), its maps of attention
    (first the mean of the heads), and its map of evidence (where it was measured).
    """
    heads = [None, *range(caption.heads)] if caption.heads > 1 else [None]
    regions = caption.attention[0].size if caption.words else 0
    return {
        "text": caption.sentence(),
        "confidence": caption.confidence,
        "words": [
            {
                "word": word,
                "probability": float(np.exp(caption.word_log_probabilities[number])),
                "without": None if without is None else without[number],
                "maps": [packed_map(caption.maps(head)[number], caption.displacement, regions) for head in heads],
                "evidence": None
                if caption.evidence is None
                else packed_map(caption.evidence[number], caption.displacement),
            }
            for number, word in enumerate(caption.words)
        ],
    }


def packed_map(values: np.ndarray, displacement: tuple[float, float], unit: float = 1) -> dict[str, Any]:
    """A map (rows, columns) for the browser.

    Args:
        values: weights, or evidence in nats.
        displacement: see `Caption`.
        unit: `peak` is counted in parts of 1 / unit: the number of regions for weights.

    Returns:
        bytes: base64 of MAP_SIZE * MAP_SIZE bytes, the largest of which is 255, or all are 0; peak: the largest value,
        which that 255 stands for; of weights as a multiple of the weight of an even map.
    """
    heat = upsample(values, (MAP_SIZE, MAP_SIZE), displacement, values.max() or 1.0)
    packed = base64.b64encode((255 * heat).round().astype(np.uint8).tobytes()).decode()
    return {"bytes": packed, "peak": float(values.max() * unit)}


def page_photo(caption: Caption) -> Image.Image:
    """The photo of a caption, at most PHOTO_WIDTH pixels wide."""
    return shrink(caption.image, PHOTO_WIDTH, enlarge=False)


def data_uri(picture: Image.Image) -> str:
    """A picture as the data URI of a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def api_answer(answer: Caption | str) -> dict[str, Any]:
    """A caption as the API returns it, or the sentence that says why there is none."""
    return {"error": answer} if isinstance(answer, str) else answer.to_dict(attention=True)


def file_name(path: str | Refused) -> str:
    """The name of an uploaded file."""
    return path.file if isinstance(path, Refused) else Path(path).name


def table_rows(answers: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Answers as rows of the table on the page: file, caption, confidence, error."""
    return [[one["file"], *(one.get(key, "") for key in ("caption", "confidence", "error"))] for one in answers]


def as_json(answers: Sequence[dict[str, Any]]) -> bytes:
    """The answers for many photos as a JSON file."""
    return (json.dumps(list(answers), indent=1, ensure_ascii=False) + "\n").encode()


def as_csv(answers: Sequence[dict[str, Any]]) -> bytes:
    """The answers for many photos as a CSV file; the byte order mark tells spreadsheets that it is UTF-8."""
    text = io.StringIO()
    table = csv.DictWriter(text, ["file", "caption", "confidence", "error"], extrasaction="ignore")
    table.writeheader()
    for answer in answers:
        # A spreadsheet takes a cell that begins like a formula as text only after a quote.
        table.writerow({key: f"'{cell}" if str(cell)[:1] in tuple("=+-@") else cell for key, cell in answer.items()})
    return text.getvalue().encode("utf-8-sig")


def as_zip(names: Sequence[str], captions: Sequence[Caption]) -> bytes:
    """A ZIP file with `Caption.figure` of each photo, named after the photo; equal names are numbered."""
    buffer = io.BytesIO()
    taken: set[str] = set()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, caption in zip(names, captions, strict=True):
            stem, number = Path(name).stem or "photo", 1
            while (entry := f"{stem}{'' if number == 1 else f'-{number}'}.jpg") in taken:
                number += 1
            taken.add(entry)
            picture = io.BytesIO()
            figure = caption.figure() if caption.words else page_photo(caption)
            figure.save(picture, "JPEG", quality=88)
            archive.writestr(entry, picture.getvalue())
    return buffer.getvalue()
