"""The token ids, positions and slots of a step, looked up in the device-resident batch; and the sampled ids put back there."""

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.backend import runs_triton

_TOKENS: Final = 128  # of one program


@dataclass(frozen=True, slots=True)
class StepTokens:
    """One step's tokens. Buffers that graphs read: they keep their place."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slot_mapping: Tensor  # [num_tokens] int64; -1 for padding


def allocate_step_tokens(num_tokens: int, device: torch.device) -> StepTokens:
    """Room for a step, filled with padding."""
    zeros = torch.zeros((2, num_tokens), dtype=torch.int64, device=device)
    return StepTokens(zeros[0], zeros[1], torch.full((num_tokens,), -1, dtype=torch.int64, device=device))


def prepare_inputs(
    step: StepTokens, tokens: Tensor, lengths: Tensor, block_tables: Tensor, spans: Tensor, *, block_size: int, max_count: int
) -> None:
    """Fill in the step's tokens that the spans cover.

    tokens:       [max_rows, max_tokens_per_row] int64, of the batch
    lengths:      [max_rows] int64
    block_tables: [max_rows, width] int32 or int64
    spans:        [num_spans, 4] int32: row, first token of the row, number of tokens, first token of the step. A first token
                  of -1 stands for the row's last one (a decode), wherever that is by now. Row -1 is padding.
    max_count:    the largest number of tokens of a span
    """
    if not runs_triton(tokens):
        prepare_inputs_reference(step, tokens, lengths, block_tables, spans, block_size=block_size)
        return
    _prepare_inputs_kernel[(spans.shape[0], triton.cdiv(max_count, _TOKENS))](
        step.token_ids,
        step.positions,
        step.slot_mapping,
        tokens,
        lengths,
        block_tables,
        spans,
        tokens.stride(0),
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        TOKENS=_TOKENS,
        num_warps=1,
    )


@triton.jit
def _prepare_inputs_kernel(
    token_ids: tl.tensor,  # [num_tokens]
    positions: tl.tensor,  # [num_tokens]
    slot_mapping: tl.tensor,  # [num_tokens]
    tokens: tl.tensor,  # [max_rows, max_tokens_per_row]
    lengths: tl.tensor,  # [max_rows]
    block_tables: tl.tensor,  # [max_rows, width]
    spans: tl.tensor,  # [num_spans, 4]
    tokens_stride: int,
    table_stride: int,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    span = spans + tl.program_id(0).to(tl.int64) * 4
    row = tl.load(span).to(tl.int64)
    first = tl.load(span + 1).to(tl.int64)
    count = tl.load(span + 2)
    place = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_token = place < count
    target = tl.load(span + 3) + place
    if row < 0:
        tl.store(token_ids + target, tl.zeros([TOKENS], tl.int64), mask=is_token)
        tl.store(positions + target, tl.zeros([TOKENS], tl.int64), mask=is_token)
        tl.store(slot_mapping + target, tl.full([TOKENS], -1, tl.int64), mask=is_token)
        return
    if first < 0:
        first = tl.load(lengths + row).to(tl.int64) - 1
    position = first + place
    block_id = tl.load(block_tables + row * table_stride + position // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
    tl.store(token_ids + target, tl.load(tokens + row * tokens_stride + position, mask=is_token, other=0), mask=is_token)
    tl.store(positions + target, position, mask=is_token)
    tl.store(slot_mapping + target, block_id * BLOCK_SIZE + position % BLOCK_SIZE, mask=is_token)


def prepare_inputs_reference(
    step: StepTokens, tokens: Tensor, lengths: Tensor, block_tables: Tensor, spans: Tensor, *, block_size: int
) -> None:
    """The same, token by token."""
    for row, first, count, target in spans.tolist():
        for index in range(count):
            position = (int(lengths[row]) - 1 if first < 0 else first) + index
            step.token_ids[target + index] = tokens[row, position] if row >= 0 else 0
            step.positions[target + index] = position if row >= 0 else 0
            slot = block_tables[row, position // block_size] * block_size + position % block_size
            step.slot_mapping[target + index] = slot if row >= 0 else -1


def append_tokens(tokens: Tensor, lengths: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """Append a sampled token to each row.

    tokens:    [max_rows, max_tokens_per_row] int64
    lengths:   [max_rows] int64
    rows:      [num_rows] int64; distinct, or -1 for none (padding)
    token_ids: [num_rows] int64
    """
    if not runs_triton(tokens):
        append_tokens_reference(tokens, lengths, rows, token_ids)
        return
    _append_tokens_kernel[(triton.cdiv(rows.shape[0], _TOKENS),)](
        tokens, lengths, rows, token_ids, rows.shape[0], tokens.stride(0), ROWS=_TOKENS, num_warps=1
    )


@triton.jit
def _append_tokens_kernel(
    tokens: tl.tensor,  # [max_rows, max_tokens_per_row]
    lengths: tl.tensor,  # [max_rows]
    rows: tl.tensor,  # [num_rows]
    token_ids: tl.tensor,  # [num_rows]
    num_rows: int,
    tokens_stride: int,
    ROWS: tl.constexpr,
) -> None:
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + index, mask=index < num_rows, other=-1).to(tl.int64)
    is_row = row >= 0
    length = tl.load(lengths + row, mask=is_row, other=0)
    token_id = tl.load(token_ids + index, mask=is_row, other=0)
    tl.store(tokens + row * tokens_stride + length, token_id, mask=is_row)
    tl.store(lengths + row, length + 1, mask=is_row)


def append_tokens_reference(tokens: Tensor, lengths: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """The same, in torch."""
    is_row = rows >= 0
    indices = rows[is_row]
    tokens[indices, lengths[indices]] = token_ids[is_row]
    lengths[indices] += 1
