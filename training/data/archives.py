"""An archive of a data set: downloaded, checked against its digest, unpacked, and removed."""

import hashlib
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from tqdm import tqdm

from .download import CHUNK, PrepareError, download, say

_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Archive:
    """A zip file to download.

    Args:
        url: where it is.
        digest: "sha256:..." or "md5:..." of the file; None if none is published, then the check sums of its members
            are tested.
        folder: where to unpack it, relative to the root.
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


def obtain(archive: Archive, root: Path, wait: Callable[[float], None]) -> None:
    """Download, verify and unpack one archive, unless that has been done.

    Raises:
        PrepareError: the download fails, or the archive is damaged.
        OSError: a file cannot be written.
    """
    downloads = root / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    stamp = downloads / f"{archive.name}.unpacked"
    if _is_unpacked(archive, root, stamp):
        say(f"{archive.name}: already unpacked")
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


def verify(archive: Archive, path: Path) -> None:
    """Check a download against its digest, or against the check sums in the zip; a wrong file is removed.

    Raises:
        PrepareError: the file is not what was published, or is damaged.
    """
    say(f"{archive.name}: verifying")
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


def unpack(path: Path, folder: Path, only: Sequence[str] = ()) -> list[str]:
    """Unpack a zip file; members that exist with their full size are skipped.

    Args:
        path: the zip file.
        folder: where to.
        only: the members to unpack; empty for all except those that macOS adds (`__MACOSX`, `.DS_Store`).

    Returns:
        `only`, or the names at the top level of the archive.

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
