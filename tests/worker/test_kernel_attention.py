from pathlib import Path
from typing import Any

import pytest
import torch
from paged_cases import kernel_device
from tiny_families import FAMILIES
from tiny_models import save_tiny_model

from quire.common.messages import Chunk
from quire.common.model_folder import read_model_folder
from quire.kernels.paged_attention import ChunkSpan, DecodeSpans, RaggedBatch, paged_attention
from quire.kernels.paged_prefill import PrefillChunk
from quire.worker.kernel_attention import DecodePlans, HeadShape, KernelAttention
from quire.worker.models.self_check import check_model
from quire.worker.models.transformers_model import load_transformers_model

BLOCK_SIZE = 4
CHUNKS = [Chunk(0, 2, 3, False), Chunk(4, 10, 2, True)]
ALONE = {3: 5, 1: 18, 2: 6}  # row: tokens that its query sees


@pytest.mark.kernel
@pytest.mark.parametrize(("chunks", "alone"), [(CHUNKS, ALONE), (CHUNKS, {}), ([], ALONE)], ids=["mixed", "chunks", "decodes"])
@pytest.mark.parametrize(
    ("sliding_window", "softcap", "has_sinks"), [(None, None, False), (3, 5.0, False), (None, None, True)], ids=["plain", "window", "sinks"]
)
def test_kernels_attend_as_plain_torch_does(
    chunks: list[Chunk], alone: dict[int, int], sliding_window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    device = kernel_device()
    generator = torch.Generator().manual_seed(0)
    layer = torch.randn(60, 2, 2, BLOCK_SIZE, 16, generator=generator)
    tables = torch.randperm(60, generator=generator).view(6, 10)
    rows = torch.tensor(list(alone), dtype=torch.int64)
    lengths = torch.full((6,), 40)  # of rows that no query of this step belongs to
    lengths[rows] = torch.tensor(list(alone.values()), dtype=torch.int64)
    num_chunk_tokens = sum(chunk.count for chunk in chunks)
    query = torch.randn(4, num_chunk_tokens + len(rows), 16, generator=generator).transpose(0, 1)
    sinks = torch.randn(4, generator=generator) if has_sinks else None
    how: dict[str, Any] = {"scale": 0.25, "sliding_window": sliding_window, "softcap": softcap}

    kernels = KernelAttention(
        chunks=[PrefillChunk(chunk.row, chunk.start, chunk.count) for chunk in chunks],
        num_chunk_tokens=num_chunk_tokens,
        rows=rows.to(device),
        lengths=lengths.to(device),
        block_tables=tables.to(device),
        plans=DecodePlans(max_rows=8, device=str(device)),
    )
    attended = kernels.attend(query.to(device), layer.to(device), sinks=None if sinks is None else sinks.to(device), **how)

    spans = [ChunkSpan(chunk.count, chunk.start, tables[chunk.row, : -(-(chunk.start + chunk.count) // BLOCK_SIZE)]) for chunk in chunks]
    decodes = [DecodeSpans(num_chunk_tokens + torch.arange(len(rows)), lengths[rows], tables[rows])] if alone else []
    expected = paged_attention(query, layer, RaggedBatch(spans, decodes), sinks=sinks, **how)
    torch.testing.assert_close(attended.cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_model_over_the_kernels_computes_what_it_computes_by_itself(tmp_path: Path, name: str) -> None:
    family, config = FAMILIES[name]
    device = str(kernel_device())
    model = load_transformers_model(read_model_folder(save_tiny_model(tmp_path, family, **config)), dtype="float32", device=device)
    check_model(model, dtype="float32", device=device, max_model_len=256)


def test_plans_of_one_kind_of_layer_share_their_buffers_whatever_the_batch() -> None:
    plans = DecodePlans(max_rows=8, device="cpu")
    shape = HeadShape(num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32, sliding_window=None)
    small, large = plans.of(shape, num_rows=3), plans.of(shape, num_rows=8)
    assert small.partial_outputs.data_ptr() == large.partial_outputs.data_ptr()
    assert (len(small.first_pieces), len(large.first_pieces)) == (4, 9)
    assert len(small.pieces) == 3 + small.num_slots
