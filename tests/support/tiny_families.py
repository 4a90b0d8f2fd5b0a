"""Configs of tiny random models, one or more for each family that is tested."""

from typing import Any, Final

SIZES: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 513,  # odd, so that no number of ranks divides it
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: Final[dict[str, Any]] = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_GEMMA: Final[dict[str, Any]] = {**SIZES, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}

# By a name of ours: (family, its config).
FAMILIES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("llama", SIZES),
    "tied": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**SIZES, "sliding_window": 4}),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 32}),
    "mixtral": ("mixtral", {**SIZES, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**_EXPERTS, "head_dim": 16}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", {**_GEMMA, "num_hidden_layers": 6}),  # five layers of windows to one that sees all
    "phi3": ("phi3", SIZES),
    "gpt2": (
        "gpt2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 513, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "opt": (
        "opt",
        {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 513,
            "max_position_embeddings": 256,
        },
    ),
    "gpt_neox": ("gpt_neox", {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}),
    "olmo2": ("olmo2", SIZES),
    "granite": ("granite", {**SIZES, "attention_multiplier": 0.25, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "gpt_oss": (
        "gpt_oss",
        {
            **SIZES,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
