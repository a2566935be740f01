"""Captions for photographs, and where the network looked for every word.

from captioner import caption
print(caption("photo.jpg"))
"""

import functools
import os
from typing import Any

from captioner.api import DEFAULT_MODEL, Caption, Captioner
from captioner.checkpoint import CheckpointError
from captioner.images import ImageError

__all__ = ["Caption", "Captioner", "CheckpointError", "ImageError", "caption"]

# Loading takes longer than captioning: the last few models stay in memory.
_load = functools.lru_cache(maxsize=2)(Captioner.from_pretrained)


def caption(
    images: Any, model: str | os.PathLike[str] = DEFAULT_MODEL, device: str | None = None, **options: Any
) -> Any:
    """Say what is in one image, or in each image of a list.

    Args:
        images: a path, bytes, an open file, a PIL image, an array, a tensor; or a list of these.
        model: the model to use: a folder, a name, a Hugging Face Hub id.
        device: where to compute: "cpu", "cuda", "auto".
        options: see `Captioner.caption`.

    Returns:
        A `Caption`, or a list of them in the order of the images.
    """
    return _load(str(model), device).caption(images, **options)
