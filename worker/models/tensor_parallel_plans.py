"""Plans of families that transformers has none for: which style splits which of their layers and parameters.

Styles are transformers' own (worker/models/tensor_parallel.py reads them), and three more: `qkv_colwise`, columns of three
matrices that lie behind each other; `pairs_rowwise`, a last dimension in which gate and up alternate; `first_rank`, a
bias that joins a sum once.
"""

from collections.abc import Mapping
from typing import Final

PLANS: Final[Mapping[str, Mapping[str, str]]] = {
    "gpt2": {
        "transformer.h.*.attn.c_attn": "qkv_colwise",
        "transformer.h.*.attn.c_proj": "rowwise",
        "transformer.h.*.mlp.c_fc": "colwise",
        "transformer.h.*.mlp.c_proj": "rowwise",
    },
    "opt": {
        "model.decoder.layers.*.self_attn.q_proj": "colwise",
        "model.decoder.layers.*.self_attn.k_proj": "colwise",
        "model.decoder.layers.*.self_attn.v_proj": "colwise",
        "model.decoder.layers.*.self_attn.out_proj": "rowwise",
        "model.decoder.layers.*.fc1": "colwise",
        "model.decoder.layers.*.fc2": "rowwise",
    },
    "gpt_oss": {
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.k_proj": "colwise",
        "model.layers.*.self_attn.v_proj": "colwise",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.self_attn.sinks": "colwise",
        "model.layers.*.mlp.experts.gate_up_proj": "pairs_rowwise",
        "model.layers.*.mlp.experts.gate_up_proj_bias": "pairs_rowwise",
        "model.layers.*.mlp.experts.down_proj": "colwise",
        "model.layers.*.mlp.experts.down_proj_bias": "first_rank",
        "model.layers.*.mlp.experts": "moe_tp_experts",
    },
}

# Sizes that a family's attention keeps beside its weights, and shapes its tensors by.
DIVIDED_ATTRIBUTES: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "gpt2": {"transformer.h.*.attn": ("num_heads", "split_size")},
    "opt": {"model.decoder.layers.*.self_attn": ("num_heads",)},
}
