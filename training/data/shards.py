"""Data sets in WebDataset shards: tar files in which each image stands beside its captions, in a file of the same name.

The captions are in a JSON file, as a list under "captions" or as a string under "caption", or else in a text file
(.txt) with one caption a line. The JSON file may also have "name" (of the image), "dataset", and "split". Without a
"split" the name of the shard decides: `train-000.tar` is train, `dev-000.tar` and `val-000.tar` are dev, and any
other name means train.

An index of each shard is kept in the cache: the captions, and where in the file each image lies. So the images of
local shards are read at any place, and a batch is the same whether its images are in shards or in files of their own.
Shards elsewhere (http, https, or the output of a command) are first copied into the cache, each once.
"""

import glob
import hashlib
import itertools
import json
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls

from captioner.files import SUFFIXES, replacing
from captioner.images import MAX_BYTES, ImageError, load_image
from captioner.shards import SAMPLE

from ..distributed import Distributed
from .download import PrepareError, download
from .features import lock
from .items import SPLITS, CaptionDataset, CaptionedImage, DatasetError, Member
from .sources import SPLIT_NAMES

UNNAMED = "shards"  # name of a data set that no one has named
BLOCK = 512  # bytes, of a tar file
FILE_NAME = re.compile(r"([^/\s=]+\.tar)\b")
SPLIT_OF_FILE = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?![a-z])")


class Entry(NamedTuple):
    """An image in the index of a shard. `dataset` is empty where the shard does not name it."""

    name: str
    offset: int
    size: int
    split: str
    dataset: str
    captions: list[str]


def read_shards(sources: Sequence[tuple[str, str]], cache: Path, processes: Distributed) -> list[CaptionDataset]:
    """Read the data sets in shards. The processes of each machine share the copying and the indexing.

    Args:
        sources: for each value of `--data` that names shards, the name of the data set, and the files or addresses;
            see `expand`. An empty name stands for the names in the shards, or `UNNAMED`.
        cache: folder of the cache.
        processes: the processes of the run.

    Raises:
        DatasetError: a shard cannot be read, or is named twice.
        OSError: the cache cannot be written.
    """
    cache = cache / "shards"
    shards = [(name, address) for name, pattern in sources for address in expand(pattern)]
    addresses = [address for _, address in shards]
    if len(set(addresses)) < len(addresses):
        twice = next(address for address in addresses if addresses.count(address) > 1)
        raise DatasetError(f"the shard {twice} is named twice in --data")
    own = addresses[processes.local_rank :: processes.local_size]
    for address in tqdm(own, "indexing shards", disable=processes.quiet, unit="shard"):
        index_file(address, cache)
    processes.barrier()
    items: dict[str, dict[str, list[CaptionedImage]]] = {}
    problems: list[str] = []
    for name, address in shards:
        path = local_path(address, cache)
        entries, skipped = json.loads(index_file(address, cache).read_text("utf-8"))
        problems += skipped
        for entry in itertools.starmap(Entry, entries):
            dataset = name or entry.dataset or UNNAMED
            splits = items.setdefault(dataset, {split: [] for split in SPLITS})
            member = Member(entry.name, entry.offset, entry.size)
            splits[entry.split].append(CaptionedImage(path, tuple(entry.captions), dataset, member))
    if not items:
        raise DatasetError(
            f"no image in the shards {sources[0][1]} can be used: {problems[0] if problems else 'they are empty'}"
        )
    layout = "WebDataset shards; splits as they name them, else by the names of the files: train-*, dev-*, test-*"
    return [
        CaptionDataset(
            name,
            {split: tuple(of_split) for split, of_split in splits.items()},
            () if number else tuple(problems),  # each names its shard
            layout,
        )
        for number, (name, splits) in enumerate(items.items())
    ]


def expand(pattern: str) -> list[str]:
    """The files or addresses that a pattern stands for, in order.

    Braces stand for each of their values, as in `train-{000..127}.tar`, and `::` joins several patterns. In the names
    of local files `*`, `?` and `[...]` stand for all files that match.

    Raises:
        DatasetError: no file matches, there is no such file, or a brace is not closed.
    """
    try:
        addresses = expand_urls(pattern)
    except ValueError as error:
        raise DatasetError(f"{pattern} names no shards: {error}") from error
    found = []
    for address in addresses:
        if is_remote(address):
            found.append(address)
            continue
        files = [address] if Path(address).is_file() else sorted(glob.glob(address))
        if not files:
            raise DatasetError(f"there is no shard {address}")
        found += files
    return found


def is_remote(address: str) -> bool:
    """Whether a shard is elsewhere: an address with a scheme, or a command after `pipe:`."""
    return address.startswith("pipe:") or "://" in address


def local_path(address: str, cache: Path) -> Path:
    """The file of a shard: itself, or its copy in the cache. The copy's name ends with the name of the shard."""
    if not is_remote(address):
        return Path(address)
    return cache / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{file_name(address)}"


def file_name(address: str) -> str:
    """The name of a shard's file, which may say the split; of a command, the last one in it that ends in `.tar`."""
    return str((FILE_NAME.findall(address) or ["shard.tar"])[-1])


def copy_here(address: str, path: Path) -> None:
    """Copy a remote shard into the cache, whole or not at all. A broken download over http is continued.

    Another run that needs the same shard waits for the copy.

    Raises:
        DatasetError: the shard cannot be fetched, or ends early.
        OSError: the copy cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("ab") as file:
        lock(file, wait=True)
        if path.exists():
            part.unlink(missing_ok=True)
            return
        try:
            if address.startswith(("http://", "https://")):
                download(address, part)
            else:
                file.truncate(0)
                with gopen(address) as stream:
                    shutil.copyfileobj(stream, file, 2**20)
                file.flush()
        except (PrepareError, ValueError) as error:
            raise DatasetError(f"cannot fetch the shard {address}: {error}") from error
        except OSError as error:
            if error.errno is not None:  # the disk is full, for example
                raise
            raise DatasetError(f"the command of the shard {address} failed: {error}") from error
        if not ends_as_tar(part):
            part.unlink()
            raise DatasetError(f"the shard {address} is not a whole tar file; its copy was removed")
        part.replace(path)


def ends_as_tar(path: Path) -> bool:
    """Whether a file ends with the empty block that ends a tar file; one that was cut off does not."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - BLOCK))
        return size % BLOCK == 0 and file.read() == bytes(BLOCK)


def index_file(address: str, cache: Path) -> Path:
    """The file in the cache with a shard's entries, and a message for each that was skipped; written if it is missing.

    Raises:
        DatasetError: the shard cannot be read.
        OSError: the cache cannot be written.
    """
    path = local_path(address, cache)
    if is_remote(address) and not path.exists():
        copy_here(address, path)
    try:
        status = path.stat()
    except OSError as error:
        raise DatasetError(f"cannot read the shard {address}: {error.strerror}") from error
    key = hashlib.sha256(f"{path.absolute()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:24]
    saved = cache / f"index-{key}.json"
    if not saved.exists():
        contents = make_index(path, file_name(address))
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(saved) as temporary:
            temporary.write_text(json.dumps(contents), "utf-8")
    return saved


def make_index(path: Path, shard: str) -> tuple[list[Entry], list[str]]:
    """Read a shard from end to end. Every image is decoded once, so that a damaged one is known before training.

    Args:
        path: its file.
        shard: its name, which may say the split.

    Raises:
        DatasetError: the shard cannot be read.
    """
    problems: list[str] = []
    entries = []
    try:
        with path.open("rb") as file:
            for key, members in samples(file, path, problems):
                try:
                    entries.append(read_entry(file, key, members, shard))
                except (ValueError, RecursionError) as error:
                    problems.append(f"{path}: {key}: {error}")
    except OSError as error:
        raise DatasetError(f"cannot read the shard {path}: {error.strerror or error}") from error

    def problem(entry: Entry) -> str | None:
        try:
            load_image(CaptionedImage(path, (), "", Member(*entry[:3])).source())
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as threads:
        damaged = list(threads.map(problem, entries))
    problems += filter(None, damaged)
    return [entry for entry, reason in zip(entries, damaged, strict=True) if reason is None], problems


def samples(file: IO[bytes], path: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The samples of a shard: a key, and the files of that key by their endings. What is damaged ends them."""

    def members() -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    match = SAMPLE.fullmatch(member.name)
                    if match and member.isfile() and not member.issparse():
                        yield match[1], match[2].lower(), member
        except tarfile.TarError as error:
            problems.append(f"{path}: the shard is damaged, and its images from there on are skipped: {error}")
        else:
            if not ends_as_tar(path):
                problems.append(f"{path}: the shard was cut off, and its last images may be missing")

    for key, group in itertools.groupby(members(), key=lambda member: member[0]):
        yield key, {ending: member for _, ending, member in group}


def read_entry(file: IO[bytes], key: str, members: dict[str, tarfile.TarInfo], shard: str) -> Entry:
    """One sample as it stands in the index. Raises ValueError with what is wrong with it."""
    images = [ending for ending in members if f".{ending.rpartition('.')[2]}" in SUFFIXES or ending == "img"]
    if not images:
        raise ValueError("it has no image")
    image = members[images[0]]
    if image.size > MAX_BYTES:
        raise ValueError(f"its image has more than {MAX_BYTES >> 20} MiB")

    def text(ending: str) -> str:
        file.seek(members[ending].offset_data)
        return file.read(members[ending].size).decode()

    about: dict[str, Any] = {}
    if "json" in members:
        about = json.loads(text("json"))
        if not isinstance(about, dict):
            raise ValueError("its JSON file should hold an object")
    found = about.get("captions") or about.get("caption") or (text("txt").splitlines() if "txt" in members else [])
    captions = clean([found] if isinstance(found, str) else found)
    name, dataset, split = (about.get(part) or "" for part in ("name", "dataset", "split"))
    if not all(isinstance(part, str) for part in (name, dataset, split)):
        raise ValueError("its name, dataset and split should be strings")
    match = SPLIT_OF_FILE.match(shard.lower())
    split = split.strip().lower() or (match[1] if match else "train")
    if split not in SPLIT_NAMES:
        raise ValueError(f"its split {split!r} is unknown; there are train, dev and test")
    # Half of a surrogate pair, written as an escape, cannot be saved as UTF-8.
    "".join([name, dataset, *captions]).encode()
    return Entry(name or f"{key}.{images[0]}", image.offset_data, image.size, SPLIT_NAMES[split], dataset, captions)


def clean(captions: Any) -> list[str]:
    """The captions that have words, without superfluous spaces. Raises ValueError where there is none."""
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("its captions should be a string or a list of strings")
    cleaned = [" ".join(caption.split()) for caption in captions]
    kept = [caption for caption in cleaned if any(map(str.isalnum, caption))]
    if not kept:
        raise ValueError("it has no caption")
    return kept
