"""Weights of the native Llama family: made, filled from safetensors by several threads, or drawn at random."""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from quire.common.errors import ConfigError
from quire.common.model_folder import ModelFolder
from quire.worker.models.llama import LlamaLayer, LlamaShare, LlamaWeights
from quire.worker.models.packed_weight import can_pack, is_as_torch_computes, packed, packed_product

_log = logging.getLogger(__name__)

# Threads that read, and the pinned memory through which each sends what it has read: one thread copies at about 5 GB/s.
_NUM_READERS: Final = 8
_STAGING_BYTES: Final = 2**26
_DUMMY_DEVIATION: Final = 0.02


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a tensor of the files goes, and which of its rows or columns."""

    name: str
    target: Tensor
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None


def empty_weights(share: LlamaShare, *, dtype: torch.dtype, device: str) -> LlamaWeights:
    """One rank's weights, not filled in."""
    config = share.config

    def make(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device)

    query_width, kv_width = share.num_heads * config.head_dim, share.num_kv_heads * config.head_dim
    first, end = share.bounds(config.intermediate_size)
    vocab_first, vocab_end = share.vocab_bounds
    layers = [
        LlamaLayer(
            input_norm=make(config.hidden_size),
            qkv=make(query_width + 2 * kv_width, config.hidden_size),
            qkv_bias=make(query_width + 2 * kv_width) if config.has_qkv_bias else None,
            query_norm=make(config.head_dim) if config.has_qk_norm else None,
            key_norm=make(config.head_dim) if config.has_qk_norm else None,
            output=make(config.hidden_size, query_width),
            mlp_norm=make(config.hidden_size),
            gate_up=make(2 * (end - first), config.hidden_size),
            down=make(config.hidden_size, end - first),
        )
        for _ in range(config.num_layers)
    ]
    embedding = make(vocab_end - vocab_first, config.hidden_size)
    head = embedding if config.is_tied else make(vocab_end - vocab_first, config.hidden_size)
    return LlamaWeights(embedding=embedding, layers=layers, final_norm=make(config.hidden_size), head=head)


def fill_at_random(weights: LlamaWeights, share: LlamaShare, *, seed: int = 0) -> None:
    """What a fresh model of this shape has: normal matrices, norms of 1. Ranks draw parts of different models."""
    device = weights.embedding.device
    generator = torch.Generator(device).manual_seed(seed + share.rank)
    for part in _parts(weights, share):
        if part.target.dim() == 1:
            part.target.fill_(0.0 if part.name.endswith("bias") else 1.0)
        else:
            part.target.normal_(0.0, _DUMMY_DEVIATION, generator=generator)


def fill_from_files(weights: LlamaWeights, share: LlamaShare, folder: ModelFolder) -> int:
    """Read this rank's part of every tensor, and nothing else of them; bytes taken from the files.

    Raises:
        ConfigError: the files do not hold exactly the family's weights, by the first name that is wrong.
    """
    started_s = time.perf_counter()
    files = {name: path for path in folder.weight_files for name in _names(folder.path / path)}
    parts = list(_parts(weights, share))
    wanted = {part.name for part in parts}
    prefix = "" if "model.norm.weight" in files or "norm.weight" not in files else "model."  # some save the decoder alone
    missing = sorted(name for name in wanted if name.removeprefix(prefix) not in files)
    if missing:
        raise ConfigError(
            f"the model's files lack {len(missing)} weights of the {folder.model_type!r} family, {missing[0]} first; get the folder again",
            reason="WEIGHTS_INCOMPLETE",
        )
    by_file: dict[str, list[_Part]] = {}
    for part in parts:
        by_file.setdefault(files[part.name.removeprefix(prefix)], []).append(part)
    # Files are taken apart so that all readers have work, whatever the files' sizes.
    jobs = [(path, of_file[first::_NUM_READERS]) for path, of_file in by_file.items() for first in range(_NUM_READERS)]
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        num_bytes = sum(readers.map(lambda job: _read_parts(folder, *job, prefix=prefix), jobs))
    took_s = time.perf_counter() - started_s
    _log.info("read %.2f GiB of weights in %.2f s, %.1f GB/s", num_bytes / 2**30, took_s, num_bytes / took_s / 1e9)
    return num_bytes


@torch.inference_mode()
def pack_weights(weights: LlamaWeights) -> None:
    """On a CPU, lay the weights out as oneDNN reads them, each in the place of the former one; for eager steps alone.

    A head that is the embedding as well stays as it is.
    """
    if weights.embedding.device.type != "cpu" or not can_pack(weights.embedding.dtype):
        return
    head = weights.head if weights.head is weights.embedding else packed(weights.head)
    first = weights.layers[0]  # the others have its shapes
    layouts = [(weight, packed(weight)) for weight in (first.qkv, first.output, first.gate_up, first.down)]
    for weight, packed_weight in (*layouts, (weights.head, head)):
        if not is_as_torch_computes(weight, packed_weight):
            _log.warning("weights are not packed: oneDNN computes a product with %s differently", list(weight.shape))
            return
    for layer in weights.layers:
        layer.qkv, layer.output = packed(layer.qkv), packed(layer.output)
        layer.gate_up, layer.down = packed(layer.gate_up), packed(layer.down)
    weights.head = head
    weights.product = packed_product


def _parts(weights: LlamaWeights, share: LlamaShare) -> Iterator[_Part]:
    config = share.config
    dim = config.head_dim
    query_width, kv_width = share.num_heads * dim, share.num_kv_heads * dim
    query_rows = share.rank * query_width, (share.rank + 1) * query_width
    kv_rows = share.first_kv_head * dim, share.first_kv_head * dim + kv_width
    mlp_rows = share.bounds(config.intermediate_size)
    vocab_rows = share.vocab_bounds
    mlp_width = mlp_rows[1] - mlp_rows[0]
    yield _Part("model.embed_tokens.weight", weights.embedding, rows=vocab_rows)
    for index, layer in enumerate(weights.layers):
        at = f"model.layers.{index}"
        for name, first, width, rows in (
            ("q_proj", 0, query_width, query_rows),
            ("k_proj", query_width, kv_width, kv_rows),
            ("v_proj", query_width + kv_width, kv_width, kv_rows),
        ):
            yield _Part(f"{at}.self_attn.{name}.weight", layer.qkv[first : first + width], rows=rows)
            if layer.qkv_bias is not None:
                yield _Part(f"{at}.self_attn.{name}.bias", layer.qkv_bias[first : first + width], rows=rows)
        if layer.query_norm is not None and layer.key_norm is not None:
            yield _Part(f"{at}.self_attn.q_norm.weight", layer.query_norm)
            yield _Part(f"{at}.self_attn.k_norm.weight", layer.key_norm)
        yield _Part(f"{at}.self_attn.o_proj.weight", layer.output, columns=query_rows)
        yield _Part(f"{at}.mlp.gate_proj.weight", layer.gate_up[:mlp_width], rows=mlp_rows)
        yield _Part(f"{at}.mlp.up_proj.weight", layer.gate_up[mlp_width:], rows=mlp_rows)
        yield _Part(f"{at}.mlp.down_proj.weight", layer.down, columns=mlp_rows)
        yield _Part(f"{at}.input_layernorm.weight", layer.input_norm)
        yield _Part(f"{at}.post_attention_layernorm.weight", layer.mlp_norm)
    yield _Part("model.norm.weight", weights.final_norm)
    if weights.head is not weights.embedding:
        yield _Part("lm_head.weight", weights.head, rows=vocab_rows)


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except Exception as error:  # safetensors' own error, or the system's
        raise ConfigError(f"{path} cannot be read: {error}; get the folder again", reason="WEIGHTS_INCOMPLETE") from error


def _read_parts(folder: ModelFolder, path: str, parts: list[_Part], *, prefix: str) -> int:
    """Read some of a file's tensors; bytes read."""
    num_bytes = 0
    with torch.inference_mode(), safe_open(folder.path / path, framework="pt") as file:
        staging = _Staging() if parts and parts[0].target.is_cuda else None
        for part in parts:
            whole = file.get_slice(part.name.removeprefix(prefix))
            source: Tensor = whole[...] if part.target.dim() == 1 and part.rows is None else _cut(whole, part)
            if source.shape != part.target.shape:
                raise ConfigError(
                    f"{part.name} has the shape {list(source.shape)} where config.json asks for {list(part.target.shape)}; get the "
                    "folder again",
                    reason="WEIGHTS_INCOMPLETE",
                )
            if staging is None:
                part.target.copy_(source)
            else:
                staging.send(source, part.target)
            num_bytes += source.nbytes
        if staging is not None:
            staging.wait()
    return num_bytes


def _cut(whole: Any, part: _Part) -> Tensor:
    cut: Tensor
    if part.columns is not None:
        cut = whole[:, part.columns[0] : part.columns[1]]
    elif part.rows is not None:
        cut = whole[part.rows[0] : part.rows[1]]
    else:
        cut = whole[...]
    return cut


class _Staging:
    """Two pieces of pinned memory through which one thread sends tensors: one travels while the other is filled."""

    def __init__(self) -> None:
        self._buffers = [torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._stream = torch.cuda.Stream()
        self._sent = [torch.cuda.Event(), torch.cuda.Event()]
        self._next = 0

    def send(self, source: Tensor, target: Tensor) -> None:
        row_bytes = target[0].nbytes
        rows_at_once = max(1, _STAGING_BYTES // row_bytes)
        for first in range(0, len(target), rows_at_once):
            piece = target[first : first + rows_at_once]
            self._sent[self._next].synchronize()
            buffer = self._buffers[self._next][: piece.nbytes].view(piece.dtype).view(piece.shape)
            buffer.copy_(source[first : first + rows_at_once])
            with torch.cuda.stream(self._stream):
                piece.copy_(buffer, non_blocking=True)
                self._sent[self._next].record(self._stream)
            self._next = 1 - self._next

    def wait(self) -> None:
        self._stream.synchronize()
