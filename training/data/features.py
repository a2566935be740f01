"""Features of a frozen encoder, computed once for every image and kept in a memory-mapped file."""

import contextlib
import hashlib
import json
import logging
import math
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from captioner.images import ImageError, load_image
from captioner.network.encoder import Encoder

from ..distributed import Distributed
from .images import ImageSource
from .items import CaptionedImage

try:
    import fcntl
except ImportError:  # on Windows, where unfinished files are not removed
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("training")


def cache_folder(chosen: str = "") -> Path:
    """The folder of cached features and shards: the chosen one, or by default captioner/ in the user's cache folder."""
    return Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "captioner")


def cached_maps(
    encoder: Encoder,
    photographs: ImageSource,
    cache: Path,
    distributed: Distributed,
    view: int = 0,
    below: bool = False,
    batch_size: int = 32,
) -> np.ndarray:
    """The output of a frozen encoder, or of its part below the tuned blocks, for each image.

    It is read from the cache if it is there. The file's name is a digest of everything that its content depends on:
    the encoder's graph and weights, the preprocessing, the augmentation, and the images' names, sizes and dates. It is
    written under a temporary name, each process writing its share, and renamed when it is complete. Two runs that need
    the same file at once each write their own. Unfinished files of a killed run are removed by the next one.

    The file has 2 bytes for each value: 0.75 GB for 6000 images, 49 regions and 1280 channels.

    Args:
        encoder: in evaluation mode, on the device to compute on.
        photographs: the images; all must be readable.
        cache: folder of the cache; it is created if it does not exist.
        distributed: the processes that share the work.
        view: number of the augmented view of each image, where `photographs` augments.
        below: whether to stop where `Encoder.split` has divided the encoder.
        batch_size: images that go through the encoder together.

    Returns:
        Annotation vectors (images, regions, channels), or with `below` maps (images, rows, columns, channels);
        float16, memory-mapped and read-only.

    Raises:
        OSError: the disk has no space for the file.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"features-{features_key(encoder, photographs, view, below)}.npy"
    if distributed.agree(path.exists()):
        return np.load(path, mmap_mode="r")
    items, preprocessing = photographs.items, photographs.preprocessing
    device = next(encoder.parameters()).device

    def compute(images: list[Image.Image]) -> np.ndarray:
        pixels = torch.from_numpy(preprocessing(images)).to(device)
        maps = encoder.lower(pixels).permute(0, 2, 3, 1) if below else encoder(pixels)
        return maps.half().cpu().numpy()

    with ThreadPoolExecutor() as threads, torch.inference_mode():
        shape = (len(items), *compute([Image.new("RGB", preprocessing.size[::-1])]).shape[1:])
        reserved = reserve(path, shape) if distributed.is_first else None
        temporary = Path(distributed.agree(reserved.name if reserved else ""))
        try:
            features = np.lib.format.open_memmap(temporary, mode="r+")
            batches = [range(start, min(start + batch_size, len(items))) for start in range(0, len(items), batch_size)]
            for batch in tqdm(
                batches[distributed.rank :: distributed.size], "features", disable=distributed.quiet, unit="batch"
            ):
                images = list(threads.map(lambda index: photographs.one(index, view), batch))
                features[batch.start : batch.stop] = compute(images)
            features.flush()
            distributed.barrier()
            if distributed.is_first:
                temporary.replace(path)
        finally:
            if reserved:
                reserved.close()
                temporary.unlink(missing_ok=True)
    distributed.barrier()
    return np.load(path, mmap_mode="r")


def reserve(path: Path, shape: tuple[int, ...]) -> BinaryIO:
    """A new temporary file of float16 zeros beside `path`, with its space on the disk allocated.

    It is locked as long as it is open, so that other runs do not take it for the unfinished file of a killed one.

    Raises:
        OSError: the disk has no space for it.
    """
    remove_leftovers(path.parent)
    size = 2 * math.prod(shape)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    log.info("caching %.1f GB in %s", size / 1e9, path.parent)
    file = temporary.open("xb")
    try:
        lock(file)
        np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape).flush()
        if hasattr(os, "posix_fallocate"):
            # Writing to a sparse memory-mapped file kills the process by a signal where the disk is full.
            os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
    except OSError as error:
        file.close()
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"no room for {size / 1e9:.1f} GB of cached features: {error.strerror}", str(path.parent)
        ) from error
    return file


def lock(file: BinaryIO, wait: bool = False) -> bool:
    """Lock a file until it is closed or the process ends. Returns False if it is locked, or locks are not supported.

    Args:
        file: an open file.
        wait: whether to wait until no other process has locked it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def remove_leftovers(cache: Path) -> None:
    """Remove the unfinished files of killed runs from the cache: those that no process has locked."""
    for path in cache.glob(".features-*"):
        with contextlib.suppress(OSError), path.open("rb") as file:  # gone meanwhile, or another user's
            if lock(file):
                path.unlink()


def features_key(encoder: Encoder, photographs: ImageSource, view: int = 0, below: bool = False) -> str:
    """A digest of everything that the features depend on."""
    key = hashlib.sha256()
    files = [item.version() for item in photographs.items]
    grid = None if below else encoder.grid
    cut = encoder.parts[0].code if below else None
    augmentation = [*photographs.augmentation, view] if photographs.augment else None
    key.update(json.dumps([encoder.node, grid, cut, augmentation, str(encoder.autocast_dtype), files]).encode())
    key.update(json.dumps(photographs.preprocessing.to_dict(), sort_keys=True).encode())
    key.update(type(encoder.body).__name__.encode())
    for name, tensor in encoder.state_dict().items():
        key.update(name.encode())
        key.update(tensor.cpu().contiguous().numpy().tobytes())
    return key.hexdigest()[:24]


def unreadable(items: Sequence[CaptionedImage], quiet: bool) -> dict[str, str]:
    """The key of each image that cannot be decoded, and why. Images in shards were checked when they were indexed."""
    own = [item for item in items if item.member is None]

    def problem(item: CaptionedImage) -> str | None:
        try:
            load_image(item.path)
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as threads:
        problems = list(tqdm(threads.map(problem, own), "checking images", len(own), disable=quiet, unit="image"))
    return {item.key: reason for item, reason in zip(own, problems, strict=True) if reason is not None}
