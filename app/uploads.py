"""The folder of uploads and downloads, bounded in size and in age."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

PARTIAL = "tmp*"  # the files into which Gradio writes uploads as they arrive
STALLED = 60  # seconds without a byte after which such a file may be deleted


class Uploads:
    """The files that clients uploaded and that the server wrote for them.

    Args:
        folder: where Gradio puts both.
        page: the page whose requests name uploads.
        pictures: the paths of pictures that running requests still show.
        max_bytes: size of the folder beyond which the oldest files are deleted.
        keep_seconds: age at which interrupted uploads are deleted; Gradio deletes completed files itself.
    """

    def __init__(
        self,
        folder: Path,
        page: gr.Blocks,
        pictures: Callable[[], Iterable[str]],
        max_bytes: int,
        keep_seconds: float,
    ) -> None:
        self.folder, self.page, self.pictures = folder, page, pictures
        self.max_bytes, self.keep_seconds = max_bytes, keep_seconds

    async def make_room(self) -> bool:
        """Delete the oldest files that are not in use until the folder is within its size. Returns whether it is."""
        return await asyncio.to_thread(self.delete_oldest, set(self.in_use()))

    def in_use(self) -> Iterator[str]:
        """The files of requests that wait or run, and those of the page itself."""
        for event in self.page._queue.event_ids_to_events.values():
            yield from paths_in(event.data.data if event.data else None)
        for component in self.page.blocks.values():
            yield from component.keep_in_cache
        yield from self.pictures()

    def delete_oldest(self, kept: set[str]) -> bool:
        """As `make_room`, where the files in use are `kept`. Uploads that are arriving stay too."""
        files = []
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):  # deleted meanwhile
                if path.is_file():
                    files.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in files)
        for modified, size, path in sorted(files):
            if total <= self.max_bytes:
                break
            arriving = path.match(PARTIAL) and time.time() - modified < STALLED
            if str(path) not in kept and not arriving:
                path.unlink(missing_ok=True)
                total -= size
        return total <= self.max_bytes

    async def sweep(self) -> None:
        """Delete interrupted uploads when they are old, for ever."""
        while True:
            await asyncio.sleep(max(1, self.keep_seconds / 4))
            for file in self.folder.glob(PARTIAL):
                with contextlib.suppress(OSError):
                    if file.is_file() and time.time() - file.stat().st_mtime > self.keep_seconds:
                        file.unlink()


def paths_in(value: Any) -> Iterator[str]:
    """The paths of all files in a value of a request, however deep."""
    values = [value]
    while values:
        one = values.pop()
        if isinstance(one, dict):
            if isinstance(path := one.get("path"), str):
                yield path
            values += one.values()
        elif isinstance(one, list | tuple):  # Gradio gathers the values of a batch in tuples
            values += one
