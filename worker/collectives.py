"""What the ranks of a group exchange inside a step, and how they find each other."""

import fcntl
import json
import os
import platform
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from quire.common.errors import NotSupported, Unavailable
from quire.worker.collectives_gloo import GlooCollective
from quire.worker.collectives_shared_memory import SharedMemoryCollective

# Longest that ranks wait for each other, be it to load a model from a slower disk. One that died is noticed at once where
# memory is shared; one that hangs is the scheduler's to notice, long before.
WAIT_TIMEOUT_S: Final = 300.0
_SIOCGIFADDR: Final = 0x8915  # linux/sockios.h


class Collective(Protocol):
    """Operations that every rank of a group calls in the same order with tensors of the same dtype.

    Results are equal to the last bit on all ranks, so that all of them draw the same tokens.
    Each raises Unavailable, reason RANK_LOST, when another rank is gone or does not come.
    """

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor, of one shape on all ranks, by the sum over ranks. 16-bit numbers are rounded once."""

    def gather_columns(self, part: Tensor, widths: Sequence[int]) -> Tensor:
        """Put the ranks' parts side by side. part: [..., widths[rank]]; result: [..., sum(widths)]."""

    def close(self) -> None:
        """Let go of the others. Comes before the process's end: gloo's threads abort a process that ends with them."""


@dataclass(frozen=True, slots=True)
class _Identity:
    """What ranks must know of each other to choose how they talk."""

    pid: int
    host: str
    machine: str
    memory_domain: str  # equal where one process can map what another made: one kernel, one set of process ids; "" if unknown


def connect(*, rendezvous_path: Path, rank: int, size: int, gpu_partial_bytes: int | None = None, gpu_draw_bytes: int = 0) -> Collective:
    """Meet the other ranks of the group at a file that is new for each meeting.

    gpu_partial_bytes: for ranks with a GPU each: of the largest partial sum of a step; None for ranks that compute on CPU
    gpu_draw_bytes:    and of what the others read of a draw

    A file and not an address, because torch's TCPStore listens on every interface. Shared memory where all ranks are
    processes of one x86 host, 3 to 40 times quicker than gloo there; else gloo, on the loopback interface if one host it is.
    """
    store = dist.FileStore(str(rendezvous_path), size)  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=WAIT_TIMEOUT_S))
    own = _Identity(os.getpid(), socket.gethostname(), platform.machine(), _memory_domain())
    store.set(f"rank/{rank}", json.dumps(asdict(own)))
    ranks = [_Identity(**json.loads(store.get(f"rank/{other}"))) for other in range(size)]
    if gpu_partial_bytes is not None:
        if any(other.host != own.host for other in ranks):
            hosts = ", ".join(sorted({other.host for other in ranks}))
            raise NotSupported(f"the GPUs of a group are on several hosts ({hosts}); they must be on one", reason="GPUS_ON_SEVERAL_HOSTS")
        from quire.worker.collectives_cuda import CudaCollective  # imports Triton

        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
        return CudaCollective(
            store, rank=rank, size=size, timeout_s=WAIT_TIMEOUT_S, partial_bytes=gpu_partial_bytes, draw_bytes=gpu_draw_bytes
        )
    if own.memory_domain and all(other.memory_domain == own.memory_domain for other in ranks) and own.machine == "x86_64":
        pids = [other.pid for other in ranks]
        return SharedMemoryCollective.connect(store, rank=rank, pids=pids, timeout_s=WAIT_TIMEOUT_S)
    if all(other.host == own.host for other in ranks):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return GlooCollective(store, rank=rank, size=size, timeout_s=WAIT_TIMEOUT_S)


def connect_hosts(*, rendezvous_address: str, host_address: str, rank: int, size: int) -> Collective:
    """Meet the other ranks of a group on several hosts, over gloo.

    rendezvous_address: IPv4 HOST:PORT of rank 0's host, where it listens
    host_address: IPv4 address of this host for the others

    Raises:
        Unavailable: the others do not come, or no interface of this host has its address.
    """
    host, _, port = rendezvous_address.rpartition(":")
    timeout = timedelta(seconds=WAIT_TIMEOUT_S)
    # Rank 0 hands over a socket of its own: torch's would listen at every address of the host.
    listener = socket.create_server((host, int(port))).detach() if rank == 0 else None
    try:
        store = dist.TCPStore(host, int(port), size, rank == 0, timeout, wait_for_workers=False, master_listen_fd=listener)  # type: ignore[attr-defined]
    except (dist.DistError, RuntimeError) as error:
        raise Unavailable(f"rank {rank} cannot meet the others at {rendezvous_address}: {error}", reason="RANK_LOST") from error
    os.environ["GLOO_SOCKET_IFNAME"] = interface_of(host_address)
    return GlooCollective(store, rank=rank, size=size, timeout_s=WAIT_TIMEOUT_S)


def interface_of(address: str) -> str:
    """The name of this host's network interface with an IPv4 address.

    Raises:
        Unavailable: none has it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                request = struct.pack("256s", name.encode())
                if socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24]) == address:
                    return name
    raise Unavailable(f"no network interface of this host has the address {address}, by which Ray knows it", reason="NO_INTERFACE")


def all_agree(collective: Collective | None, is_true: bool) -> bool:
    """Whether every rank says so: what a clock or a disk decides must be decided by all ranks alike."""
    if collective is None:
        return is_true
    objections = torch.tensor([0.0 if is_true else 1.0])
    collective.all_reduce(objections)
    return not bool(objections[0])


def least(collective: Collective | None, number: int) -> int:
    """The smallest number that any rank says."""
    if collective is None:
        return number
    return int(collective.gather_columns(torch.tensor([float(number)], dtype=torch.float64), [1] * collective.size).min())


def _memory_domain() -> str:
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""
