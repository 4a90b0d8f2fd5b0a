"""Configs of tiny random models that the native modules run: each family, and what its config may ask for."""

from typing import Any, Final

from tiny_families import SIZES

_ROPE: Final[dict[str, Any]] = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
# By a name of ours: (family, its config).
NATIVE_MODELS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("llama", SIZES),
    "tied": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "llama3": ("llama", {**SIZES, "rope_parameters": _ROPE}),
    "linear": ("llama", {**SIZES, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}),
    "mistral": ("mistral", {**SIZES, "sliding_window": 4}),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 32}),
}
