"""How many parameters a model has, by the sizes in its config.json: for families that are built like Llama."""

from collections.abc import Mapping
from typing import Any, Final

# Families of gated feed-forward layers, RMS norms and rotary positions: what each adds to the shape of Llama.
_QKV_BIAS: Final = frozenset({"qwen2"})
_HEAD_NORMS: Final = frozenset({"qwen3"})
LLAMA_LIKE: Final = frozenset({"llama", "mistral"}) | _QKV_BIAS | _HEAD_NORMS


def count_parameters(config: Mapping[str, Any]) -> int | None:
    """Parameters of the whole model, tied ones counted once; None for a family that this does not know, or a config without its sizes."""
    family = config.get("model_type")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if family not in LLAMA_LIKE or not all(isinstance(config.get(name), int) for name in names):
        return None
    hidden, wide, num_layers, num_heads, vocab_size = (int(config[name]) for name in names)
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    head_dim = int(config.get("head_dim") or hidden // num_heads)
    heads, kv_heads = num_heads * head_dim, num_kv_heads * head_dim
    layer = 2 * hidden * heads + 2 * hidden * kv_heads + 3 * hidden * wide + 2 * hidden
    if family in _QKV_BIAS or config.get("attention_bias"):
        layer += heads + 2 * kv_heads
    if config.get("attention_bias") and family not in _QKV_BIAS:
        layer += hidden  # the projection behind attention
    if config.get("mlp_bias"):
        layer += 2 * wide + hidden
    if family in _HEAD_NORMS:
        layer += 2 * head_dim
    num_tables = 1 if config.get("tie_word_embeddings") else 2
    return num_layers * layer + num_tables * vocab_size * hidden + hidden
