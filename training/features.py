"""What a frozen encoder sees, computed once for every image and kept in a memory-mapped file."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from captioner.encoder import Encoder
from captioner.images import ImageError, Preprocessing, load_image
from training.datasets import CaptionedImage
from training.distributed import Distributed


def cached_features(
    encoder: Encoder,
    items: Sequence[CaptionedImage],
    preprocessing: Preprocessing,
    cache: Path,
    distributed: Distributed,
    batch_size: int = 32,
) -> np.ndarray:
    """The encoder's annotation vectors of each image, from the cache if they are there.

    The file's name is a digest of all that decides its content: the encoder's graph and weights, the
    preprocessing, and the images' names, sizes and dates. It is written under a temporary name, each process
    filling its share, and renamed when it is whole.

    Args:
        encoder: in evaluation mode, on the device to compute on.
        items: the images; they have been found readable.
        cache: folder of the cache, made if need be.

    Returns:
        (images, regions, channels) float16, memory-mapped and read-only.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"features-{features_key(encoder, items, preprocessing)}.npy"
    if distributed.agree(path.exists()):
        return np.load(path, mmap_mode="r")
    shape = (len(items), encoder.grid[0] * encoder.grid[1], encoder.channels)
    temporary = path.with_suffix(".tmp")
    if distributed.is_first:
        np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape).flush()
    distributed.barrier()
    features = np.lib.format.open_memmap(temporary, mode="r+")
    batches = [range(start, min(start + batch_size, len(items))) for start in range(0, len(items), batch_size)]
    device = next(encoder.parameters()).device
    with ThreadPoolExecutor() as threads, torch.inference_mode():
        for batch in tqdm(
            batches[distributed.rank :: distributed.size], "features", disable=distributed.quiet, unit="batch"
        ):
            images = list(threads.map(load_image, (items[index].path for index in batch)))
            features[batch.start : batch.stop] = encoder(preprocessing(images).to(device)).half().cpu().numpy()
    features.flush()
    distributed.barrier()
    if distributed.is_first:
        temporary.replace(path)
    distributed.barrier()
    return np.load(path, mmap_mode="r")


def features_key(encoder: Encoder, items: Sequence[CaptionedImage], preprocessing: Preprocessing) -> str:
    """A digest of everything that decides the features."""
    key = hashlib.sha256()
    files = [(item.path.name, (stat := item.path.stat()).st_size, stat.st_mtime_ns) for item in items]
    key.update(json.dumps([encoder.node, encoder.grid, str(encoder.autocast_dtype), files]).encode())
    key.update(json.dumps(preprocessing.to_dict(), sort_keys=True).encode())
    key.update(type(encoder.body).__name__.encode())
    for name, tensor in encoder.state_dict().items():
        key.update(name.encode())
        key.update(tensor.cpu().contiguous().numpy().tobytes())
    return key.hexdigest()[:24]


def readable(items: Sequence[CaptionedImage], quiet: bool) -> tuple[list[CaptionedImage], list[str]]:
    """The items whose image can be decoded, and a message for each of the others."""

    def problem(item: CaptionedImage) -> str | None:
        try:
            load_image(item.path)
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as threads:
        problems = list(tqdm(threads.map(problem, items), "checking images", len(items), disable=quiet, unit="image"))
    good = [item for item, reason in zip(items, problems, strict=True) if reason is None]
    return good, [reason for reason in problems if reason is not None]
