"""The Llama family in our own words, for speed: Llama, Mistral, Qwen2, Qwen3. One fused product where checkpoints have several."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.common.errors import ConfigError
from quire.common.model_folder import ModelFolder, read_config
from quire.kernels.linear_tiles import LinearTile, few_rows_tile, head_tile, row_tile
from quire.kernels.paged_attention import paged_attention
from quire.kernels.rms_norm import rms_norm
from quire.kernels.rotary_store import rotary_store, rotary_table
from quire.kernels.silu_mul import silu_mul
from quire.kernels.skinny_linear import skinny_linear
from quire.kernels.vocab_shards import VocabShards, shard_width
from quire.worker.collectives import Collective
from quire.worker.collectives_cuda import CudaCollective
from quire.worker.kv_cache import KvCache
from quire.worker.step_inputs import StepInputs

FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")

# From so many rows on a product is bound by its operations, and adds to the residual stream on its way; the norm then reads half as much.
MIN_ROWS_ADDED_BY_PRODUCTS: Final = 1024
# Which of a CudaCollective's areas a partial result lies in: never that of the one before.
_EMBEDDED: Final = 0
_ATTENDED: Final = 1
_MLP: Final = 2

# (queries [num_tokens, num_heads, head_dim], the step's own keys and values [num_tokens + padding, num_kv_heads, head_dim], one
# layer of the cache, which has them as well) -> the queries' shape: attention of this step's tokens.
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """What of config.json the family's arithmetic depends on."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    is_tied: bool  # the output layer is the token embedding
    has_qkv_bias: bool
    has_qk_norm: bool
    sliding_window: int | None
    rope_theta: float
    rope: tuple[tuple[str, Any], ...]  # rope_type and what it needs


def read_llama_config(folder: ModelFolder) -> LlamaConfig:
    """Read a folder's config.json.

    Raises:
        ConfigError: it asks for something that only transformers' modules do, by name.
    """
    config = read_config(folder.path)
    family = folder.model_type
    if family not in FAMILIES:
        raise _refusal(family, f"the families are {', '.join(FAMILIES)}")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise _refusal(family, f"its activation is {activation}, not silu")
    if config.get("mlp_bias"):
        raise _refusal(family, "its MLP has biases")
    if config.get("attention_bias") and family in ("llama", "qwen3"):
        raise _refusal(family, "its attention's output has a bias")
    if config.get("quantization_config"):
        raise _refusal(family, "its weights are quantized")
    rope = {**(config.get("rope_parameters") or config.get("rope_scaling") or {})}
    rope_type = str(rope.get("rope_type") or rope.get("type") or "default")
    if rope_type not in _ROPES or "partial_rotary_factor" in {**rope, **config}:
        raise _refusal(family, f"its rotary positions are of kind {rope_type}; known: {', '.join(_ROPES)}, on whole heads")
    window = config.get("sliding_window", 4096) if family == "mistral" else None
    if config.get("use_sliding_window") and family in ("qwen2", "qwen3"):
        raise _refusal(family, "only some of its layers have a sliding window")
    return LlamaConfig(
        hidden_size=folder.hidden_size,
        intermediate_size=int(config["intermediate_size"]),
        num_layers=folder.num_layers,
        num_heads=folder.num_heads,
        num_kv_heads=folder.num_kv_heads,
        head_dim=folder.head_dim,
        vocab_size=folder.vocab_size,
        max_positions=folder.max_positions,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        has_qkv_bias=family == "qwen2",
        has_qk_norm=family == "qwen3",
        sliding_window=int(window) if window is not None and window < folder.max_positions else None,
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope=tuple(sorted({**rope, "rope_type": rope_type}.items())),
    )


@dataclass(slots=True)
class LlamaLayer:
    """One layer's weights on one rank. Rows of a product are its outputs, as checkpoints have them."""

    input_norm: Tensor  # [hidden_size]
    qkv: Tensor  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]
    qkv_bias: Tensor | None
    query_norm: Tensor | None  # [head_dim]
    key_norm: Tensor | None
    output: Tensor  # [hidden_size, num_heads * head_dim]
    mlp_norm: Tensor  # [hidden_size]
    gate_up: Tensor  # [2 * intermediate_size, hidden_size]: all gates, then all others
    down: Tensor  # [hidden_size, intermediate_size]


@dataclass(slots=True)
class LlamaWeights:
    """All weights of one rank. Layers' and head's may be laid out as packed_weight.packed() does, of which `product` then knows."""

    embedding: Tensor  # [vocabulary's part, hidden_size]
    layers: list[LlamaLayer]
    final_norm: Tensor  # [hidden_size]
    head: Tensor  # [vocabulary's part, hidden_size]; the embedding itself where they are tied
    product: Callable[..., Tensor] = F.linear  # (rows, weight, bias or nothing) -> rows @ weight.T + bias


@dataclass(frozen=True, slots=True)
class LlamaShare:
    """One rank's part of a model over `size` ranks."""

    config: LlamaConfig
    rank: int = 0
    size: int = 1

    @property
    def num_heads(self) -> int:
        return self.config.num_heads // self.size

    @property
    def num_kv_heads(self) -> int:
        """KV heads are replicated when fewer than ranks."""
        return max(1, self.config.num_kv_heads // self.size)

    @property
    def first_kv_head(self) -> int:
        return self.rank * self.config.num_kv_heads // self.size

    def bounds(self, width: int) -> tuple[int, int]:
        """Where this rank's part of `width` rows or columns begins and ends; parts differ by at most one."""
        return self.rank * width // self.size, (self.rank + 1) * width // self.size

    @property
    def vocab_bounds(self) -> tuple[int, int]:
        """Where this rank's part of the vocabulary begins and ends."""
        return self._vocab_bounds(self.rank)

    @property
    def vocab_widths(self) -> list[int]:
        """Tokens of each rank's part."""
        return [end - first for first, end in map(self._vocab_bounds, range(self.size))]

    def _vocab_bounds(self, rank: int) -> tuple[int, int]:
        vocab_size, width = self.config.vocab_size, shard_width(self.config.vocab_size, self.size)
        return min(rank * width, vocab_size), min((rank + 1) * width, vocab_size)


class LlamaModel:
    """A model of the family, or one rank's share of it, that writes to and reads from a KvCache."""

    def __init__(self, folder: ModelFolder, share: LlamaShare, weights: LlamaWeights, collective: Collective | None = None) -> None:
        self.folder = folder
        self.config = share.config
        self.weights = weights
        self.vocab_size = folder.vocab_size
        self.num_heads = share.num_heads
        self.num_kv_heads = share.num_kv_heads
        self._share = share
        self._collective = collective
        self._peers = collective if isinstance(collective, CudaCollective) else None
        # Our own products of few rows are for GPUs and the 16-bit types of tensor cores.
        self._has_kernels = weights.embedding.is_cuda and weights.embedding.dtype.itemsize == 2
        # Tiles of few rows are for Hopper: others lack its warpgroup products, and many the 192 KiB of shared memory that 64 rows take.
        self._has_few_rows_tiles = self._has_kernels and torch.cuda.get_device_capability(weights.embedding.device)[0] == 9
        widths = (share.config.hidden_size, share.num_heads * share.config.head_dim, weights.layers[0].down.shape[1])
        has_tiles = all(row_tile(num_inputs=width) is not None for width in widths)
        is_on_gpus = collective is None or self._peers is not None
        self._has_row_products = self._has_kernels and has_tiles and is_on_gpus and not share.config.has_qkv_bias
        frequencies = rope_frequencies(share.config, device=weights.embedding.device)
        self._cos_sin = rotary_table(frequencies, max_positions=share.config.max_positions)

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        return float(self.config.head_dim**-0.5)

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer on one rank, the smallest of them: all ranks must have graphs of the same sizes."""
        config, num_ranks = self.config, self._share.size
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * config.head_dim
        return config.hidden_size * (heads + 3 * (config.intermediate_size // num_ranks))

    def forward(self, inputs: StepInputs, kv_cache: KvCache, *, logits_index: Tensor) -> Tensor:
        """Compute a step's tokens: their keys and values go to the cache, the logits of some of them come back.

        logits_index: [n] int64, places in the step's tokens
        result:       [n, vocab_size] float32
        """
        how: dict[str, Any] = {"scale": self.scale, "sliding_window": self.config.sliding_window, "softcap": None, "sinks": None}

        def attend(query: Tensor, _key: Tensor, _value: Tensor, layer: Tensor) -> Tensor:
            if inputs.kernels is None:
                return paged_attention(query, layer, inputs.ragged, **how)
            return inputs.kernels.attend(query, layer, **how)

        hidden = self.hidden(inputs.token_ids, inputs.positions, inputs.slot_mapping, kv_cache, attend, wanted=logits_index)
        return self.logits(hidden).float()

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        kv_cache: KvCache,
        attend: Attend,
        *,
        output: Tensor | None = None,
        num_dense: int | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """The normed last hidden state of every token: [num_tokens, hidden_size], in `output` if given.

        token_ids, positions, slot_mapping: [num_tokens] int64; a slot of -1 is of padding, whose result is anything
        num_dense: None: `attend` reads keys and values from the cache alone. Else it is given rotated keys, and zeros behind the
                   step's tokens up to so many
        wanted:    [n] integers: the places of the tokens whose states are asked for, which then are the result, [n, hidden_size].
                   Nothing reads the other tokens' behind the last layer's attention, so they end there
        """
        config, weights = self.config, self.weights
        num_tokens = token_ids.shape[0]
        query_width, kv_width = self.num_heads * config.head_dim, self.num_kv_heads * config.head_dim
        residual, normed = self._begin(token_ids)
        if num_tokens == 1 and wanted is None and self._has_row_products:
            return self._hidden_of_row(residual, positions, slot_mapping, kv_cache, attend, output)
        for index, layer in enumerate(weights.layers):
            qkv = self._padded_product(normed, layer.qkv, layer.qkv_bias, num_rows=num_dense)
            queries, keys, values = (part.view(len(qkv), -1, config.head_dim) for part in qkv.split((query_width, kv_width, kv_width), 1))
            cache = kv_cache.layer(index)
            rotary_store(
                queries[:num_tokens],
                keys[:num_tokens],
                values[:num_tokens],
                cache,
                slot_mapping,
                positions,
                self._cos_sin,
                query_norm=layer.query_norm,
                key_norm=layer.key_norm,
                eps=config.norm_eps,
                output=queries[:num_tokens],
                key_output=None if num_dense is None else keys[:num_tokens],
            )
            attended = attend(queries, keys, values, cache).view(num_tokens, query_width)
            is_last = index + 1 == len(weights.layers)
            if is_last and wanted is not None:
                attended, residual = attended.index_select(0, wanted), residual.index_select(0, wanted)
            normed = self._add_product(_ATTENDED, attended, layer.output, layer.mlp_norm, residual=residual)
            gated = silu_mul(weights.product(normed, layer.gate_up))
            next_norm = weights.final_norm if is_last else weights.layers[index + 1].input_norm
            target = output if is_last else None
            normed = self._add_product(_MLP, gated, layer.down, next_norm, residual=residual, output=target)
        return normed

    def logits(self, hidden: Tensor, *, output: Tensor | None = None) -> Tensor:
        """Of normed hidden states [n, hidden_size]: [n, vocab_size] in the model's dtype, in `output` if given."""
        if self._collective is None:
            return self.part_of_logits(hidden, output=output)
        gathered = self.gather_logits(self.part_of_logits(hidden))
        return gathered if output is None else output.copy_(gathered)

    def part_of_logits(self, hidden: Tensor, *, output: Tensor | None = None) -> Tensor:
        """Those of this rank's part of the vocabulary: [n, part's tokens], in `output` if given."""
        tile = head_tile(num_rows=len(hidden), num_inputs=self.config.hidden_size) if self._has_kernels else None
        return self._tiled_product(hidden, self.weights.head, tile, output=output)

    def gather_logits(self, part: Tensor) -> Tensor:
        """All ranks' parts side by side; of a single rank its own."""
        return part if self._collective is None else self._collective.gather_columns(part, self._share.vocab_widths)

    def vocab_shards(self, *, max_rows: int) -> VocabShards | None:
        """Where the group's ranks draw together, if they are on GPUs."""
        if self._peers is None:
            return None
        dtype = self.weights.head.dtype
        return VocabShards(self._peers.peers, self._peers.draw_memory, vocab_size=self.vocab_size, max_rows=max_rows, dtype=dtype)

    def _hidden_of_row(
        self, residual: Tensor, positions: Tensor, slot_mapping: Tensor, kv_cache: KvCache, attend: Attend, output: Tensor | None
    ) -> Tensor:
        """The same for a single token, whose products take norms, gates and sums in on their way."""
        config, dim = self.config, self.config.head_dim
        for index, layer in enumerate(self.weights.layers):
            qkv = self._row_product(residual, layer.qkv, norm=layer.input_norm).view(1, -1, dim)
            query, key, value = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
            cache = kv_cache.layer(index)
            rotary_store(
                query,
                key,
                value,
                cache,
                slot_mapping,
                positions,
                self._cos_sin,
                query_norm=layer.query_norm,
                key_norm=layer.key_norm,
                eps=config.norm_eps,
                output=query,
            )
            attended = attend(query, key, value, cache).view(1, -1)
            self._add_row_product(_ATTENDED, attended, layer.output, residual=residual)
            gated = self._row_product(residual, layer.gate_up, norm=layer.mlp_norm, is_gated=True)
            self._add_row_product(_MLP, gated, layer.down, residual=residual)
        return rms_norm(residual, self.weights.final_norm, eps=config.norm_eps, output=output)

    def _row_product(self, row: Tensor, weight: Tensor, *, is_gated: bool = False, **how: Any) -> Tensor:
        tile = row_tile(num_inputs=row.shape[1], is_gated=is_gated)
        assert tile is not None, weight.shape
        return skinny_linear(row, weight, tile=tile, is_gated=is_gated, eps=self.config.norm_eps, **how)

    def _add_row_product(self, area: int, row: Tensor, weight: Tensor, *, residual: Tensor) -> None:
        """Add a linear layer of a row, summed over ranks, to the residual stream: [1, hidden_size], in place."""
        if self._peers is None:
            self._row_product(row, weight, residual=residual)
            return
        self._row_product(row, weight, output=self._peers.partial(area, 1, len(weight), row.dtype))
        # The norm of a single row is taken by the product that needs it, and this one by nobody.
        unused = torch.empty_like(residual)
        self._peers.sum_norm(area, self.weights.final_norm, residual=residual, eps=self.config.norm_eps, output=unused)

    def _begin(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream of new tokens, and its first norm."""
        norm, eps = self.weights.layers[0].input_norm, self.config.norm_eps
        if self._collective is None:
            residual = F.embedding(token_ids, self.weights.embedding)
            return residual, rms_norm(residual, norm, eps=eps)
        # Rows that are here, zeros for the others; the sum over ranks has them all.
        first, end = self._share.vocab_bounds
        is_here = (token_ids >= first) & (token_ids < end)
        embedded = F.embedding((token_ids - first).clamp(0, end - first - 1), self.weights.embedding).masked_fill_(~is_here[:, None], 0)
        if self._peers is None:
            self._collective.all_reduce(embedded)
            return embedded, rms_norm(embedded, norm, eps=eps)
        self._peers.partial(_EMBEDDED, len(embedded), embedded.shape[1], embedded.dtype).copy_(embedded)
        normed = torch.empty_like(embedded)
        self._peers.sum_norm(_EMBEDDED, norm, residual=embedded, eps=eps, output=normed, adds=False)
        return embedded, normed

    def _add_product(
        self, area: int, inputs: Tensor, weight: Tensor, norm: Tensor, *, residual: Tensor, output: Tensor | None = None
    ) -> Tensor:
        """Add a linear layer, summed over ranks, to the residual stream, in place; the norm of that."""
        eps = self.config.norm_eps
        if self._collective is None and len(inputs) >= MIN_ROWS_ADDED_BY_PRODUCTS and not weight.is_mkldnn:
            residual.addmm_(inputs, weight.t())
            return rms_norm(residual, norm, eps=eps, output=output)
        if self._peers is None:
            product = self._product(inputs, weight)
            if self._collective is not None:
                self._collective.all_reduce(product)
            return rms_norm(product, norm, eps=eps, residual=residual, output=output)
        self._product(inputs, weight, output=self._peers.partial(area, len(inputs), len(weight), inputs.dtype))
        normed = torch.empty_like(residual) if output is None else output
        self._peers.sum_norm(area, norm, residual=residual, eps=eps, output=normed)
        return normed

    def _padded_product(self, rows: Tensor, weight: Tensor, bias: Tensor | None, *, num_rows: int | None) -> Tensor:
        """A linear layer; with num_rows zeros behind its rows, up to so many."""
        if num_rows is None or num_rows <= len(rows):
            return self._product(rows, weight) if bias is None else self.weights.product(rows, weight, bias)
        product = torch.empty((num_rows, len(weight)), dtype=rows.dtype, device=rows.device)
        product[len(rows) :] = 0
        if bias is None:
            torch.mm(rows, weight.t(), out=product[: len(rows)])
        else:
            torch.addmm(bias, rows, weight.t(), out=product[: len(rows)])
        return product

    def _product(self, rows: Tensor, weight: Tensor, *, output: Tensor | None = None) -> Tensor:
        """A linear layer without bias: [num_tokens, columns], in `output` if given. weight: [columns, inputs]"""
        has_tiles = self._has_few_rows_tiles
        tile = few_rows_tile(num_rows=len(rows), num_columns=len(weight), num_inputs=rows.shape[1]) if has_tiles else None
        return self._tiled_product(rows, weight, tile, output=output)

    def _tiled_product(self, rows: Tensor, weight: Tensor, tile: LinearTile | None, *, output: Tensor | None) -> Tensor:
        """The same, by our own kernel if there is a tile for it."""
        if tile is not None:
            return skinny_linear(rows, weight, tile=tile, output=output)
        if output is None:
            return self.weights.product(rows, weight)
        return torch.mm(rows, weight.t(), out=output)


def rope_frequencies(config: LlamaConfig, *, device: torch.device) -> Tensor:
    """Radians per token of each pair of dims: [head_dim / 2] float32. Source: transformers' modeling_rope_utils."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    return _ROPES[dict(config.rope)["rope_type"]](1.0 / config.rope_theta**exponents, dict(config.rope))


def _llama3(frequencies: Tensor, rope: dict[str, Any]) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    stretched = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    is_between = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(is_between, blended, stretched)


_ROPES: Final[dict[str, Callable[[Tensor, dict[str, Any]], Tensor]]] = {
    "default": lambda frequencies, _: frequencies,
    "linear": lambda frequencies, rope: frequencies / float(rope["factor"]),
    "llama3": _llama3,
}


def _refusal(family: str, why: str) -> ConfigError:
    return ConfigError(
        f"model_backend native does not run this model of family {family!r}: {why}; use model_backend transformers",
        reason="FAMILY_NOT_SUPPORTED",
    )
