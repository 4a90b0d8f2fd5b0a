"""From a plan's chunks and the sticky rows to the tensors of one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.common.messages import Chunk
from quire.kernels.backend import runs_triton
from quire.kernels.paged_attention import ChunkSpan, DecodeSpans, RaggedBatch
from quire.kernels.paged_prefill import PrefillChunk
from quire.kernels.prepare_inputs import StepTokens, prepare_inputs
from quire.worker.batch import Batch
from quire.worker.device_tensor import device_tensor
from quire.worker.kernel_attention import KernelAttention


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One forward pass: the tokens of longer chunks in plan order, then of chunks of one token, then one per decoding row.

    A chunk of one token is attended as a decode is: the rows of a beam search share one call then, and a sequence that is
    resumed with its last token alone computes what it would have decoded.
    """

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slot_mapping: Tensor  # [num_tokens] int64
    ragged: RaggedBatch  # for attention in plain torch; empty where `kernels` is not None
    chunk_places: Sequence[int]  # of each chunk of the plan: where its tokens begin in this pass
    decode_places: range  # of each decoding row: where its token is
    kernels: KernelAttention | None = None


def build_step_inputs(batch: Batch, chunks: Sequence[Chunk], decoding: Sequence[int]) -> StepInputs:
    """Inputs for tokens that `batch.check_slots` has passed; ids, positions and slots are looked up on the device."""
    device = batch.device
    order = sorted(range(len(chunks)), key=lambda index: chunks[index].count == 1)  # keeps the plan's order otherwise
    places = [0] * len(chunks)
    num_chunk_tokens = 0
    for index in order:
        places[index] = num_chunk_tokens
        num_chunk_tokens += chunks[index].count
    longer = [chunk for chunk in chunks if chunk.count > 1]
    lone = [chunk for chunk in chunks if chunk.count == 1]
    if runs_triton(batch.tokens):
        return _build_for_kernels(batch, longer, lone, decoding, places)

    rows = torch.tensor([chunk.row for chunk in (*longer, *lone)] + list(decoding), device=device)
    positions = batch.lengths[rows[len(chunks) :]] - 1
    if chunks:
        counts = torch.tensor([chunk.count for chunk in (*longer, *lone)] + [1] * len(decoding), device=device)
        rows = rows.repeat_interleave(counts, output_size=num_chunk_tokens + len(decoding))
        spans = [torch.arange(chunk.start, chunk.start + chunk.count, device=device) for chunk in longer]
        positions = torch.cat([*spans, torch.tensor([chunk.start for chunk in lone], dtype=torch.int64, device=device), positions])
    block_size = batch.block_size
    # What attends alone: (row, tokens that it sees), whose tokens lie at the end of the pass.
    alone = [(chunk.row, chunk.start + 1) for chunk in lone] + [(row, batch.rows[row].length) for row in decoding]
    return StepInputs(
        token_ids=batch.tokens[rows, positions],
        positions=positions,
        slot_mapping=batch.block_tables[rows, positions // block_size] * block_size + positions % block_size,
        ragged=RaggedBatch(
            chunks=[_chunk_span(batch, chunk) for chunk in longer],
            decodes=_decode_spans(batch, alone, positions, first_token=num_chunk_tokens - len(lone)),
        ),
        chunk_places=places,
        decode_places=range(num_chunk_tokens, num_chunk_tokens + len(decoding)),
    )


def _build_for_kernels(
    batch: Batch, longer: Sequence[Chunk], lone: Sequence[Chunk], decoding: Sequence[int], places: Sequence[int]
) -> StepInputs:
    """The same on a GPU: one copy from the host says which tokens, one launch looks them up, attention's share comes with the layers."""
    spans: list[tuple[int, int, int, int]] = []
    num_tokens = 0
    for chunk in (*longer, *lone):
        spans.append((chunk.row, chunk.start, chunk.count, num_tokens))
        num_tokens += chunk.count
    num_chunk_tokens = num_tokens - len(lone)
    spans += [(row, -1, 1, num_tokens + index) for index, row in enumerate(decoding)]
    first_decode, num_tokens = num_tokens, num_tokens + len(decoding)
    step = StepTokens(*torch.empty((3, num_tokens), dtype=torch.int64, device=batch.device).unbind(0))
    prepare_inputs(
        step,
        batch.tokens,
        batch.lengths,
        batch.block_tables,
        device_tensor(spans, device=batch.device, dtype=torch.int32),
        block_size=batch.block_size,
        max_count=max(count for _, _, count, _ in spans),
    )
    lengths = batch.lengths
    if lone:  # they see no further than themselves, wherever their rows end
        rows = device_tensor([chunk.row for chunk in lone], device=batch.device)
        lengths = lengths.index_copy(0, rows, device_tensor([chunk.start + 1 for chunk in lone], device=batch.device))
    return StepInputs(
        token_ids=step.token_ids,
        positions=step.positions,
        slot_mapping=step.slot_mapping,
        ragged=RaggedBatch(chunks=(), decodes=()),
        chunk_places=places,
        decode_places=range(first_decode, num_tokens),
        kernels=KernelAttention(
            chunks=[PrefillChunk(chunk.row, chunk.start, chunk.count) for chunk in longer],
            num_chunk_tokens=num_chunk_tokens,
            rows=device_tensor([chunk.row for chunk in lone] + list(decoding), device=batch.device),
            lengths=lengths,
            block_tables=batch.block_tables,
            plans=batch.decode_plans,
        ),
    )


def _chunk_span(batch: Batch, chunk: Chunk) -> ChunkSpan:
    num_blocks = -(-(chunk.start + chunk.count) // batch.block_size)
    return ChunkSpan(num_tokens=chunk.count, start=chunk.start, block_table=batch.block_tables[chunk.row, :num_blocks])


def _decode_spans(batch: Batch, alone: Sequence[tuple[int, int]], positions: Tensor, *, first_token: int) -> list[DecodeSpans]:
    """Rows grouped by length, within a factor of two: one long sequence must not pad all short ones to its length."""
    widths = [-(-length // batch.block_size) for _, length in alone]
    by_size: dict[int, list[int]] = {}
    for index, width in enumerate(widths):
        by_size.setdefault((width - 1).bit_length(), []).append(index)
    spans = []
    for indices in by_size.values():
        rows = torch.tensor([alone[index][0] for index in indices], device=batch.device)
        tokens = torch.tensor([first_token + index for index in indices], device=batch.device)
        spans.append(
            DecodeSpans(
                tokens=tokens,
                lengths=positions[tokens] + 1,
                block_tables=batch.block_tables[rows, : max(widths[index] for index in indices)],
            )
        )
    return spans
