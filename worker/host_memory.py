"""How much memory of this host a new allocation may count on."""

from pathlib import Path
from typing import Final

from quire.common.errors import ConfigError

_GIB: Final = 2**30


def check_pool_fits(*, num_blocks: int, block_bytes: int, available_bytes: int | None, num_ranks: int = 1) -> None:
    """Refuse a pool that memory cannot hold, before the kernel's out-of-memory killer does.

    num_ranks:       ranks on this host, each with a pool of this size
    available_bytes: None when this system does not say; then everything passes

    Raises:
        ConfigError: with the arithmetic.
    """
    all_bytes = num_ranks * num_blocks * block_bytes
    if available_bytes is not None and all_bytes > available_bytes:
        each = "" if num_ranks == 1 else f" on each of {num_ranks} ranks"
        raise ConfigError(
            f"the KV pool needs {num_blocks} blocks of {block_bytes} bytes{each}, {all_bytes / _GIB:.2f} GiB, and this host has "
            f"{available_bytes / _GIB:.2f} GiB available, room for {available_bytes // (num_ranks * block_bytes)} blocks; lower "
            f"gpu_blocks, kv_cache_memory or max_sequences",
            reason="NOT_ENOUGH_MEMORY",
        )


def available_memory_bytes(*, meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What this process may still allocate: the host's available memory, or less if its container is limited."""
    host_kib = _first_number(_read(meminfo) or "", "MemAvailable:")
    answers = [] if host_kib is None else [host_kib * 1024]
    limit, used = _read(cgroup / "memory.max"), _read(cgroup / "memory.current")
    if limit is not None and used is not None and limit.strip().isdigit():
        # Files that were only read count as used until someone needs the memory.
        reclaimable = _first_number(_read(cgroup / "memory.stat") or "", "inactive_file ")
        answers.append(max(0, int(limit) - int(used) + (reclaimable or 0)))
    return min(answers, default=None)


def _first_number(text: str, prefix: str) -> int | None:
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(prefix)), None)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
