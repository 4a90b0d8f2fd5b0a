"""SIGINT and SIGTERM as a wish that loops look at, instead of an exception wherever the program happens to be."""

import signal
from types import FrameType


class StopSignals:
    """Whether the user or the system asked this process to stop."""

    def __init__(self) -> None:
        self._is_set = False

    def install(self) -> None:
        """Take both signals. Again after ray.init, which puts handlers of its own."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.set()
