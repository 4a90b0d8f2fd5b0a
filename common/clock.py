"""Clocks that can be replaced. State never reads one: time is an argument. Only edges hold a clock."""

import time
from collections.abc import Callable

# Seconds from an unnamed start, never going back.
Clock = Callable[[], float]

monotonic: Clock = time.monotonic
