"""Ranks as processes whose peer memory is shared host memory: the kernels of quire.kernels.all_reduce between them, interpreted."""

import ctypes
import mmap
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from plan_driver import PlanDriver
from torch import Tensor

from quire.common.messages import SamplingState
from quire.common.model_folder import read_model_folder
from quire.kernels.all_reduce import MAX_PROGRAMS, Peers, all_gather, all_reduce, meet, sum_norm
from quire.kernels.sample import SamplingInputs, sample
from quire.kernels.vocab_shards import VocabShards
from quire.worker.collectives_cuda import NUM_AREAS, CudaCollective, peer_bytes
from quire.worker.gpu_memory import draw_bytes
from quire.worker.kv_cache import KvCache
from quire.worker.models.load_model import load_llama_model
from quire.worker.runner import Runner

SLOT_BYTES = 65536
_TIMEOUT_S = 120.0


def numbers(rank: int, turn: int, *sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(100 * turn + rank)).to(dtype)


def sums_and_norms(peers: Peers, shape: tuple[int, int], dtype: torch.dtype, num_turns: int) -> list[tuple[Tensor, Tensor]]:
    """The streams and norms of turns that follow each other as layers do."""
    num_tokens, width = shape
    num_bytes = num_tokens * width * dtype.itemsize
    area = own_area(peers, 2 * num_bytes)
    residual = torch.full(shape, float("nan"), dtype=dtype)
    found = []
    for turn in range(num_turns):
        start = turn % 2 * num_bytes
        area[start : start + num_bytes].view(dtype).view(shape).copy_(numbers(peers.rank, turn, *shape, dtype=dtype))
        output = torch.full(shape, float("nan"), dtype=dtype)
        weight = numbers(-1, turn, width, dtype=dtype)
        sum_norm(peers, weight, area=start, residual=residual, eps=1e-5, output=output, adds=turn > 0)
        found.append((residual.clone(), output))
    return found


def exchanges(peers: Peers, lengths: list[int], dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sums in one shot, gathered parts and sums in two shots, of several lengths, which take other numbers of programs, in turns."""
    found = []
    for turn, length in enumerate(lengths):
        part = numbers(peers.rank, turn, length, dtype=dtype)
        total = part.clone()
        all_reduce(peers, total, area=0, slot_bytes=SLOT_BYTES)
        gathered = torch.empty((peers.size, length), dtype=dtype)
        all_gather(peers, part, gathered, area=0, slot_bytes=SLOT_BYTES)
        again = part.clone()
        for _ in range(1 + turn % 2):  # so that a sum in one shot does not always find the same slot
            again.copy_(part)
            all_reduce(peers, again, area=0, slot_bytes=SLOT_BYTES, in_two_shots=True)
        found.append((total, gathered, again))
    return found


def own_area(peers: Peers, num_bytes: int) -> Tensor:
    """The first bytes of this rank's own area."""
    return torch.frombuffer((ctypes.c_char * num_bytes).from_address(int(peers.areas[peers.rank])), dtype=torch.uint8)


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any, area_bytes: int, num_meetings: int = 0) -> list[Any]:
    """What function(peers, *arguments) gives on each of `size` ranks.

    area_bytes:   of each rank's areas
    num_meetings: how many the programs have had already
    """
    context = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="quire-peers-") as folder:
        for rank in range(size):
            flags = torch.full((size, MAX_PROGRAMS), num_meetings, dtype=torch.int32)
            (Path(folder) / str(rank)).write_bytes(flags.numpy().tobytes() + bytes(area_bytes))
        processes = [
            context.Process(target=_run, args=(folder, function, rank, size, arguments, num_meetings), daemon=True) for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(_TIMEOUT_S)
                assert process.exitcode == 0, f"a rank did not end within {_TIMEOUT_S} s, or failed: {process.exitcode}"
        finally:
            for process in processes:
                process.kill()
        return [torch.load(Path(folder) / f"{rank}.result") for rank in range(size)]


def _run(folder: str, function: Callable[..., Any], rank: int, size: int, arguments: Sequence[Any], num_meetings: int) -> None:
    memories = []
    for other in range(size):
        with open(f"{folder}/{other}", "r+b") as file:
            memories.append(torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8))
    flags = torch.tensor([memory.data_ptr() for memory in memories])
    meetings = torch.full((MAX_PROGRAMS,), num_meetings, dtype=torch.int32)
    peers = Peers(rank, size, flags, flags + 4 * size * MAX_PROGRAMS, meetings)
    torch.save(function(peers, *arguments), f"{folder}/{rank}.result")


class HostPeers(CudaCollective):
    """A CudaCollective without GPUs: its peer memory is shared host memory, and its kernels are interpreted."""

    def __init__(self, peers: Peers, *, area_bytes: int, draw_bytes: int, in_two_shots: bool) -> None:
        """in_two_shots: all sums, however small"""
        self._in_two_shots = in_two_shots
        self.rank, self.size = peers.rank, peers.size
        self._has_nccl = False
        self._area_bytes, self._draw_bytes = area_bytes, draw_bytes
        self.peers = peers
        self._area = own_area(peers, peer_bytes(area_bytes, draw_bytes))

    def all_reduce(self, tensor: Tensor) -> None:
        self._all_reduce_by_peers(tensor)

    def _is_for_one_shot(self, tensor: Tensor) -> bool:
        return not self._in_two_shots and super()._is_for_one_shot(tensor)

    def gather_columns(self, part: Tensor, widths: Sequence[int]) -> Tensor:
        padded = F.pad(part, (0, max(widths) - part.shape[-1])).contiguous()
        gathered = torch.empty((self.size, *padded.shape), dtype=part.dtype)
        all_gather(self.peers, padded, gathered, area=NUM_AREAS * self._area_bytes, slot_bytes=self._area_bytes)
        return torch.cat([each[..., :width] for each, width in zip(gathered, widths, strict=True)], dim=-1)


def draw_by_native_model(
    peers: Peers,
    path: str,
    prompts: list[list[int]],
    num_tokens: int,
    area_bytes: int,
    sampling: list[SamplingState] | None,
    in_two_shots: bool,
) -> list[list[int]]:
    """What a group of native ranks draws."""
    folder = read_model_folder(Path(path))
    num_bytes = draw_bytes(folder, dtype="float32", num_ranks=peers.size, max_rows=4)
    collective = HostPeers(peers, area_bytes=area_bytes, draw_bytes=num_bytes, in_two_shots=in_two_shots)
    model = load_llama_model(folder, dtype="float32", device="cpu", collective=collective)
    kv_cache = KvCache(
        num_blocks=64, num_layers=folder.num_layers, num_kv_heads=model.num_kv_heads, block_size=4, head_dim=folder.head_dim,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    runner = Runner(
        model, kv_cache, rank=peers.rank, max_rows=4, max_model_len=40, max_batched_tokens=64, device="cpu", has_static_steps=True
    )
    return PlanDriver(runner).generate(prompts, num_tokens=num_tokens, chunk=5, stagger=1, sampling=sampling)


def draw_from_shards(
    peers: Peers, logits: Tensor, columns: SamplingInputs, dtype: torch.dtype, num_turns: int
) -> list[tuple[list[int], list[bool]]]:
    """What ranks draw, in turns, from the same logits, of which each holds its part, and which rows they found broken."""
    num_rows, vocab_size = logits.shape
    num_bytes = VocabShards.num_bytes(vocab_size=vocab_size, num_ranks=peers.size, max_rows=num_rows, dtype=dtype)
    memory = own_area(peers, num_bytes)
    shards = VocabShards(peers, memory, vocab_size=vocab_size, max_rows=num_rows, dtype=dtype)
    drawn = []
    for turn in range(num_turns):
        memory.fill_(0xFF)  # NaN, wherever nobody writes
        shards.logits.copy_(logits[:, shards.first : shards.first + shards.width].roll(turn, 0))
        broken = torch.ones(num_rows, dtype=torch.bool)
        token_ids = torch.full((num_rows,), -5)
        sample(shards.logits, columns, purpose=1, token_ids=token_ids, broken=broken, shards=shards)
        drawn.append((token_ids.tolist(), broken.tolist()))
        meet(peers)  # as the layers of the next step do
    return drawn
