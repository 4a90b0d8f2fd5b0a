"""The operations around attention on the GPU: each compared with its reference at the size at which it is then timed, and torch's
own way of the same timed beside it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quire.bench.gpu_timing import relative_error, seconds_per_launch
from quire.bench.torch_ops import torch_copy_blocks, torch_rms_norm, torch_rotary_store, torch_sample, torch_silu_mul, torch_store_kv
from quire.kernels.copy_blocks import copy_blocks, copy_blocks_reference
from quire.kernels.prepare_inputs import allocate_step_tokens, append_tokens, prepare_inputs, prepare_inputs_reference
from quire.kernels.rms_norm import rms_norm, rms_norm_reference
from quire.kernels.rotary_store import rotary_store, rotary_store_reference, rotary_table
from quire.kernels.sample import SamplingInputs, sample, sample_reference
from quire.kernels.silu_mul import silu_mul, silu_mul_reference
from quire.kernels.store_kv import store_kv

# Sets of buffers that launches take in turn, so that each finds its data in memory rather than in the cache.
NUM_SETS = 8


class SmallOps:
    """Rows of the report; every row has its error, its time, the time that its bytes take, and torch's time, None where torch has no
    such operation.

    on_row: called with each row as it is done
    """

    def __init__(self, read_bytes_per_s: float, *, on_row: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._read_bytes_per_s = read_bytes_per_s
        self._on_row = on_row

    def run_all(self) -> list[dict[str, Any]]:
        for num_tokens in (1, 64, 256, 8192):
            self.rotary_store(num_tokens, 32, 8, 128, with_norm=False)
            self.rotary_store(num_tokens, 16, 8, 128, with_norm=True)
            self.rms_norm(num_tokens, 4096)
            self.silu_mul(num_tokens, 14336)
        for num_copies in (1, 8, 64):
            self.copy_blocks(num_copies)
        for num_rows in (1, 32, 256):
            self.prepare_inputs(num_rows)
            for name, options in SAMPLERS.items():
                for dtype in (torch.float32, torch.bfloat16):
                    self.sample(num_rows, name, options, dtype)
        return self.rows

    def rotary_store(self, num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, *, with_norm: bool) -> None:
        heads = [num_heads, num_kv_heads, num_kv_heads]
        sets = [torch.randn(num_tokens, sum(heads), head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(NUM_SETS)]
        pool = torch.zeros(num_tokens // 16 + 8, NUM_SETS, 2, num_kv_heads, 16, head_dim, device="cuda", dtype=torch.bfloat16)
        slots = torch.randperm(pool.shape[0] * 16, device="cuda")[:num_tokens]
        positions = torch.randint(0, 4096, (num_tokens,), device="cuda")
        table = rotary_table(1e4 ** -(torch.arange(head_dim // 2, device="cuda") / (head_dim // 2)), max_positions=4096)
        norms: dict[str, Any] = {
            name: torch.randn(head_dim, device="cuda").bfloat16() if with_norm else None for name in ("query_norm", "key_norm")
        }
        output = torch.full_like(sets[0][:, :num_heads], float("nan"))

        def launch(index: int) -> Tensor:
            query, key, value = sets[index].split(heads, dim=1)
            return rotary_store(query, key, value, pool[:, index], slots, positions, table, output=output, **norms)

        launch(0)
        query, key, value = sets[0].float().split(heads, dim=1)
        expected, expected_pool = torch.empty_like(query), torch.zeros_like(pool[:, 0], dtype=torch.float32)
        few = slots[:64]  # the reference goes token by token
        wide_norms: dict[str, Any] = {name: None if norm is None else norm.float() for name, norm in norms.items()}
        rotary_store_reference(query, key, value, expected_pool, _only(slots, few), positions, table, output=expected, **wide_norms)
        stored = pool[few // 16, 0, :, :, few % 16]
        error = max(relative_error(output, expected), relative_error(stored, expected_pool[few // 16, :, :, few % 16]))
        num_bytes = 2 * sets[0].nbytes
        name = f"rotary_store{' + norm' if with_norm else ''} {num_heads}/{num_kv_heads}"

        def torch_launch(index: int) -> Tensor:
            query, key, value = sets[index].split(heads, dim=1)
            return torch_rotary_store(query, key, value, pool[:, index], slots, positions, table, **norms)

        self._add(name, num_tokens, error, 1e-2, num_bytes, launch, torch_launch)
        if not with_norm:
            kv = [(key, value) for _, key, value in (tensors.split(heads, dim=1) for tensors in sets)]
            self._add(
                "store_kv", num_tokens, 0.0, 1e-2, 4 * kv[0][0].nbytes,
                lambda index: store_kv(kv[index][0], kv[index][1], pool[:, index], slots),
                lambda index: torch_store_kv(kv[index][0], kv[index][1], pool[:, index], slots),
            )  # fmt: skip

    def rms_norm(self, num_tokens: int, width: int) -> None:
        sets = [torch.randn(2, num_tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(NUM_SETS)]
        weight = torch.randn(width, device="cuda", dtype=torch.bfloat16)
        hidden, residual = sets[0].clone().float()
        actual = rms_norm(sets[0][0], weight, eps=1e-5, residual=sets[0][1])
        error = relative_error(actual, rms_norm_reference(hidden, weight, eps=1e-5, residual=residual))
        output = torch.empty_like(actual)
        self._add(
            "rms_norm + residual", num_tokens, error, 1e-2, 4 * output.nbytes,
            lambda index: rms_norm(sets[index][0], weight, eps=1e-5, residual=sets[index][1], output=output),
            lambda index: torch_rms_norm(sets[index][0], weight, eps=1e-5, residual=sets[index][1]),
        )  # fmt: skip

    def silu_mul(self, num_tokens: int, width: int) -> None:
        sets = [torch.randn(num_tokens, 2 * width, device="cuda", dtype=torch.bfloat16) for _ in range(NUM_SETS)]
        output = torch.full((num_tokens, width), float("nan"), device="cuda", dtype=torch.bfloat16)
        error = relative_error(silu_mul(sets[0], output=output), silu_mul_reference(sets[0].float()))
        self._add(
            "silu_mul", num_tokens, error, 1e-2, 3 * output.nbytes,
            lambda index: silu_mul(sets[index], output=output),
            lambda index: torch_silu_mul(sets[index]),
        )  # fmt: skip

    def copy_blocks(self, num_copies: int) -> None:
        pool = torch.randn(2 * 64 * NUM_SETS, 32, 2, 8, 16, 128, device="cuda", dtype=torch.bfloat16)
        ids = torch.randperm(len(pool), device="cuda").view(NUM_SETS, 2, 64)[..., :num_copies].contiguous()
        touched = ids[0].flatten()
        before = pool[touched].clone()
        copy_blocks(pool, ids[0, 0], ids[0, 1])
        local = torch.arange(len(touched), device="cuda")
        copy_blocks_reference(before, local[:num_copies], local[num_copies:])
        error = 0.0 if torch.equal(pool[touched], before) else float("inf")
        num_bytes = 2 * num_copies * pool[0].nbytes
        self._add(
            "copy_blocks of 2 MiB", num_copies, error, 1e-9, num_bytes,
            lambda index: copy_blocks(pool, ids[index, 0], ids[index, 1]),
            lambda index: torch_copy_blocks(pool, ids[index, 0], ids[index, 1]),
        )  # fmt: skip

    def prepare_inputs(self, num_rows: int) -> None:
        tokens = torch.randint(0, 1000, (num_rows, 4096), device="cuda")
        lengths = torch.randint(1, 4000, (num_rows,), device="cuda")
        tables = torch.randint(0, 1000, (num_rows, 256), device="cuda")
        order = torch.randperm(num_rows).tolist()
        spans = torch.tensor([[row, -1, 1, index] for index, row in enumerate(order)], dtype=torch.int32, device="cuda")
        step, expected = (allocate_step_tokens(num_rows, tokens.device) for _ in range(2))
        prepare_inputs(step, tokens, lengths, tables, spans, block_size=16, max_count=1)
        prepare_inputs_reference(expected, tokens, lengths, tables, spans, block_size=16)
        is_equal = all(torch.equal(getattr(step, name), getattr(expected, name)) for name in ("token_ids", "positions", "slot_mapping"))
        error = 0.0 if is_equal else float("inf")
        self._add(
            "prepare_inputs", num_rows, error, 1e-9, 0,
            lambda _: prepare_inputs(step, tokens, lengths, tables, spans, block_size=16, max_count=1),
        )  # fmt: skip
        none = torch.full((num_rows,), -1, device="cuda")  # lengths must not pass the end over many replays
        self._add("append_tokens", num_rows, 0.0, 1e-9, 0, lambda _: append_tokens(tokens, lengths, none, step.token_ids))

    def sample(self, num_rows: int, name: str, options: dict[str, float], dtype: torch.dtype) -> None:
        vocab_size = 128256
        sets = [(torch.randn(num_rows, vocab_size, device="cuda") * 3).to(dtype) for _ in range(2)]
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, **options}
        columns = {
            key: torch.full((num_rows,), value, dtype=torch.int64 if key == "top_k" else torch.float64, device="cuda")
            for key, value in settings.items()
        }
        seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), device="cuda")
        order = torch.arange(num_rows, device="cuda")
        inputs = SamplingInputs(rows=order, **columns, seed=seeds, sequence_index=order % 3, position=order * 7)
        # Scores closer than rounding may fall either way: a draw in thousands, not one in a hundred.
        actual, expected = sample(sets[0], inputs, purpose=0), sample_reference(sets[0], inputs, purpose=0)
        different = float((actual != expected).sum())
        label = f"sample {name}{'' if dtype == torch.float32 else ' bf16'}"
        self._add(
            label, num_rows, different, 1.5 if num_rows > 100 else 0.5, sets[0].nbytes,
            lambda index: sample(sets[index % 2], inputs, purpose=0),
            lambda index: torch_sample(sets[index % 2], options),
        )  # fmt: skip

    def _add(
        self,
        name: str,
        size: int,
        error: float,
        bound: float,
        num_bytes: int,
        launch: Callable[[int], object],
        torch_launch: Callable[[int], object] | None = None,
    ) -> None:
        """Launches get the number of the buffers that they take."""
        row: dict[str, Any] = {"op": name, "size": size, "error": error, "ok": error < bound}
        row |= {"us": 1e6 * _seconds(launch), "floor_us": 1e6 * num_bytes / self._read_bytes_per_s, "torch_us": None}
        if torch_launch is not None:
            try:
                row["torch_us"] = 1e6 * _seconds(torch_launch)
            except RuntimeError as failure:  # what some torch cannot capture says nothing of our kernel
                row["torch_error"] = str(failure)[:200]
        self.rows.append(row)
        self._on_row(row)


def _seconds(launch: Callable[[int], object]) -> float:
    return seconds_per_launch([partial(launch, index % NUM_SETS) for index in range(4 * NUM_SETS)])


SAMPLERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50": {"top_k": 50},
    "top-k 20, top-p 0.95": {"top_k": 20, "top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
}


def _only(slots: Tensor, few: Tensor) -> Tensor:
    """Slots other than the few become padding."""
    return torch.where(torch.isin(slots, few), slots, -1)
