"""What this process takes of the machine, for processes that have no metric library."""

import os
import resource
import time
from pathlib import Path
from typing import Final

from quire.common.messages import Sample
from quire.common.metric_names import Metric

_STATM: Final = Path("/proc/self/statm")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def own_samples(cpu: Metric, memory: Metric) -> tuple[Sample, ...]:
    """CPU seconds since the process began, and the bytes of memory that it has now, under these metrics' names."""
    return (Sample(cpu.name, (), time.process_time()), Sample(memory.name, (), resident_bytes()))


def resident_bytes() -> int:
    """Memory of this process that is in RAM; where /proc does not tell, the most that it ever was."""
    try:
        return int(_STATM.read_text().split()[1]) * _PAGE_BYTES
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
