"""A step's attention by the Triton kernels: prepared once for all layers, then two launches or three for each of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quire.kernels.attention_tiles import PrefillTile, prefill_tile
from quire.kernels.decode_plan import DecodePlan, allocate_decode_plan, plan_decode
from quire.kernels.paged_decode import paged_decode
from quire.kernels.paged_prefill import PrefillChunk, cut_prefill, paged_prefill
from quire.worker.device_tensor import device_tensor


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What of a layer its decode plan depends on."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    sliding_window: int | None


class DecodePlans:
    """The buffers behind decode plans, as large as the batch, made when first asked for and kept: one for each kind of layer."""

    def __init__(self, *, max_rows: int, device: str) -> None:
        self._max_rows = max_rows
        self._device = torch.device(device)
        self._plans: dict[HeadShape, DecodePlan] = {}

    def of(self, shape: HeadShape, *, num_rows: int) -> DecodePlan:
        """A plan for `num_rows` decodes, not filled in; it overwrites the last one of this shape."""
        if shape not in self._plans:
            self._plans[shape] = allocate_decode_plan(
                num_rows=self._max_rows,
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                dtype=shape.dtype,
                device=self._device,
                sliding_window=shape.sliding_window,
            )
        return self._plans[shape].part(num_rows)


@dataclass(frozen=True, slots=True)
class KernelAttention:
    """Which sequences the tokens of one step belong to: the chunks' tokens in order, then one for each of `rows`."""

    chunks: Sequence[PrefillChunk]
    num_chunk_tokens: int
    rows: Tensor  # [num_decodes] int64, of the batch
    lengths: Tensor  # [max_rows] int64; tokens that a row's query sees, its own included
    block_tables: Tensor  # [max_rows, width] int64
    plans: DecodePlans
    # What the layers of this step share, made by the first that needs it.
    _filled: dict[HeadShape, DecodePlan] = field(default_factory=dict)
    _pieces: dict[tuple[PrefillTile, int], Tensor] = field(default_factory=dict)

    def attend(
        self, query: Tensor, kv_cache: Tensor, *, scale: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """What `paged_attention` gives: causal attention of every query to its own sequence, whose last key is the query's own.

        query:    [num_tokens, num_heads, head_dim], any strides
        kv_cache: [num_blocks, 2, num_kv_heads, block_size, head_dim]  one layer's strided view
        result:   [num_tokens, num_heads, head_dim], contiguous
        """
        if query.stride(2) != 1:
            query = query.contiguous()
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        num_heads, head_dim = query.shape[1:]
        num_kv_heads, block_size = kv_cache.shape[2:4]
        first = self.num_chunk_tokens
        if self.chunks:
            tile = prefill_tile(head_dim=head_dim, num_bytes=query.dtype.itemsize, block_size=block_size)
            paged_prefill(
                query[:first],
                kv_cache,
                self.block_tables,
                self._cut(tile, num_heads // num_kv_heads),
                scale=scale,
                sliding_window=sliding_window,
                softcap=softcap,
                sinks=sinks,
                output=output[:first],
                tile=tile,
            )
        if len(self.rows):
            paged_decode(
                query[first:],
                kv_cache,
                self.block_tables,
                self._plan(HeadShape(num_heads, num_kv_heads, head_dim, query.dtype, sliding_window)),
                lengths=self.lengths,
                rows=self.rows,
                scale=scale,
                softcap=softcap,
                sinks=sinks,
                output=output[first:],
            )
        return output

    def _cut(self, tile: PrefillTile, group: int) -> Tensor:
        key = (tile, group)
        if key not in self._pieces:
            pieces = cut_prefill(self.chunks, tile=tile, group=group)
            self._pieces[key] = device_tensor(pieces, device=str(self.rows.device), dtype=torch.int32)
        return self._pieces[key]

    def _plan(self, shape: HeadShape) -> DecodePlan:
        if shape not in self._filled:
            plan = self.plans.of(shape, num_rows=len(self.rows))
            plan_decode(plan, self.lengths, self.rows)
            self._filled[shape] = plan
        return self._filled[shape]
