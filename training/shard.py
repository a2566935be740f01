"""Write data sets as WebDataset shards: `python -m training.shard --data flickr8k=data/flickr8k --output shards`.

The shards of a split are `SPLIT-000.tar`, `SPLIT-001.tar` and so on. An image is stored as it is, beside a JSON file
with its name, its captions, and the names of its data set and its split. The same data give the same bytes.
"""

import argparse
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm
from webdataset.writer import TarWriter

from captioner.cli import positive
from captioner.files import SUFFIXES, replacing

from . import command
from .config import add_data_flag
from .data.features import unreadable
from .data.items import SPLITS, CaptionedImage, DatasetError
from .data.sources import read_sources

log = logging.getLogger("training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 written, 1 failed, 2 wrong usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog=command("shard"),
        description="Write data sets as WebDataset shards. Run again to continue what was interrupted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_data_flag(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder of the shards")
    parser.add_argument("--images", type=positive, default=1000, metavar="N", help="images in a shard")
    parser.add_argument("--cache", default="", help="folder for the index of shards that are read")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    try:
        splits = read_images(options.data, options.cache)
        counts = write_shards(splits, options.output, options.images)
    except (DatasetError, OSError) as error:
        log.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        log.error("interrupted; run the same command again to continue")
        return 130
    for split, count in counts.items():
        print(f"{split}: {len(splits[split])} images in {count} shard(s)")
    return 0


def read_images(sources: Sequence[str], cache: str = "") -> dict[str, list[CaptionedImage]]:
    """The images of each split of all data sets. Those that cannot be decoded are logged and left out.

    Raises:
        DatasetError, OSError: a data set cannot be read.
    """
    datasets = read_sources(sources, cache)
    splits = {split: [item for dataset in datasets for item in dataset.splits[split]] for split in SPLITS}
    quiet = not sys.stderr.isatty()
    damaged = {key: reason for items in splits.values() for key, reason in unreadable(items, quiet).items()}
    problems = [problem for dataset in datasets for problem in dataset.problems] + list(damaged.values())
    for problem in problems:
        log.warning("skipped: %s", problem)
    return {split: [item for item in items if item.key not in damaged] for split, items in splits.items()}


def write_shards(splits: Mapping[str, Sequence[CaptionedImage]], output: Path, size: int) -> dict[str, int]:
    """Write the shards into a new folder, all of them or none. Returns the number of shards of each split.

    They are written into a hidden folder beside `output`, which is renamed at the end. After an interruption the same
    call goes on there; with other data the shards of the interrupted call are removed.

    Args:
        splits: the images of each split.
        output: the folder; it must not exist, or be empty.
        size: images in a shard; the last one of a split may have fewer.

    Raises:
        DatasetError: the folder holds files, or there is no image.
        OSError: an image cannot be read, or a shard cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DatasetError(f"{output} exists already; give a new folder by --output")
    if not any(splits.values()):
        raise DatasetError("there is no image to write")
    shards = plan_shards(splits, size)
    versions = [[item.version(), item.captions, item.dataset] for items in shards.values() for item in items]
    digest = hashlib.sha256(json.dumps([list(shards), versions]).encode()).hexdigest()[:16]
    folder = output.with_name(f".{output.name}.{digest}")
    for other in output.parent.glob(f".{output.name}.{'[0-9a-f]' * 16}"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in tqdm(shards.items(), "writing", disable=None, unit="shard"):
        if not (folder / name).exists():
            with replacing(folder / name) as path:
                write_shard(path, name.removesuffix(".tar"), items)
    for left in folder.glob(".*"):  # half of a shard, where an earlier call was killed
        left.unlink()
    if output.exists():
        output.rmdir()
    folder.rename(output)
    return {split: sum(name.startswith(f"{split}-") for name in shards) for split in splits if splits[split]}


def plan_shards(splits: Mapping[str, Sequence[CaptionedImage]], size: int) -> dict[str, Sequence[CaptionedImage]]:
    """The images of each shard by its name."""
    shards = {}
    for split, items in splits.items():
        starts = range(0, len(items), size)
        digits = max(3, len(str(len(starts) - 1)))
        for number, start in enumerate(starts):
            shards[f"{split}-{number:0{digits}d}.tar"] = items[start : start + size]
    return shards


def write_shard(path: Path, name: str, items: Sequence[CaptionedImage]) -> None:
    """Write one shard; names of files, dates and owners in it do not depend on where and when it is written.

    Args:
        path: the file.
        name: "SPLIT-NUMBER", with which the keys of the images begin.
        items: the images.
    """
    with path.open("wb") as file, TarWriter(file, user="", group="", mtime=0) as shard:
        for number, item in enumerate(items):
            source = item.source()
            suffix = Path(item.name).suffix.lower()
            about = {
                "name": item.name,
                "dataset": item.dataset,
                "split": name.partition("-")[0],
                "captions": item.captions,
            }
            shard.write(
                {
                    "__key__": f"{name}-{number:06d}",
                    suffix.removeprefix(".") if suffix in SUFFIXES else "img": (
                        source if isinstance(source, bytes) else source.read_bytes()
                    ),
                    "json": about,
                }
            )


if __name__ == "__main__":
    sys.exit(main())
