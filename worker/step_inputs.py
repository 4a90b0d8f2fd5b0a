"""From a plan's chunks and the sticky rows to the tensors of one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.common.messages import Chunk
from quire.kernels.paged_attention import ChunkSpan, DecodeSpans, RaggedBatch
from quire.worker.batch import Batch


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One forward pass: the chunks' tokens in plan order, then a token per decoding row."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slot_mapping: Tensor  # [num_tokens] int64
    ragged: RaggedBatch


def build_step_inputs(batch: Batch, chunks: Sequence[Chunk], decoding: Sequence[int]) -> StepInputs:
    """Inputs for tokens that `batch.check_slots` has passed; ids, positions and slots are looked up on the device."""
    num_chunk_tokens = sum(chunk.count for chunk in chunks)
    device = batch.device
    rows = torch.tensor([chunk.row for chunk in chunks] + list(decoding), device=device)
    positions = batch.lengths[rows[len(chunks) :]] - 1
    if chunks:
        counts = torch.tensor([chunk.count for chunk in chunks] + [1] * len(decoding), device=device)
        rows = rows.repeat_interleave(counts, output_size=num_chunk_tokens + len(decoding))
        spans = [torch.arange(chunk.start, chunk.start + chunk.count, device=device) for chunk in chunks]
        positions = torch.cat([*spans, positions])
    block_size = batch.block_size
    return StepInputs(
        token_ids=batch.tokens[rows, positions],
        positions=positions,
        slot_mapping=batch.block_tables[rows, positions // block_size] * block_size + positions % block_size,
        ragged=RaggedBatch(
            chunks=[_chunk_span(batch, chunk) for chunk in chunks],
            decodes=_decode_spans(batch, decoding, first_token=num_chunk_tokens),
        ),
    )


def _chunk_span(batch: Batch, chunk: Chunk) -> ChunkSpan:
    num_blocks = -(-(chunk.start + chunk.count) // batch.block_size)
    return ChunkSpan(num_tokens=chunk.count, start=chunk.start, block_table=batch.block_tables[chunk.row, :num_blocks])


def _decode_spans(batch: Batch, decoding: Sequence[int], *, first_token: int) -> list[DecodeSpans]:
    """Rows grouped by length, within a factor of two: one long sequence must not pad all short ones to its length."""
    by_size: dict[int, list[int]] = {}
    for index, row in enumerate(decoding):
        num_blocks = -(-batch.rows[row].length // batch.block_size)
        by_size.setdefault((num_blocks - 1).bit_length(), []).append(index)
    spans = []
    for indices in by_size.values():
        rows = [decoding[index] for index in indices]
        width = max(-(-batch.rows[row].length // batch.block_size) for row in rows)
        on_device = torch.tensor(rows, device=batch.device)
        spans.append(
            DecodeSpans(
                tokens=torch.tensor([first_token + index for index in indices], device=batch.device),
                lengths=batch.lengths[on_device],
                block_tables=batch.block_tables[on_device, :width],
            )
        )
    return spans
