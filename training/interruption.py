"""Stopping a run by a signal, without loss."""

import signal
from types import FrameType


class Interrupted(Exception):
    """The user or the system asked the run to stop; its state has been saved."""


class StopRequest:
    """Within it SIGINT and SIGTERM end nothing: they set `received`, and the loop ends after the step under way."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "StopRequest":
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.received = True
