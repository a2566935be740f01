"""Captions for images, with a map of the attention for every word.

from captioner import caption
print(caption("photo.jpg"))
"""

import functools
import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from captioner.options import Options
from captioner.pretrained import DEFAULT_MODEL, list_models

if TYPE_CHECKING:
    from captioner.api import Captioner
    from captioner.captions import Caption
    from captioner.images import ImageError
    from captioner.modelfile import CheckpointError
    from captioner.reading import Source

__version__ = "0.1.0"
__all__ = ["Caption", "Captioner", "CheckpointError", "ImageError", "caption", "list_models"]


@overload
def caption(  # type: ignore[overload-overlap]  # a string is a sequence of strings
    images: "Source",
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
    *,
    errors: Literal["raise"] = "raise",
    **options: Unpack[Options],
) -> "Caption": ...


@overload
def caption(  # type: ignore[overload-overlap]
    images: "Source",
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
    *,
    errors: Literal["return"],
    **options: Unpack[Options],
) -> "Caption | ImageError": ...


@overload
def caption(
    images: "Sequence[Source]",
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
    *,
    errors: Literal["raise"] = "raise",
    **options: Unpack[Options],
) -> "list[Caption]": ...


@overload
def caption(
    images: "Sequence[Source]",
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
    *,
    errors: Literal["return"],
    **options: Unpack[Options],
) -> "list[Caption | ImageError]": ...


def caption(
    images: "Source | Sequence[Source]",
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
    **options: Any,
) -> "Caption | ImageError | list[Caption] | list[Caption | ImageError]":
    """Caption one image, or each image of a list.

    Args:
        images: a path, bytes, an open file, a PIL image, an array, a tensor; or a list of these.
        model: a model in the package (see `list_models`), a file, a folder, or a Hugging Face Hub id; see
            `Captioner.from_pretrained`.
        device: where to compute: "cpu", "cuda", "auto".
        options: see `Captioner.caption`.

    Returns:
        A `Caption`; for a list, a list of them in the same order.

    Raises:
        CheckpointError: there is no such model.
        ImageError: an image cannot be read.
        ValueError: there is no such device, or an option has a value that cannot be used.
    """
    name = os.path.abspath(model) if isinstance(model, os.PathLike) else model or DEFAULT_MODEL
    return _load(name, device).caption(images, **options)


@functools.lru_cache(maxsize=2)
def _load(model: str, device: str | None) -> "Captioner":
    # Loading takes longer than captioning, so the last two models stay in memory.
    return importlib.import_module("captioner.api").Captioner.from_pretrained(model, device)


def __getattr__(name: str) -> object:
    # Pillow and ONNX Runtime take time to import: `captioner --help` should not wait for them.
    homes = {"CheckpointError": "modelfile", "ImageError": "images", "Caption": "captions", "Captioner": "api"}
    if name not in homes:
        raise AttributeError(f"module 'captioner' has no attribute {name!r}")
    return getattr(importlib.import_module(f"captioner.{homes[name]}"), name)
