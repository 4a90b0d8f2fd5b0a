"""Proof at load that a family works over the paged cache: some ignore the attention they are given, without a word."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from quire.common.errors import ConfigError
from quire.common.messages import Chunk, RowAdd, SamplingState
from quire.worker.batch import Batch
from quire.worker.kv_cache import KvCache
from quire.worker.models.load_model import DTYPES
from quire.worker.models.transformers_model import TransformersModel
from quire.worker.step_inputs import build_step_inputs

# Largest difference of logits from the model's own, relative to the largest logit. Seen at most, with the built-in model and
# tiny random ones of six families (x86 CPU, torch 2.13, 2026-11-22): 6.0e-7 in float32, 1.1e-2 in bfloat16, 1.3e-3 in float16.
MAX_RELATIVE_ERROR: Final = {"float32": 1e-3, "bfloat16": 8e-2, "float16": 2e-2}

# Three sequences, computed as chunks beside each other and then as decodes: (chunk, chunk, ...) per sequence and step.
_STEPS: Final = ((5, 1, 4), (3, 6, 1), (1, 1, 1), (1, 1, 1))
_BLOCK_SIZE: Final = 4

# Rotary embeddings that depend on the longest sequence of a batch: one request would change its neighbours.
_ROPE_BY_LENGTH: Final = ("dynamic", "longrope")
_LAYER_KINDS: Final = ("full_attention", "sliding_attention")


@torch.inference_mode()
def check_model(model: TransformersModel, *, dtype: str, device: str, max_model_len: int) -> None:
    """Run a small ragged batch and compare it with the model's own forward passes.

    Raises:
        ConfigError: the family cannot be served, by its name and the reason.
    """
    _check_config(model, max_model_len)
    sequences = _sequences(model, max_model_len)
    try:
        expected = [model.own_logits(token_ids.to(device)) for token_ids in sequences]
        actual = _ragged_logits(model, sequences, dtype=dtype, device=device)
    except Exception as failure:  # a family that does not fit can fail in any way; the cause stays in the log
        raise _refusal(model, f"it fails in a ragged batch: {failure}") from failure
    num_layers = model.folder.num_layers
    if len(model.layers_seen) != num_layers:
        raise _refusal(model, f"{len(model.layers_seen)} of its {num_layers} layers use the attention they are given")
    _check_windows(model, max_model_len)
    error = _error(actual, expected, is_routed=_is_routed(model) and dtype != "float32")
    if not error <= MAX_RELATIVE_ERROR[dtype]:
        raise _refusal(model, f"its logits in a ragged batch differ from its own by {error:.1e} (at most {MAX_RELATIVE_ERROR[dtype]:.0e})")


def _error(actual: Sequence[Tensor], expected: Sequence[Tensor], *, is_routed: bool) -> float:
    """Largest difference of a token's logits, relative to its sequence's largest; with is_routed the median token's.

    In 16 bits a router that nearly draws may take another expert in another batch, which changes a token for good reason.
    A family whose attention is not ours is wrong in all tokens but each sequence's first.
    """
    errors = [
        (ours - theirs).abs().amax(dim=-1) / theirs.abs().max().clamp(min=1e-30) for ours, theirs in zip(actual, expected, strict=True)
    ]
    of_tokens = torch.cat(errors)
    return float(of_tokens.median() if is_routed and not of_tokens.isnan().any() else of_tokens.max())


def _is_routed(model: TransformersModel) -> bool:
    return any(name.endswith("experts") for name, _ in model.module.named_modules())


def _check_config(model: TransformersModel, max_model_len: int) -> None:
    """What short sequences cannot show, from the config."""
    config = _text_config(model)
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - set(_LAYER_KINDS))
    if odd:
        raise _refusal(model, f"it has layers of kind {', '.join(odd)}; this version runs {' and '.join(_LAYER_KINDS)}")
    rope = getattr(config, "rope_parameters", None) or {}
    for entry in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        original = entry.get("original_max_position_embeddings") or model.folder.max_positions
        if entry.get("rope_type") in _ROPE_BY_LENGTH and max_model_len > original:
            raise _refusal(
                model,
                f"its {entry['rope_type']} positions change for a whole batch when one sequence passes {original} tokens; "
                f"set max_model_len to {original} or less",
            )


def _check_windows(model: TransformersModel, max_model_len: int) -> None:
    """Layers that the config calls sliding must have asked for their window: sequences shorter than it would not show."""
    config = _text_config(model)
    window = getattr(config, "sliding_window", None)
    if window is None or window >= max_model_len or getattr(config, "use_sliding_window", None) is False:
        return
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * model.folder.num_layers
    for layer_index, kind in enumerate(kinds):
        asked = model.layers_seen[layer_index]
        if asked != (window if kind == "sliding_attention" else None):
            raise _refusal(model, f"layer {layer_index} is of kind {kind} with window {window}, and asked for window {asked}")


def _sequences(model: TransformersModel, max_model_len: int) -> list[Tensor]:
    lengths = [min(sum(step[i] for step in _STEPS), max_model_len) for i in range(3)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, model.vocab_size, (length,), generator=generator) for length in lengths]


def _ragged_logits(model: TransformersModel, sequences: Sequence[Tensor], *, dtype: str, device: str) -> list[Tensor]:
    """Logits of every token, computed step by step over a small cache: [num_tokens, vocab_size] per sequence."""
    num_blocks = len(sequences) * max(-(-len(token_ids) // _BLOCK_SIZE) for token_ids in sequences)
    folder = model.folder
    kv_cache = KvCache(
        num_blocks=num_blocks,
        num_layers=folder.num_layers,
        num_kv_heads=model.num_kv_heads,
        block_size=_BLOCK_SIZE,
        head_dim=folder.head_dim,
        dtype=DTYPES[dtype],
        device=device,
    )
    batch = Batch(
        max_rows=len(sequences),
        max_tokens_per_row=max(map(len, sequences)),
        block_size=_BLOCK_SIZE,
        num_blocks=num_blocks,
        vocab_size=model.vocab_size,
        device=device,
    )
    done = [0] * len(sequences)
    parts: list[list[Tensor]] = [[] for _ in sequences]
    for step in _STEPS:
        counts = {row: min(count, len(sequences[row]) - done[row]) for row, count in enumerate(step) if done[row] < len(sequences[row])}
        batch.clear()  # rows enter with just the tokens that this step ends with, so that lone tokens are decodes
        for row, count in counts.items():
            end = done[row] + count
            block_ids = tuple(range(row, num_blocks, len(sequences)))[: -(-end // _BLOCK_SIZE)]
            batch.add([RowAdd(row, tuple(sequences[row][:end].tolist()), end, done[row], block_ids, 0, SamplingState())])
        chunks = [Chunk(row, done[row], count, False) for row, count in counts.items() if count > 1]
        decoding = [row for row, count in counts.items() if count == 1]
        batch.flush()
        inputs = build_step_inputs(batch, chunks, decoding)
        logits = model.forward(inputs, kv_cache, logits_index=torch.arange(len(inputs.token_ids), device=device))
        order = [chunk.row for chunk in chunks] + decoding
        for row, part in zip(order, logits.split([counts[row] for row in order]), strict=True):
            parts[row].append(part)
            done[row] += counts[row]
    return [torch.cat(part) for part in parts]


def _text_config(model: TransformersModel) -> Any:
    return model.module.config.get_text_config()


def _refusal(model: TransformersModel, why: str) -> ConfigError:
    return ConfigError(f"model family {model.family!r} cannot be served: {why}; choose another model", reason="FAMILY_NOT_SUPPORTED")
