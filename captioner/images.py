"""Reading images safely: from any kind of source to an RGB image, and from that to the model's input."""

import io
import logging
import os
import re
import stat
import struct
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, TiffTags
from PIL.JpegImagePlugin import JpegImageFile

from captioner.arrays import is_tensor, to_numpy
from captioner.options import check_option


class Tensor(Protocol):
    """A torch tensor. Torch itself may not be installed."""

    def permute(self, *axes: int) -> Any:
        """Its axes in another order."""


ImageSource = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray | Tensor
MAX_PIXELS = 100_000_000
MAX_BYTES = 2**30
MAX_INPUT = 4096  # rows or columns of the encoder's input

# The formats that are opened, in the order of trial; TGA has no signature and comes last. Pillow's other formats
# are rare in photographs, start other programs (EPS), or are decoded before their size is known (ICO, ICNS).
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")
# Limits far above those of real files. Without them, one megabyte of a file could cost minutes or gigabytes.
MAX_SCANS = 100  # of a progressive JPEG; each covers the whole image. libtiff has the same limit.
MAX_STRIPS = 200_000  # of a TIFF
MAX_METADATA_READS = 10_000  # before the pixels; some formats join pieces of metadata in quadratic time
MAX_READS = 500_000

SCAN = re.compile(rb"\xff\xda\0[\x06\x08\x0a\x0c][\x01-\x04]")
AVIF_EXIF = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", re.DOTALL)
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
# Paths by which a shell passes an open file to a program, `<(...)`.
DESCRIPTOR = re.compile(r"/dev/(stdin|fd/\d+)|/proc/self/fd/\d+")
TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


class ImageError(ValueError):
    """An image that cannot be read, or not with these regions. The message names it and gives the reason."""


class NamedBytes(bytes):
    """The bytes of an image file, with a name for messages."""

    name = ""


def quieten_pillow() -> None:
    """Turn off Pillow's warnings of odd metadata in files that it reads well, and its log of what it also raises."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def load_image(source: ImageSource, max_pixels: float = MAX_PIXELS) -> Image.Image:
    """Read an image from any kind of source.

    Args:
        source: a path, encoded bytes, an open binary file (left open), a PIL image, an array (height, width),
            (height, width, 1), (height, width, 3) or (height, width, 4) of booleans, integers or floats in [0, 1],
            or a tensor (channels, height, width) of the same. Files hold one of `FORMATS` in up to 1 GiB.
        max_pixels: larger images are refused, before they are decoded. An AVIF that says less than its stream holds is
            decoded all the same, up to libavif's own limit of 16,384 x 16,384 pixels, and scaled to what it says.

    Returns:
        The whole image in RGB, upright as its EXIF orientation says, transparency on white; of an animation the
        first frame.

    Raises:
        ImageError: it cannot be read; the message names the input and the reason.
        ValueError: max_pixels is not a number of at least 1.
    """
    return load_reduced(source, max_pixels)[0]


def load_reduced(
    source: ImageSource, max_pixels: float = MAX_PIXELS, least: tuple[int, int] | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """Read an image, smaller than it is where that saves time.

    A JPEG holds blocks of 8 x 8 pixels in frequencies. It can be decoded at a half, a quarter or an eighth of its size
    without computing the other pixels. Each pixel is then about the mean of those it stands for.

    Args:
        source, max_pixels: as in `load_image`.
        least: pixels that the longer and the shorter side keep, if they have as many; None to read the whole image.

    Returns:
        The image as in `load_image`, and the width and height of the whole image, upright.

    Raises:
        ImageError, ValueError: as in `load_image`.
    """
    max_pixels = check_option("max_pixels", max_pixels)
    if isinstance(source, np.ndarray) or is_tensor(source):
        image = to_rgb(from_array(source, max_pixels))
        return image, image.size
    if isinstance(source, Image.Image):
        check_size(source.size, source, max_pixels)
        image = decode(source, source)
        return image, image.size
    opened = open_image(read_bytes(source), source, max_pixels)
    width, height = opened.size
    if least is not None:
        opened.draft(None, least if width >= height else least[::-1])  # does nothing but for a JPEG
    reduced = opened.size != (width, height)
    image = decode(opened, source)
    if not reduced:
        return image, image.size
    return image, (height, width) if orientation(opened) in SIDEWAYS else (width, height)


def read_bytes(source: Any) -> bytes:
    """The bytes of an image file; only the beginning where that is not the beginning of an image."""
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str | os.PathLike):
        data = read_path(source)
    elif hasattr(source, "read"):
        try:
            if getattr(source, "seekable", bool)():
                source.seek(0)
            data = read_stream(source, source)
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(f"{describe(source)} cannot be read: {reason(error)}") from error
    else:
        raise ImageError(
            f"cannot read an image from a {type(source).__name__}; give a path, bytes, an open file, "
            "a PIL image, an array or a tensor"
        )
    if not data:
        raise ImageError(f"{describe(source)} is empty")
    return data


def read_path(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file, or of a pipe that a shell passed as a path."""
    name = describe(path)
    if isinstance(path, str) and path.partition("://")[1]:
        raise ImageError(f"{name} is an address; download the image first and give its path")
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{name} is a folder, not an image")
        # A device may never end, and a pipe that nobody writes to could not even be opened.
        if not stat.S_ISREG(status.st_mode) and not DESCRIPTOR.fullmatch(os.fsdecode(path)):
            raise ImageError(f"{name} is a pipe or a device; give a file, or the data through standard input")
        if stat.S_ISREG(status.st_mode) and status.st_size > MAX_BYTES:
            raise ImageError(f"{name} has more than {MAX_BYTES >> 20} MiB")
        with open(path, "rb") as file:
            return read_stream(file, path)
    except ImageError:
        raise
    except FileNotFoundError as error:
        missing = "is a link to a file that does not exist" if os.path.islink(path) else "does not exist"
        raise ImageError(f"{name} {missing}") from error
    except Exception as error:
        raise ImageError(f"{name} cannot be opened: {reason(error)}") from error


def read_stream(file: Any, source: Any) -> bytes:
    """The bytes of an open file; only the beginning where that is not the beginning of an image."""
    data = io.BytesIO()
    while chunk := file.read(2**20):
        if isinstance(chunk, str):
            raise ImageError(f"{describe(source)} is open as text; open it in binary mode")
        first = data.tell() < 64
        data.write(chunk)
        if data.tell() > MAX_BYTES:
            raise ImageError(f"{describe(source)} has more than {MAX_BYTES >> 20} MiB")
        if first and data.tell() >= 64 and not possible_formats(data.getvalue()):
            break
    return data.getvalue()


class Reader(io.BytesIO):
    """A file in memory with a limit on the number of reads."""

    left = MAX_METADATA_READS

    def read(self, size: int | None = -1, /) -> bytes:
        """See `io.BytesIO.read`. Raises OSError after too many reads."""
        self.left -= 1
        if self.left < 0:
            raise OSError("it is in too many pieces")
        return super().read(size)


class Jpeg(JpegImageFile):
    """Pillow's JPEG reader without its EXIF reader, which copies the data of every tag; see `orientation`."""

    def getexif(self) -> Image.Exif:
        """Empty."""
        return Image.Exif()


def possible_formats(data: bytes) -> list[str]:
    """The formats among `FORMATS` that the first bytes of a file allow."""
    Image.init()  # returns at once when it has been called before
    found = []
    for name in FORMATS:
        _, accept = Image.OPEN.get(name, (None, lambda _: False))
        if accept is None:  # TGA: the kinds of colour map and of image, and the bits of a pixel
            allowed = data[1:2] in (b"\0", b"\1") and data[2:3] in (b"\1", b"\2", b"\3", b"\x09", b"\x0a", b"\x0b")
        else:
            allowed = accept(data[:16]) is True
        if allowed:
            found.append(name)
    return found


def open_image(data: bytes, source: Any, max_pixels: float) -> Image.Image:
    """An image file opened and its size checked, not decoded yet.

    The classes of the formats are called directly: `Image.open` has a limit of its own, which is fixed, and warns.
    """
    for name in possible_formats(data):
        try:
            image = open_format(name, data, max_pixels)
        except SyntaxError:  # Pillow's sign of another format
            continue
        except Exception as error:
            raise ImageError(f"{describe(source)} cannot be opened: {reason(error)}") from error
        check_size(image.size, source, max_pixels)
        return image
    raise ImageError(f"{describe(source)} is not an image that can be read; {', '.join(FORMATS)} can")


def open_format(name: str, data: bytes, max_pixels: float) -> Image.Image:
    """An image of the format of that name, not decoded yet. Raises what Pillow raises."""
    factory, _ = Image.OPEN[name]
    if name == "JPEG":
        factory = Jpeg
        if sum(1 for _ in SCAN.finditer(data)) > MAX_SCANS:
            raise ValueError(f"it has more than {MAX_SCANS} scans")
    elif name == "TIFF":
        check_tiff(data, max_pixels)
    elif name == "AVIF":
        # Pillow would copy the data of every tag. The format has an orientation besides EXIF's, which is the valid one.
        data = AVIF_EXIF.sub(rb"\1none", data)
    file = Reader(data)
    image = factory(file, "")
    if name == "TIFF":
        exif = image.getexif()
        for pointer in TiffTags.TAGS_V2_GROUPS:  # further directories, which were not checked
            exif.pop(pointer, None)
    file.left = MAX_READS
    return image


def check_tiff(data: bytes, max_pixels: float) -> None:
    """Raise ValueError for a TIFF whose first directory has more tags or strips than a real file.

    Pillow copies the data of every tag and lists every strip before the size of the image can be asked for.
    """
    order = "<" if data[:2] == b"II" else ">"
    big = data[2] == 43
    start = struct.unpack_from(f"{order}{'Q' if big else 'L'}", data, 8 if big else 4)[0]
    entries = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, start)[0]
    entry = struct.Struct(f"{order}HH{'Q' if big else 'L'}")
    value_size = 8 if big else 4
    total, tile = 0, [1, 1]
    for number in range(entries):
        at = start + (8 if big else 2) + number * (entry.size + value_size)
        tag, kind, count = entry.unpack_from(data, at)
        total += count * TIFF_SIZES.get(kind, 0)
        if tag in (273, 324) and count > MAX_STRIPS:  # StripOffsets, TileOffsets
            raise ValueError(f"it has more than {MAX_STRIPS} strips")
        if tag in (322, 323) and kind in (3, 4):  # TileWidth, TileLength
            tile[tag - 322] = struct.unpack_from(f"{order}{'H' if kind == 3 else 'L'}", data, at + entry.size)[0]
    if total > 2 * len(data):
        raise ValueError("its tags are larger than the file")
    if tile[0] * tile[1] > max(max_pixels, 2**22):
        raise ValueError(f"its tiles of {tile[0]} x {tile[1]} pixels are too large")


def decode(image: Image.Image, source: Any) -> Image.Image:
    """The pixels of an opened image, upright and in RGB."""
    try:
        image.load()
        turn = TURNS.get(orientation(image))
        return to_rgb(image if turn is None else image.transpose(turn))
    except Exception as error:
        raise ImageError(f"{describe(source)} is damaged or truncated: {reason(error)}") from error


def orientation(image: Image.Image) -> int:
    """The orientation in EXIF, or else in XMP: 1 to 8, 1 for upright.

    Pillow's own reader copies the data of every tag, and many tags may name the same bytes. A TIFF's orientation was
    applied by Pillow when it was decoded.
    """
    exif = image.info.get("exif") or b""
    profile = image.info.get("Raw profile type exif")  # ImageMagick's, in a PNG
    try:
        if not exif and profile:
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
        exif = exif.removeprefix(b"Exif\0\0")
        order = "<" if exif[:2] == b"II" else ">"
        start = struct.unpack_from(f"{order}L", exif, 4)[0]
        for number in range(struct.unpack_from(f"{order}H", exif, start)[0]):
            tag, kind, _, value = struct.unpack_from(f"{order}HHLH", exif, start + 2 + 12 * number)
            if tag == 0x0112 and kind == 3:
                return value
    except (struct.error, ValueError):
        pass  # there is none, or it is damaged
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    found = XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
    return int(found[1]) if found else 1


def check_size(size: tuple[int, int], source: Any, max_pixels: float) -> None:
    """Raise ImageError for an image (width, height) without pixels or with too many."""
    width, height = size
    if width <= 0 or height <= 0:
        raise ImageError(f"{describe(source)} has no pixels: it is {width} x {height}")
    if width * height > max_pixels:
        raise ImageError(
            f"{describe(source)} has too many pixels: {width} x {height} is more than "
            f"{max_pixels / 1e6:g} million; raise max_pixels to allow it"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes in RGB, transparency composited on white, 16 and 32 bits scaled to 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        image = to_eight_bits(image)
    if image.has_transparency_data:
        # Pillow converts grey with premultiplied alpha to one mode only.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Modes I, I;16 and F as 8-bit grey. Pillow's own conversion clips values above 255.

    The scale is the first of the usual ones that holds the brightest pixel, or that pixel itself.
    """
    values = np.array(image, dtype=np.float32)
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    brightest = float(values.clip(min=0, out=values).max())
    if image.mode.startswith("I;16"):
        scale = 65535.0
    else:
        limits = (1.0, 255.0) if image.mode == "F" else (255.0, 65535.0)
        scale = next((limit for limit in limits if brightest <= limit), brightest)
    values /= scale
    values *= 255
    return Image.fromarray(values.round(out=values).astype(np.uint8))


def from_array(source: Any, max_pixels: float) -> Image.Image:
    """A PIL image of an array (height, width[, channels]) or a tensor (channels, height, width)."""
    name = describe(source)
    if is_tensor(source):
        if source.dim() != 3 or source.shape[0] not in (1, 3, 4):
            raise ImageError(f"{name} should have the shape (channels, height, width) with 1, 3 or 4 channels")
        try:
            values = to_numpy(source.permute(1, 2, 0))
        except Exception as error:
            raise ImageError(f"{name} cannot be read: {reason(error)}") from error
    else:
        values = np.asarray(source)
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4):
        raise ImageError(f"{name} should have the shape (height, width) or (height, width, 1, 3 or 4)")
    check_size((values.shape[1], values.shape[0]), source, max_pixels)
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
    whole = np.issubdtype(values.dtype, np.integer)
    if not (whole or np.issubdtype(values.dtype, np.floating)):
        raise ImageError(f"{describe(source)} has values of type {values.dtype}, which are no brightness")
    top = 255 if whole else 1
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top + 1e-3):
        raise ImageError(
            f"{describe(source)} should hold floats from 0 to 1 or integers from 0 to 255, and goes from "
            f"{values.min()} to {values.max()}; for floats up to 255, divide by 255"
        )
    return values.astype(np.uint8) if whole else (values.clip(0, 1) * 255).round().astype(np.uint8)


def describe(source: Any) -> str:
    """A short name of an input, for messages."""
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source) or "an empty path"
    if isinstance(source, bytes | bytearray | memoryview):
        return getattr(source, "name", "") or f"<{len(source)} bytes>"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"<{source.mode} image of {source.width} x {source.height}>"
    if isinstance(source, np.ndarray) or is_tensor(source):
        kind = "array" if isinstance(source, np.ndarray) else "tensor"
        return f"<{kind} of shape {tuple(source.shape)}>"
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else f"<{type(source).__name__}>"


def reason(error: BaseException) -> str:
    """The message of an exception in one line, or its class name if it has none."""
    message = (getattr(error, "strerror", None) or str(error)).strip()
    return message.partition("\n")[0] or type(error).__name__


@dataclass(frozen=True)
class Preprocessing:
    """How images become the encoder's input. It is stored with the weights.

    size: rows and columns that the whole image is resized to, nothing cropped, its aspect ratio given up.
    mean, std: of the three channels, by which values in [0, 1] are normalised; ImageNet's by default.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """RGB images of any sizes as one batch.

        Returns:
            (batch, 3, rows, columns) in float32.
        """
        batch = np.empty((len(images), 3, *self.size), dtype=np.uint8)
        for pixels, image in zip(batch, images, strict=True):
            pixels[:] = np.asarray(self.resize(image)).transpose(2, 0, 1)
        values = batch.astype(np.float32)
        mean, std = (
            np.array(each, dtype=np.float32)[:, None, None] * np.float32(255) for each in (self.mean, self.std)
        )
        values -= mean
        values /= std
        return values

    def resize(self, image: Image.Image) -> Image.Image:
        """The whole image at the model's input size; an image of that size is returned as it is."""
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
        if len(plain.size) != 2 or not all(type(n) is int and 1 <= n <= MAX_INPUT for n in plain.size):
            raise ValueError(f"the size of images is two whole numbers from 1 to {MAX_INPUT}, not {plain.size!r:.100}")
        for numbers in (plain.mean, plain.std):
            if len(numbers) != 3 or not all(isinstance(n, int | float) and abs(n) < 1e6 for n in numbers):
                raise ValueError(f"mean and std are three numbers each, not {numbers!r:.100}")
        if not all(plain.std):
            raise ValueError("std cannot be 0")
        return plain
