"""Reading photographs ahead in threads: in order, and at most two batches at a time."""

import itertools
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from captioner.captions import Caption
from captioner.images import ImageError, ImageSource, Preprocessing, describe, load_reduced

# What can be captioned: an image, or the caption of one, whose annotation vectors are read in place of the image.
Source = ImageSource | Caption
PREVIEW = 1024  # pixels of the longer side of a preview
# Each thread holds one whole photograph at a time. One thread more than processors, since some wait for the disk.
THREADS = min(8, (os.cpu_count() or 1) + 1)


class Photo(NamedTuple):
    """One photograph, reduced to what captioning needs.

    pixels: RGB, of the model's input size.
    preview: upright, RGB, with a longer side of at most `PREVIEW` pixels.
    size: width and height of the whole photograph.
    path: its path; None where it was not given by its path.
    mask: Boolean (rows, columns), the regions that attention may use; None for all.
    annotations: (regions, channels), its annotation vectors where they are known; then `pixels` are not used.
    """

    pixels: Image.Image
    preview: Image.Image
    size: tuple[int, int]
    path: str | None
    mask: np.ndarray | None = None
    annotations: np.ndarray | None = None


def read_photo(
    source: Source,
    preprocessing: Preprocessing,
    max_pixels: float,
    usable: Callable[[tuple[int, int]], np.ndarray | None] = lambda size: None,
) -> Photo:
    """Read a photograph; see `captioner.images.load_reduced`.

    Args:
        source, max_pixels: as there; or a caption with its annotation vectors.
        preprocessing: of the model.
        usable: gives the regions that attention may use, for a photograph of some width and height; raises ValueError
            where that is impossible.

    Raises:
        ImageError: it cannot be read, or `usable` raised a ValueError.
    """
    if isinstance(source, Caption):
        return known_photo(source, usable)
    image, size = load_reduced(source, max_pixels, least=(PREVIEW * 3 // 4, max(preprocessing.size)))
    mask = usable_or_error(usable, size, describe(source))
    pixels = preprocessing.resize(image)
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    # `resize` returns an image of the right size as it is: the caller's own, who may change it.
    return Photo(pixels.copy() if pixels is image else pixels, make_preview(image), size, path, mask)


def known_photo(caption: Caption, usable: Callable[[tuple[int, int]], np.ndarray | None]) -> Photo:
    """The photograph of a caption, with its annotation vectors; see `read_photo`."""
    if caption.annotations is None:
        raise ImageError(f"the caption {str(caption)!r} has no annotation vectors; make it with keep_annotations=True")
    mask = usable_or_error(usable, caption.size, caption.source or describe(caption.image))
    return Photo(caption.image, caption.image, caption.size, caption.source, mask, caption.annotations)


def usable_or_error(
    usable: Callable[[tuple[int, int]], np.ndarray | None], size: tuple[int, int], name: str
) -> np.ndarray | None:
    """What `usable` gives for a size; its ValueError becomes an ImageError about the image of that name."""
    try:
        return usable(size)
    except ValueError as error:
        raise ImageError(f"{name}: {error}") from error


def make_preview(image: Image.Image) -> Image.Image:
    """A copy whose longer side has at most `PREVIEW` pixels. Of the metadata only the colour profile is kept."""
    scale = PREVIEW / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        preview = image.resize(size, Image.Resampling.HAMMING, reducing_gap=1.5)
    else:
        preview = image.copy()
    preview.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    return preview


def read_batches(
    sources: Iterator[Source], batch_size: int, read: Callable[[Source], Photo]
) -> Generator[list[Photo | ImageError], None, None]:
    """Read batches of photographs. While the caller works on one batch, threads read the next.

    `sources` is advanced in the caller's thread. Paths and bytes are read in threads. Open files, images and arrays,
    which the caller may close or change once `sources` has advanced, are read at once.

    Args:
        sources: the photographs.
        batch_size: photographs in a batch; the last may have fewer.
        read: reads one of them.

    Returns:
        Batches in order, with an ImageError in place of a photograph that could not be read. Closing the iterator
        cancels reads that have not begun and waits for those that have.

    Raises:
        Exception: whatever `sources` raised, after the photographs before it.
    """
    ended = False
    failure: Exception | None = None

    def read_or_error(source: Source) -> Photo | ImageError:
        try:
            return read(source)
        except ImageError as error:
            return ImageError(str(error))  # the traceback of the other would keep the file in memory

    def begin() -> list[Photo | ImageError | Future[Photo | ImageError]]:
        nonlocal ended, failure
        begun: list[Photo | ImageError | Future[Photo | ImageError]] = []
        if ended:
            return begun
        try:
            for source in itertools.islice(sources, batch_size):
                later = isinstance(source, str | os.PathLike | bytes)
                begun.append(threads.submit(read_or_error, source) if later else read_or_error(source))
        except Exception as error:
            failure = error
        ended = len(begun) < batch_size
        return begun

    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="captioner-reader")
    try:
        batch = begin()
        while batch:
            following = begin()
            yield [item.result() if isinstance(item, Future) else item for item in batch]
            batch = following
        if failure is not None:
            raise failure
    finally:
        threads.shutdown(cancel_futures=True)
