"""The public data sets: the archives of each, and their download.

If it is interrupted at any point, the same call continues there. Archives are kept in `downloads/` under the root and
removed after they are unpacked.
"""

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .archives import Archive, obtain
from .datasets import read_dataset
from .download import PrepareError
from .items import CaptionDataset


@dataclass(frozen=True)
class Recipe:
    """The parts of a data set.

    Args:
        dataset: its name in `read_dataset`.
        archives: what to download and unpack.
        terms: one sentence on what the data may be used for.
        by_hand: instructions for the user, where a part is available on request only.
    """

    dataset: str
    archives: tuple[Archive, ...]
    terms: str
    by_hand: str = ""


def _coco(path: str, sha256: str, only: tuple[str, ...] = ()) -> Archive:
    # Not https: the host's certificate is for another name. The digest vouches for the file.
    return Archive(f"http://images.cocodataset.org/{path}", f"sha256:{sha256}", only=only)


def _coco_captions(year: int, sha256: str) -> Archive:
    only = (f"annotations/captions_train{year}.json", f"annotations/captions_val{year}.json")
    return _coco(f"annotations/annotations_trainval{year}.zip", sha256, only)


def _karpathy(dataset: str) -> Archive:
    return Archive(
        "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
        "sha256:4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
        only=(f"dataset_{dataset}.json",),
    )


# The SHA-256 sums are those that TensorFlow Datasets publishes; the MD5 sums of Flickr8k those on which ArrayFire ML
# and mlverse's torchvision agree.
_FLICKR8K_RELEASE = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
_COCO_2014_IMAGES = (
    _coco("zips/train2014.zip", "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775"),
    _coco("zips/val2014.zip", "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0"),
)
_COCO_2017_IMAGES = (
    _coco("zips/train2017.zip", "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
    _coco("zips/val2017.zip", "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
)
_FLICKR_TERMS = "for non-commercial research and education; the photographs stay their authors'"
_COCO_TERMS = "annotations CC BY 4.0; each photograph has its own Flickr licence"

RECIPES: dict[str, Recipe] = {
    "flickr8k": Recipe(
        "flickr8k",
        (
            Archive(
                _FLICKR8K_RELEASE + "Flickr8k_text.zip",
                "md5:bf6c1abcb8e4a833b7f922104de18627",
                "Flickr8k_text",
            ),
            Archive(_FLICKR8K_RELEASE + "Flickr8k_Dataset.zip", "md5:f18a1e2920de5bd84dae7cf08ec78978"),
        ),
        _FLICKR_TERMS,
    ),
    "flickr30k": Recipe(
        "flickr30k",
        (_karpathy("flickr30k"),),
        _FLICKR_TERMS,
        "The photographs of Flickr30k are given out on request, by the University of Illinois: fill in "
        "https://forms.illinois.edu/sec/229675 (about it: https://shannon.cs.illinois.edu/DenotationGraph/), unpack "
        "what you receive so that the photographs are {root}/flickr30k-images/*.jpg, and run this command again. "
        "The captions and the splits are in {root}/dataset_flickr30k.json already.",
    ),
    "coco": Recipe("coco", (_karpathy("coco"), *_COCO_2014_IMAGES), _COCO_TERMS),
    "coco2014": Recipe(
        "coco",
        (
            _coco_captions(2014, "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"),
            *_COCO_2014_IMAGES,
        ),
        _COCO_TERMS,
    ),
    "coco2017": Recipe(
        "coco",
        (
            _coco_captions(2017, "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"),
            *_COCO_2017_IMAGES,
        ),
        _COCO_TERMS,
    ),
}


def prepare(recipe: Recipe, root: Path, wait: Callable[[float], None] = time.sleep) -> CaptionDataset:
    """Download and unpack the archives that are missing, then read the data set.

    Args:
        recipe: what to download.
        root: the folder to make the data set in.
        wait: sleeps for a number of seconds before another attempt.

    Raises:
        PrepareError: a download fails, an archive is damaged, or the disk is full.
        DatasetError: the unpacked files cannot be read.
    """
    try:
        for archive in recipe.archives:
            obtain(archive, root, wait)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PrepareError(
                f"the disk of {root} is full; make room and run the same command again to continue"
            ) from error
        raise PrepareError(f"cannot use {error.filename or root}: {error.strerror or error}") from error
    return read_dataset(recipe.dataset, root)
