"""Download of one file, resumed where an earlier attempt was interrupted."""

import http
import http.client
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

ATTEMPTS = 5  # in a row without a new byte
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20  # bytes


class PrepareError(Exception):
    """The data set could not be prepared; the message says why in one sentence."""


class _BrokenOff(Exception):
    """A download that ended early or does not fit the part on the disk; it can be tried again."""


_NETWORK_ERRORS = (
    _BrokenOff,
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)


def download(url: str, part: Path, wait: Callable[[float], None] = time.sleep) -> None:
    """Download a file, resuming an earlier attempt, and trying again when the connection breaks.

    Args:
        url: of the file.
        part: the file to write or continue.
        wait: sleeps for a number of seconds, which doubles after each attempt without a new byte.

    Raises:
        PrepareError: the server refuses, or several attempts in a row received nothing.
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
        say(f"{part.stem}: " + (f"continuing after {_megabytes(start)}" if start else "downloading"))
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
    """Return if the file is complete already; else raise the error that the status code stands for."""
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
    """The first byte of the response, and the size of the whole file, None where the server does not give it."""
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


def say(message: str) -> None:
    """Print a message to standard error; standard output is for results."""
    print(message, file=sys.stderr)
