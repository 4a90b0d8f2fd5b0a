"""Paged attention over a pool on the GPU, as batches that can be launched and timed; torch's own attention beside it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from quire.bench.gpu_timing import relative_error, seconds_per_launch
from quire.kernels.attention_tiles import DecodeTile, PrefillTile
from quire.kernels.decode_plan import allocate_decode_plan, plan_decode
from quire.kernels.paged_decode import attention_reference, paged_decode, paged_decode_reference
from quire.kernels.paged_prefill import PrefillChunk, cut_prefill, paged_prefill

# Of each chunk of a prompt, the tokens that are compared with the reference, whose scores take memory.
NUM_COMPARED_TOKENS: Final = 128


@dataclass(frozen=True)
class Pool:
    """One allocation, seen as a KV pool of any block size and either layout."""

    storage: Tensor  # flat

    def layers(self, *, num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, block_major: bool = True) -> list[Tensor]:
        """Each layer's view, [num_blocks, 2, num_kv_heads, block_size, head_dim]."""
        block = [2, num_kv_heads, block_size, head_dim]
        numbers = 2 * num_kv_heads * block_size * head_dim
        num_blocks = self.storage.numel() // (numbers * num_layers)
        used = self.storage[: num_blocks * num_layers * numbers]
        if block_major:
            return list(used.view(num_blocks, num_layers, *block).unbind(1))
        return list(used.view(num_layers, num_blocks, *block).unbind(0))


def make_pool(num_bytes: int) -> Pool:
    storage = torch.empty(num_bytes // 2, dtype=torch.bfloat16, device="cuda")
    for part in storage.split(2**30):
        part.normal_()
    return Pool(storage)


class DecodeCase:
    """A batch of decodes at random blocks of a pool."""

    def __init__(
        self, layers: Sequence[Tensor], lengths: Sequence[int], *, num_heads: int, window: int | None = None, tile: DecodeTile | None = None
    ) -> None:
        self.layers = layers
        num_blocks, _, self.num_kv_heads, block_size, self.head_dim = layers[0].shape
        self.lengths = torch.tensor(lengths, device="cuda")
        self.rows = torch.arange(len(lengths), device="cuda")
        widths = [-(-length // block_size) for length in lengths]
        # Blocks are distinct as long as the pool has enough; a small pool of a check lends some twice, which is harmless.
        ids = torch.randperm(num_blocks, device="cuda", dtype=torch.int32)
        ids = ids.repeat(-(-sum(widths) // num_blocks))
        self.block_tables = torch.zeros(len(lengths), max(widths), dtype=torch.int32, device="cuda")
        first = 0
        for row, width in enumerate(widths):
            self.block_tables[row, :width] = ids[first : first + width]
            first += width
        dtype = layers[0].dtype
        self.query = torch.randn(len(lengths), num_heads, self.head_dim, device="cuda").to(dtype)
        self.output = torch.empty_like(self.query)
        self.scale = self.head_dim**-0.5
        self.num_heads = num_heads
        self.num_bytes = sum(lengths) * 2 * self.num_kv_heads * self.head_dim * layers[0].element_size()
        self.window = window
        self.cut(tile)

    def cut(self, tile: DecodeTile | None) -> None:
        self.plan = allocate_decode_plan(
            num_rows=len(self.lengths),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            device=self.query.device,
            dtype=self.query.dtype,
            sliding_window=self.window,
            tile=tile,
        )
        self.make_plan()

    def make_plan(self) -> None:
        plan_decode(self.plan, self.lengths, self.rows)

    def launch(self, layer: Tensor, **options: Any) -> Tensor:
        return paged_decode(
            self.query,
            layer,
            self.block_tables,
            self.plan,
            lengths=self.lengths,
            rows=self.rows,
            scale=self.scale,
            output=self.output,
            **options,
        )

    def seconds(self) -> float:
        return seconds_per_launch([partial(self.launch, layer) for layer in self.layers])

    def error(self) -> float:
        """Relative, against float32."""
        layer = self.layers[0]
        expected = paged_decode_reference(
            self.query.float(), layer.float(), self.block_tables, lengths=self.lengths, rows=self.rows, scale=self.scale
        )
        self.output.fill_(float("nan"))
        return relative_error(self.launch(layer), expected)


def decode_batches() -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randint(100, 2048, (128,), generator=generator).tolist()
    return {
        "1 x 128": [128],
        "1 x 4096": [4096],
        "1 x 65536": [65536],
        "32 x 1024 (128 MiB)": [1024] * 32,
        "128 x 1024 (512 MiB)": [1024] * 128,
        "256 x 1024 (1 GiB)": [1024] * 256,
        "128 x 100..2048": uniform,
        "65536 and 63 x 512": [65536] + [512] * 63,
    }


def prefill_batches() -> dict[str, list[PrefillChunk]]:
    return {
        "1 x 8192": [PrefillChunk(0, 0, 8192)],
        "8 x 1024": [PrefillChunk(row, 0, 1024) for row in range(8)],
        "1 x 2048": [PrefillChunk(0, 0, 2048)],
        "2048 after 6144": [PrefillChunk(0, 6144, 2048)],
        "512 after 7680": [PrefillChunk(0, 7680, 512)],
    }


class PrefillCase:
    """Chunks of prompts over a pool, and how many operations their attention is."""

    def __init__(self, layers: Sequence[Tensor], chunks: Sequence[PrefillChunk], *, num_heads: int) -> None:
        self.decode = DecodeCase(layers, [chunk.start + chunk.num_tokens for chunk in chunks], num_heads=num_heads)
        self.chunks = chunks
        head_dim = layers[0].shape[4]
        self.group = num_heads // layers[0].shape[2]
        self.query = torch.randn(sum(chunk.num_tokens for chunk in chunks), num_heads, head_dim, device="cuda").to(layers[0].dtype)
        self.output = torch.empty_like(self.query)
        pairs = sum(chunk.num_tokens * chunk.start + chunk.num_tokens * (chunk.num_tokens + 1) // 2 for chunk in chunks)
        self.num_operations = 4 * pairs * num_heads * head_dim

    def launch(self, tile: PrefillTile, layer: Tensor, pieces: Tensor | None = None) -> Tensor:
        pieces = self.pieces(tile) if pieces is None else pieces
        tables = self.decode.block_tables
        return paged_prefill(self.query, layer, tables, pieces, scale=self.decode.scale, output=self.output, tile=tile)

    def pieces(self, tile: PrefillTile) -> Tensor:
        return pieces_of(self.chunks, tile, self.group)

    def error(self, tile: PrefillTile) -> float:
        """Relative, against float32, of each chunk's last tokens: they see all that is before them."""
        layer = self.decode.layers[0]
        self.output.fill_(float("nan"))
        outputs = self.launch(tile, layer).split([chunk.num_tokens for chunk in self.chunks])
        queries = self.query.split([chunk.num_tokens for chunk in self.chunks])
        wide = layer.float()
        expected = [
            attention_reference(
                query[-NUM_COMPARED_TOKENS:].float(), wide, self.decode.block_tables[chunk.row],
                first_position=chunk.start + chunk.num_tokens - min(NUM_COMPARED_TOKENS, chunk.num_tokens),
                scale=self.decode.scale, sliding_window=None, softcap=None, sinks=None,
            )
            for chunk, query in zip(self.chunks, queries, strict=True)
        ]  # fmt: skip
        return relative_error(torch.cat([output[-NUM_COMPARED_TOKENS:] for output in outputs]), torch.cat(expected))

    def row(self, tile: PrefillTile) -> dict[str, Any]:
        pieces = self.pieces(tile)
        launches: list[Callable[[], object]] = [partial(self.launch, tile, layer, pieces) for layer in self.decode.layers[:4]]
        try:
            seconds = seconds_per_launch(launches, num_replays=7)
        except Exception as error:  # a tile that does not fit the GPU is a row, not an end
            return {**asdict(tile), "error": str(error)[:200]}
        return {**asdict(tile), "us": seconds * 1e6, "tflops": self.num_operations / seconds / 1e12}


def pieces_of(chunks: Sequence[PrefillChunk], tile: PrefillTile, group: int) -> Tensor:
    return torch.tensor(cut_prefill(chunks, tile=tile, group=group), dtype=torch.int32, device="cuda")


def sdpa_decode_seconds(num_sequences: int, length: int) -> float:
    """torch's attention of one new token each, whose keys and values lie in one piece, with an 8B Llama's heads."""
    query = torch.randn(num_sequences, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    # Launches take different ones in turn, so that each finds its data in memory rather than in the cache.
    sets = [torch.randn(2, num_sequences, 8, length, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)]

    def launch(keys_and_values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, keys_and_values[0], keys_and_values[1], enable_gqa=True)

    return seconds_per_launch([partial(launch, keys_and_values) for keys_and_values in sets])


def cudnn_seconds(num_sequences: int, length: int) -> float:
    query = torch.randn(num_sequences, 32, length, 128, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, num_sequences, 8, length, 128, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return seconds_per_launch(
            [lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)] * 4, num_replays=7
        )
