"""A trace of a rank's steps: what its device does when, as a file for Perfetto or chrome://tracing."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from quire.worker.rank_spec import TRACED_STEP

_log = logging.getLogger(__name__)

# Starting to listen takes seconds, and the first steps after it are late.
NUM_SKIPPED_STEPS: Final = 8
NUM_TRACED_STEPS: Final = 24


class StepTrace:
    """Traces NUM_TRACED_STEPS steps whenever it is asked, and writes them to a file. Before and after the rank stands still for seconds."""

    def __init__(self, path: Path, *, device: str) -> None:
        """path: where the trace goes, whole or not at all; NAME.json.gz"""
        self._path = path
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.device(device).type == "cuda" else [])]
        self._is_asked = False
        self._profile: profile | None = None
        self._num_left = 0

    def ask(self) -> None:
        """Trace the next steps. May be called by a signal handler."""
        self._is_asked = True

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around the launch of a step. A trace that cannot be made is given up: the rank goes on."""
        if self._is_asked and self._profile is None:
            self._is_asked = False
            self._begin()
        if self._profile is None:
            yield
            return
        with record_function(TRACED_STEP):
            yield
        self._end_step()

    def _begin(self) -> None:
        steps = schedule(wait=0, warmup=NUM_SKIPPED_STEPS, active=NUM_TRACED_STEPS, repeat=1)
        try:
            self._profile = profile(activities=self._activities, schedule=steps, on_trace_ready=self._write)
            self._profile.start()
        except Exception:  # whatever the profiler lacks here, a trace is not worth a rank
            _log.exception("the steps cannot be traced")
            self._profile = None
        self._num_left = NUM_SKIPPED_STEPS + NUM_TRACED_STEPS

    def _end_step(self) -> None:
        assert self._profile is not None, "a step ends that was begun"
        self._num_left -= 1
        try:
            self._profile.step()  # the last one writes
            if self._num_left == 0:
                self._profile.stop()
        except Exception:  # as above; a disk may be full
            _log.exception("the trace of the steps is lost")
            self._num_left = 0
        if self._num_left == 0:
            self._profile = None

    def _write(self, traced: profile) -> None:
        part = self._path.with_name(f"part-{self._path.name}")
        traced.export_chrome_trace(str(part))
        part.replace(self._path)
        _log.info("%d steps are traced in %s", NUM_TRACED_STEPS, self._path)
