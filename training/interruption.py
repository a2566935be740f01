"""A run that is stopped by a signal finishes its step and saves its state."""

import signal
from types import FrameType


class Interrupted(Exception):
    """The run was stopped by a signal; its state has been saved."""


class StopRequest:
    """A context in which SIGINT and SIGTERM set `received` instead of ending the process."""

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
