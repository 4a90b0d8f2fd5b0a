"""Runs `quire …` as a user does: in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

QUIRE = (sys.executable, "-P", "-m", "quire.cli.main")


def environment(address: str | None = None, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of ours, and with the given ones."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QUIRE_")}
    return {**kept, **({"QUIRE_ADDRESS": address} if address else {}), **(extra or {})}


def quire(*arguments: str, address: str | None = None, stdin: str = "", timeout_s: float = 30) -> "subprocess.CompletedProcess[str]":
    """Run to the end, with `stdin` from a pipe."""
    return subprocess.run(
        [*QUIRE, *arguments], input=stdin, capture_output=True, text=True, timeout=timeout_s, env=environment(address), cwd="/", check=False
    )


def start_quire(*arguments: str, address: str, **options: Any) -> "subprocess.Popen[str]":
    """Start, with the output in pipes. It hears Ctrl-C also where the tests run in the background and do not."""
    return subprocess.Popen(
        [*QUIRE, *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(address),
        cwd="/",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )
