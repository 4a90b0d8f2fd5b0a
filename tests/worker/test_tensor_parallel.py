from pathlib import Path

import pytest
import torch
from thread_ranks import ThreadRanks, load_parts
from tiny_families import FAMILIES
from tiny_models import save_tiny_llama, save_tiny_model
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quire.common.errors import ConfigError
from quire.common.model_folder import WHOLE_KV_FAMILIES, ModelFolder, read_model_folder
from quire.worker.collectives import Collective
from quire.worker.models.self_check import MAX_RELATIVE_ERROR, check_model
from quire.worker.models.transformers_model import load_part, load_transformers_model

MAX_MODEL_LEN = 200


def split_logits(folder: ModelFolder, size: int, token_ids: torch.Tensor, dtype: str = "float32") -> list[torch.Tensor]:
    """The logits that each rank has after the check at load."""
    ranks = ThreadRanks(size)
    parts = load_parts(folder, ranks, dtype=dtype)

    def work(collective: Collective) -> torch.Tensor:
        part = parts[collective.rank]
        check_model(part, dtype=dtype, device="cpu", max_model_len=MAX_MODEL_LEN)
        return part.own_logits(token_ids)

    return ranks.run(work)


@torch.inference_mode()
def whole_logits(folder: ModelFolder, token_ids: torch.Tensor, dtype: str = "float32") -> torch.Tensor:
    return load_transformers_model(folder, dtype=dtype, device="cpu").own_logits(token_ids)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_ranks_together_have_the_logits_of_the_whole_model(tmp_path: Path, name: str, size: int) -> None:
    family, config = FAMILIES[name]
    folder = read_model_folder(save_tiny_model(tmp_path, family, **config))
    token_ids = torch.randint(3, folder.vocab_size, (21,), generator=torch.Generator().manual_seed(1))
    expected = whole_logits(folder, token_ids)
    first, *others = split_logits(folder, size, token_ids)
    assert float((first - expected).abs().max() / expected.abs().max()) < 1e-5
    assert all(torch.equal(other, first) for other in others), "ranks would draw different tokens"


def test_a_split_model_in_16_bits_differs_no_more_than_a_ragged_batch_does(tmp_path: Path) -> None:
    folder = read_model_folder(save_tiny_llama(tmp_path))
    token_ids = torch.arange(3, 24)
    expected = whole_logits(folder, token_ids, "bfloat16")
    first, second = split_logits(folder, 2, token_ids, "bfloat16")
    assert float((first - expected).abs().max() / expected.abs().max()) < MAX_RELATIVE_ERROR["bfloat16"]
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "size", "kv_heads"), [("llama", 2, 1), ("llama", 4, 1), ("gpt2", 2, 2), ("gpt2", 4, 1), ("phi3", 2, 2), ("olmo2", 4, 2)]
)
def test_kv_heads_are_shared_out_or_held_by_all_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, size: int, kv_heads: int
) -> None:
    family, config = FAMILIES[name]
    folder = read_model_folder(save_tiny_model(tmp_path, family, **config))
    part = load_part(folder, dtype="float32", device="cpu", rank=size - 1, size=size)
    assert part.num_kv_heads == folder.kv_heads_per_rank(size) == kv_heads
    assert (f"the plan of family '{family}' splits no keys: each rank holds all 2 KV heads" in caplog.text) == (name in ("phi3", "olmo2"))


def test_ranks_hold_their_parts_alone(tmp_path: Path) -> None:
    folder = read_model_folder(save_tiny_llama(tmp_path))
    models = [load_part(folder, dtype="float32", device="cpu", rank=rank, size=size) for rank, size in ((0, 1), (0, 2), (1, 2))]
    norms = 5 * 64  # held by both: two per layer and one at the end
    numbers = [sum(parameter.numel() for parameter in model.module.parameters()) for model in models]
    assert numbers[1] + numbers[2] == numbers[0] + norms
    assert numbers[1] == numbers[2]


def test_a_family_without_a_plan_is_refused_by_name(tmp_path: Path) -> None:
    config = {**FAMILIES["llama"][1], "num_key_value_heads": 4}
    folder = read_model_folder(save_tiny_model(tmp_path, "stablelm", **config))
    with pytest.raises(ConfigError, match="model family 'stablelm' cannot be split over ranks: transformers has no plan") as caught:
        load_part(folder, dtype="float32", device="cpu", rank=0, size=2)
    assert caught.value.reason == "FAMILY_NOT_SPLIT"


def test_a_plan_with_a_style_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    config = {
        **FAMILIES["llama"][1],
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "n_shared_experts": 1,
    }  # fmt: skip
    folder = read_model_folder(save_tiny_model(tmp_path, "deepseek_v2", **config))
    with pytest.raises(ConfigError, match=r"'deepseek_v2' cannot be split over ranks: .* the style 'mla_kv_a_proj'"):
        load_part(folder, dtype="float32", device="cpu", rank=0, size=2)


def test_the_families_that_split_no_keys_are_those_whose_plan_in_transformers_does_not() -> None:
    whole = set()
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(family).get_text_config()
        except Exception:  # a few configs cannot be made without arguments
            continue
        plan = getattr(config, "base_model_tp_plan", None)
        splits = any(name.endswith(("k_proj", "query_key_value")) and style == "colwise" for name, style in (plan or {}).items())
        if plan and not splits:
            whole.add(family)
    assert whole == WHOLE_KV_FAMILIES
