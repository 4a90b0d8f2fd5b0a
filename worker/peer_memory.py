"""Memory of a GPU that the other ranks' GPUs of one host read and write: CUDA's interprocess handles, by the driver's own calls."""

import ctypes
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from quire.common.errors import Unavailable
from quire.kernels.all_reduce import MAX_PROGRAMS, Peers
from quire.worker.collectives_shared_memory import Board

_HANDLE_BYTES: Final = 64  # cuda.h: CU_IPC_HANDLE_SIZE
_LAZY_PEER_ACCESS: Final = 1  # cuda.h: CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
# Data begins at a multiple of this, as what torch allocates does.
_ALIGNMENT: Final = 512


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class PeerMemory:
    """Flags and areas for the kernels of quire.kernels.all_reduce, the same on each rank. It lives as long as the process."""

    def __init__(self, board: Board, *, rank: int, size: int, area_bytes: int) -> None:
        """Make this rank's memory, and meet the others' through the board.

        area_bytes: of this and every other rank

        Raises:
            Unavailable: the GPUs cannot read each other's memory, or the driver refuses, by its word.
        """
        torch.cuda.init()
        torch.zeros(1, device="cuda")  # the driver's calls need this thread to have a context
        flag_bytes = -(-4 * size * MAX_PROGRAMS // _ALIGNMENT) * _ALIGNMENT
        driver = _Driver()
        own = driver.allocate(flag_bytes + area_bytes)
        board.set(f"peer-memory/{rank}", driver.export(own).hex())
        begins = [own if other == rank else driver.open(bytes.fromhex(board.get(f"peer-memory/{other}").decode())) for other in range(size)]
        self.peers = Peers(
            rank=rank,
            size=size,
            flags=torch.tensor(begins, device="cuda"),
            areas=torch.tensor([begin + flag_bytes for begin in begins], device="cuda"),
            meetings=torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device="cuda"),
        )
        self.area = _as_tensor(own + flag_bytes, area_bytes)  # [area_bytes] uint8: this rank's own


class _Driver:
    """The few calls of the driver's library that torch does not offer."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise Unavailable(f"the GPU driver's library cannot be loaded: {error}", reason="NO_GPU_DRIVER") from error

    def allocate(self, num_bytes: int) -> int:
        """The address of new memory, all zeros."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        self._call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(num_bytes))
        self._call("cuCtxSynchronize")
        return address.value

    def export(self, address: int) -> bytes:
        """What another process opens the memory by."""
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle)

    def open(self, exported: bytes) -> int:
        """Where another process's memory lies for this one."""
        address = ctypes.c_uint64()
        handle = _Handle.from_buffer_copy(exported)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return address.value

    def _call(self, name: str, *arguments: Any) -> None:
        function: Callable[..., int] = getattr(self._library, name)
        code = function(*arguments)
        if code:
            word = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(word))
            named = (word.value or b"unknown").decode()
            raise Unavailable(
                f"the ranks' GPUs cannot share memory: {name} failed with {named} ({code}); they must be of one host with peer access "
                "(nvidia-smi topo -p2p r), and their processes of one container",
                reason="NO_PEER_MEMORY",
            )


def _as_tensor(address: int, num_bytes: int) -> Tensor:
    class _Memory:
        __cuda_array_interface__: Final = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}

    return torch.as_tensor(_Memory(), device="cuda")
