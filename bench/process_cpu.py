"""CPU time of another process."""

import ctypes
import os
import time


def process_cpu_s(pid: int) -> float:
    """User and system time of all threads of a process so far, in seconds. /proc counts it in ticks of 10 ms, this in nanoseconds.

    What a running thread spent since the kernel's last look at it, some milliseconds ago, is missing: ask while it sleeps.

    Raises:
        ProcessLookupError: there is no such process.
    """
    clock = ctypes.c_int()
    error = ctypes.CDLL(None).clock_getcpuclockid(ctypes.c_int(pid), ctypes.byref(clock))
    if error:
        raise ProcessLookupError(error, os.strerror(error), str(pid))
    return time.clock_gettime(clock.value)
