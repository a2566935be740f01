"""Anything a user has becomes one safe RGB image, and that the model's input."""

import io
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

ImageSource = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray | torch.Tensor
MAX_PIXELS = 100_000_000

# Pillow warns of odd metadata in files that it reads well. Images are read in threads, in which Python's context
# manager for warnings is not safe, so its warnings are switched off once.
warnings.filterwarnings("ignore", module=r"PIL\.")
pillow_limit = threading.Lock()


class ImageError(ValueError):
    """An image that cannot be read; the message names it and says why."""


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image from wherever it is.

    Args:
        source: a path, encoded bytes, an open binary file (left open), a PIL image, an array (height, width),
            (height, width, 1), (height, width, 3) or (height, width, 4) of booleans, integers or floats in [0, 1],
            or a tensor (channels, height, width) of the same.
        max_pixels: larger images are refused, before they are decoded.

    Returns:
        The whole image in RGB, upright as its EXIF orientation says, transparency on white; of an animation the
        first frame.

    Raises:
        ImageError: it cannot be read; the message names the input and the reason.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        image = from_array(source)
        check_size(image, source, max_pixels)
        return to_rgb(image)
    if isinstance(source, Image.Image):
        check_size(source, source, max_pixels)
        return decode(source, source)
    return decode(open_image(source, max_pixels), source)


def open_image(source: Any, max_pixels: int) -> Image.Image:
    """An image file opened and its size checked, not decoded yet."""
    if isinstance(source, str) and source.partition("://")[1]:
        raise ImageError(f"{describe(source)} is an address; download the image first and give its path")
    try:
        if isinstance(source, bytes | bytearray | memoryview):
            if len(source) == 0:
                raise ImageError(f"{describe(source)} is empty")
            file: Any = io.BytesIO(source)
        elif isinstance(source, str | os.PathLike):
            path = Path(source)
            if path.is_dir():
                raise ImageError(f"{describe(source)} is a folder, not an image")
            if path.stat().st_size == 0 and path.is_file():
                raise ImageError(f"{describe(source)} is empty")
            file = path
        elif hasattr(source, "read"):
            file = source
        else:
            raise ImageError(
                f"cannot read an image from a {type(source).__name__}; give a path, bytes, an open file, "
                "a PIL image, an array or a tensor"
            )
        image = open_unlimited(file)
    except UnidentifiedImageError as error:
        raise ImageError(f"{describe(source)} is not an image, or of a kind that cannot be read") from error
    except FileNotFoundError as error:
        raise ImageError(f"{describe(source)} does not exist") from error
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"{describe(source)} cannot be opened: {reason(error)}") from error
    check_size(image, source, max_pixels)
    return image


def open_unlimited(file: Any) -> Image.Image:
    """`Image.open` without Pillow's own limit, which is fixed, counts otherwise, and warns before it refuses."""
    with pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def decode(image: Image.Image, source: Any) -> Image.Image:
    """The pixels of an opened image, upright and in RGB."""
    try:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, MemoryError) as error:
        raise ImageError(f"{describe(source)} is damaged or truncated: {reason(error)}") from error


def check_size(image: Image.Image, source: Any, max_pixels: int) -> None:
    """Raise ImageError for an image without pixels or with too many."""
    if image.width == 0 or image.height == 0:
        raise ImageError(f"{describe(source)} has no pixels: it is {image.width} x {image.height}")
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{describe(source)} has too many pixels: {image.width} x {image.height} is more than "
            f"{max_pixels / 1e6:g} million; raise max_pixels to allow it"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes in RGB, transparency composited on white, 16 and 32 bits scaled to 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        image = to_eight_bits(image)
    if image.has_transparency_data:
        # From grey with premultiplied alpha Pillow knows one way out only.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Modes I, I;16 and F in grey of 8 bits; converted by Pillow, all above 255 would be white.

    The scale is the first of the usual ones that holds the brightest pixel, or that pixel itself.
    """
    values = np.asarray(image).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    brightest = float(values.max())
    if image.mode.startswith("I;16"):
        scale = 65535.0
    else:
        limits = (1.0, 255.0) if image.mode == "F" else (255.0, 65535.0)
        scale = next((limit for limit in limits if brightest <= limit), brightest)
    return Image.fromarray((values / scale * 255).round().astype(np.uint8))


def from_array(source: np.ndarray | torch.Tensor) -> Image.Image:
    """A PIL image of an array (height, width[, channels]) or a tensor (channels, height, width)."""
    if isinstance(source, torch.Tensor):
        if source.dim() != 3 or source.shape[0] not in (1, 3, 4):
            raise ImageError(
                f"{describe(source)} should have the shape (channels, height, width) with 1, 3 or 4 channels"
            )
        array = source.detach().cpu().permute(1, 2, 0)
        values = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    else:
        values = source
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4):
        raise ImageError(f"{describe(source)} should have the shape (height, width) or (height, width, 1, 3 or 4)")
    if 0 in values.shape:
        raise ImageError(f"{describe(source)} has no pixels")
    values = array_to_bytes(values, source)
    if values.shape[2] == 1:
        values = values[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(values))


def array_to_bytes(values: np.ndarray, source: Any) -> np.ndarray:
    """Pixel values as uint8: integers as they are, 16 bits scaled down, booleans and floats in [0, 1] scaled up."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint16:
        return (values / 257).round().astype(np.uint8)
    if not (np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer)):
        raise ImageError(f"{describe(source)} has values of type {values.dtype}, which are no brightness")
    top = 1 if np.issubdtype(values.dtype, np.floating) else 255
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top + 1e-3):
        raise ImageError(
            f"{describe(source)} should hold floats from 0 to 1 or integers from 0 to 255, and goes from "
            f"{values.min()} to {values.max()}; for floats up to 255, divide by 255"
        )
    return (values.clip(0, top) * (255 // top)).round().astype(np.uint8)


def describe(source: Any) -> str:
    """A short name of an input, for messages."""
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source) or "an empty path"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"<{len(source)} bytes>"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"<{source.mode} image of {source.width} x {source.height}>"
    if isinstance(source, np.ndarray | torch.Tensor):
        kind = "array" if isinstance(source, np.ndarray) else "tensor"
        return f"<{kind} of shape {tuple(source.shape)}>"
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else f"<{type(source).__name__}>"


def reason(error: BaseException) -> str:
    """What an exception says, in one line, or its kind where it says nothing."""
    return str(error).partition("\n")[0] or type(error).__name__


@dataclass(frozen=True)
class Preprocessing:
    """How images become the encoder's input; it travels with the weights.

    size: rows and columns that the whole image is resized to, nothing cropped, its aspect ratio given up.
    mean, std: of the three channels, by which values in [0, 1] are normalised; ImageNet's by default.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB images of any sizes as one batch.

        Returns:
            (batch, 3, rows, columns) in float32, channels last in memory.
        """
        batch = np.empty((len(images), *self.size, 3), dtype=np.uint8)
        for pixels, image in zip(batch, images, strict=True):
            pixels[:] = np.asarray(self.resize(image))
        tensor = torch.from_numpy(batch).permute(0, 3, 1, 2).float()
        mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (self.mean, self.std))
        return tensor.sub_(mean).div_(std)

    def resize(self, image: Image.Image) -> Image.Image:
        """The whole image at the size that the model reads; one of that size already is returned as it is."""
        if image.size == self.size[::-1]:
            return image
        return image.resize(self.size[::-1], Image.Resampling.BILINEAR)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """What `to_dict` gave.

        Raises:
            TypeError, ValueError: the values do not describe a preprocessing.
        """
        plain = cls(**{name: tuple(value) for name, value in values.items()})
        rows, columns = plain.size
        if rows < 1 or columns < 1 or len(plain.mean) != 3 or len(plain.std) != 3 or not all(plain.std):
            raise ValueError(f"preprocessing {values} makes no sense")
        return plain
