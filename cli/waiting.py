"""Waiting for what an operator asked for, up to a bound."""

import argparse
import time
from collections.abc import Callable
from typing import Final

from quire.client import Group

POLL_S: Final = 0.5


def seconds(text: str) -> float:
    """The value of a flag --wait."""
    value = float(text)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} seconds is not from 0 to 1000000")
    return value


def wait_until(is_done: Callable[[], bool], *, timeout_s: float) -> bool:
    """Look until it is done; False if it is not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not is_done():
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(POLL_S)
    return True


def group_line(group: Group) -> str:
    """One line on a group, for operators."""
    detail = f" ({group.detail})" if group.detail else ""
    return f"{group.group_id}: {group.state}, term {group.term}{detail}"
