"""What a rank tells of itself now and then, in its StepAck: memory, CPU time, and what its start took."""

import time
from collections.abc import Mapping
from typing import Final

import torch

from quire.common import metric_names as names
from quire.common.messages import Sample
from quire.common.process_samples import own_samples

# Reading them takes a fraction of a millisecond, and nobody scrapes more often.
TELL_EVERY_S: Final = 1.0


class RankGauges:
    """Reads them at most every TELL_EVERY_S."""

    def __init__(self, device: str, phases_s: Mapping[str, float]) -> None:
        """phases_s: the phases of the rank's start, in seconds."""
        self._device = torch.device(device)
        self._startup = tuple(Sample(names.STARTUP_PHASE.name, (phase,), seconds) for phase, seconds in phases_s.items())
        self._next_s = 0.0

    def due(self) -> tuple[Sample, ...]:
        """All of them if it is time, else none."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return ()
        self._next_s = now_s + TELL_EVERY_S
        samples = own_samples(names.RANK_CPU, names.RANK_MEMORY) + self._startup
        if self._device.type == "cuda":
            free_bytes, all_bytes = torch.cuda.mem_get_info(self._device)
            samples += (
                Sample(names.DEVICE_MEMORY.name, ("free",), free_bytes),
                Sample(names.DEVICE_MEMORY.name, ("used",), all_bytes - free_bytes),
            )
        return samples
