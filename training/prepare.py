"""Download and unpack the public data sets: `python -m training.prepare flickr8k --root data/flickr8k`.

Stopped at any point, the same command continues where it was. Archives lie in `downloads/` under the root until
they are unpacked, and are removed then.
"""

import argparse
import errno
import hashlib
import http
import http.client
import re
import shutil
import ssl
import stat
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from tqdm import tqdm

from training.datasets import CaptionDataset, DatasetError, read_dataset

ATTEMPTS = 5  # in a row that bring nothing new
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20  # bytes


class PrepareError(Exception):
    """The data set could not be prepared; the message says why in one sentence."""


class _BrokenOff(Exception):
    """A download that ended early or out of step, and is worth another try."""


_NETWORK_ERRORS = (
    _BrokenOff,
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)


@dataclass(frozen=True)
class Archive:
    """A zip file on the web.

    Args:
        url: where it is.
        digest: "sha256:..." or "md5:..." of the file; None if nobody published one, then the check sums of the
            members inside the zip are tested instead.
        folder: where it unpacks to, relative to the root.
        only: the members to unpack; empty for all.
    """

    url: str
    digest: str | None
    folder: str = "."
    only: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Recipe:
    """What makes a data set.

    Args:
        dataset: the name that `read_dataset` knows it by.
        archives: what to download and unpack.
        terms: one sentence on what the data may be used for.
        by_hand: what the user has to do where a part is given out on request only.
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
    """Download and unpack what is not there yet, then read the data set.

    Args:
        recipe: what to download.
        root: the folder to make the data set in.
        wait: pauses for some seconds before another attempt.

    Raises:
        PrepareError: a download or an archive is no good, or the disk is full.
        DatasetError: what was unpacked cannot be read.
    """
    try:
        for archive in recipe.archives:
            _obtain(archive, root, wait)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PrepareError(
                f"the disk of {root} is full; make room and run the same command again to continue"
            ) from error
        raise PrepareError(f"cannot use {error.filename or root}: {error.strerror or error}") from error
    return read_dataset(recipe.dataset, root)


def _obtain(archive: Archive, root: Path, wait: Callable[[float], None]) -> None:
    downloads = root / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    stamp = downloads / f"{archive.name}.unpacked"
    if _is_unpacked(archive, root, stamp):
        _say(f"{archive.name}: already unpacked")
        return
    path = downloads / archive.name
    if not path.exists():
        part = path.with_name(f"{path.name}.part")
        download(archive.url, part, wait)
        verify(archive, part)
        part.replace(path)  # from here on the file is known to be good
    made = unpack(path, root / archive.folder, archive.only)
    stamp.write_text("".join(f"{PurePosixPath(archive.folder, name)}\n" for name in made), "utf-8")
    path.unlink()


def _is_unpacked(archive: Archive, root: Path, stamp: Path) -> bool:
    if not stamp.exists():
        return False
    made = stamp.read_text("utf-8").splitlines()
    wanted = {str(PurePosixPath(archive.folder, name)) for name in archive.only}
    return wanted <= set(made) and all((root / name).exists() for name in made)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


# Downloading


def download(url: str, part: Path, wait: Callable[[float], None] = time.sleep) -> None:
    """Download a file, continuing what an earlier attempt left, and trying again when the connection breaks.

    Args:
        url: where it is.
        part: the file to write or continue.
        wait: pauses for some seconds; twice as long after each attempt that brought nothing.

    Raises:
        PrepareError: the server refuses, or several attempts in a row brought nothing new.
        OSError: the file cannot be written.
    """
    failures = 0
    while True:
        before = _size(part)
        try:
            return _attempt(url, part)
        except _NETWORK_ERRORS as error:
            failures = 1 if _size(part) > before else failures + 1
            if failures == ATTEMPTS:
                reason = getattr(error, "reason", None) or str(error) or type(error).__name__
                raise PrepareError(
                    f"cannot download {url}: {reason}; run the same command again to continue"
                ) from error
            wait(2.0**failures)


def _attempt(url: str, part: Path) -> None:
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            return _refused(error, url, part)
    with response:
        start, total = _extent(response)
        if start not in (0, have):
            part.unlink()
            raise _BrokenOff(f"the server sent the file from byte {start}, not {have}")
        _say(f"{part.stem}: " + (f"continuing after {_megabytes(start)}" if start else "downloading"))
        # A server that does not know ranges sends the whole file again: start is 0, and the old part is dropped.
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and _size(part) != total:
        raise _BrokenOff(f"the connection broke off after {_megabytes(_size(part))} of {_megabytes(total)}")


def _refused(error: urllib.error.HTTPError, url: str, part: Path) -> None:
    """Return if the file is whole already; else raise what the answer means."""
    if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        if error.headers.get("Content-Range") == f"bytes */{_size(part)}":
            return
        part.unlink()
        raise _BrokenOff("the server's file is not the one that was begun") from error
    passing = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS)
    if error.code < 500 and error.code not in passing:
        raise PrepareError(f"cannot download {url}: the server answers {error.code} {error.reason}") from error
    raise _BrokenOff(f"the server answers {error.code} {error.reason}") from error


def _extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """The first byte that is sent, and the size of the whole file where the server tells it."""
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None:
            raise _BrokenOff("the server does not say which part of the file it sends")
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length")
    return 0, None if length is None else int(length)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


# Verifying and unpacking


def verify(archive: Archive, path: Path) -> None:
    """Check a download against its digest, or against the check sums in the zip; one that fails is removed.

    Raises:
        PrepareError: the file is not what was published, or is damaged.
    """
    _say(f"{archive.name}: verifying")
    if archive.digest is None:
        fault = _zip_fault(path)
    else:
        algorithm, _, expected = archive.digest.partition(":")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, algorithm).hexdigest()
        fault = "" if digest == expected else f"its {algorithm} is {digest} and should be {expected}"
    if fault:
        path.unlink()
        raise PrepareError(
            f"{archive.url} gave a wrong file: {fault}; it was removed, run the same command to fetch it again"
        )


def _zip_fault(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
            return "" if member is None else f"{member} in it is damaged"
    except _ZIP_ERRORS as error:
        return f"{error or type(error).__name__}"


_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


def unpack(path: Path, folder: Path, only: Sequence[str] = ()) -> list[str]:
    """Unpack a zip file; members that are there in full are left as they are.

    Args:
        path: the zip file.
        folder: where to.
        only: the members to unpack; empty for all but what macOS adds (`__MACOSX`, `.DS_Store`).

    Returns:
        what was made: `only`, or the names at the top of the archive.

    Raises:
        PrepareError: a member would leave the folder or is not a plain file (then nothing has been written), one of
            `only` is missing, or the archive is damaged.
        OSError: a file cannot be written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _refuse_unsafe(member, path)
            members = [member for member in archive.infolist() if _is_wanted(member.filename, only)]
            if missing := set(only) - {member.filename for member in members}:
                raise PrepareError(f"{path.name} does not contain {', '.join(sorted(missing))}")
            folder.mkdir(parents=True, exist_ok=True)
            for member in tqdm(members, f"unpacking {path.name}", unit="file", disable=None):
                _unpack_member(archive, member, folder)
    except _ZIP_ERRORS as error:
        raise PrepareError(f"{path} cannot be unpacked: {error}; remove it and run the same command") from error
    return list(only) or sorted({member.filename.partition("/")[0] for member in members})


def _is_wanted(name: str, only: Sequence[str]) -> bool:
    if only:
        return name in only
    path = PurePosixPath(name)
    return path.parts[0] != "__MACOSX" and path.name != ".DS_Store"


def _refuse_unsafe(member: zipfile.ZipInfo, path: Path) -> None:
    # Windows' rules are the stricter ones: they see drives and backslashes too.
    name = PureWindowsPath(member.filename)
    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the zip was not made on Unix
    if name.drive or name.root or ".." in name.parts or not name.parts:
        raise PrepareError(
            f"{path.name} is refused: its member {member.filename!r} would leave the folder; nothing was unpacked"
        )
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise PrepareError(
            f"{path.name} is refused: its member {member.filename!r} is not a plain file; nothing was unpacked"
        )


def _unpack_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> None:
    target = folder / member.filename
    if member.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    if target.is_file() and target.stat().st_size == member.file_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with archive.open(member) as source, part.open("wb") as file:
        shutil.copyfileobj(source, file, CHUNK)
    part.replace(target)


# The command


def main(
    argv: Sequence[str] | None = None,
    recipes: Mapping[str, Recipe] = RECIPES,
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """The command. Returns 0 if the data set is ready, 1 if not, 130 if interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m training.prepare",
        description="Download, verify and unpack a captioning data set. Run again to continue what was interrupted.",
        epilog="coco has the photographs of 2014 in Karpathy's splits, on which scores are published; coco2014 and "
        "coco2017 have COCO's own train and val. Train with --data coco for all three.",
    )
    parser.add_argument("dataset", choices=list(recipes))
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder to make the data set in")
    arguments = parser.parse_args(argv)
    recipe, root = recipes[arguments.dataset], arguments.root
    _say(f"{arguments.dataset}: {recipe.terms}")
    try:
        _report(prepare(recipe, root, wait))
    except DatasetError as error:
        _say(f"error: {error}")
        if recipe.by_hand:
            _say(recipe.by_hand.format(root=root))
        return 1
    except PrepareError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to continue")
        return 130
    return 0


def _report(dataset: CaptionDataset) -> None:
    print(f"{dataset.name}: {dataset.layout}")
    for split, images in dataset.splits.items():
        print(f"{split}: {len(images)} images, {sum(len(image.captions) for image in images)} captions")
    print(f"problems: {len(dataset.problems)}")
    for problem in dataset.problems[:10]:
        _say(problem)


if __name__ == "__main__":
    sys.exit(main())
