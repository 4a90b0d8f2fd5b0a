"""SIGINT, SIGTERM and SIGHUP as a wish that loops look at, instead of an exception wherever the program happens to be."""

import signal
from types import FrameType


class StopSignals:
    """How often the user or the system asked this process to stop."""

    def __init__(self) -> None:
        self._count = 0

    def install(self) -> None:
        """Take the signals. Again after ray.init, which puts handlers of its own."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def set(self) -> None:
        self._count += 1

    def is_set(self) -> bool:
        return self._count > 0

    @property
    def count(self) -> int:
        """Who asks twice does not want to wait."""
        return self._count

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.set()
