from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES
from tiny_models import save_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from quire.worker.models import packed_linear, packed_weight
from quire.worker.models.packed_linear import PackedLinear, pack_linears
from quire.worker.models.packed_weight import can_pack, has_onednn

pytestmark = pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@torch.inference_mode()
def test_a_packed_layer_computes_what_the_layer_computes(kind: str, has_bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=has_bias) if kind == "linear" else Conv1D(40, 24)
    model = nn.Sequential(layer.to(dtype))
    inputs = [torch.randn(*shape).to(dtype) for shape in ((1, 1, 24), (1, 33, 24), (7, 24))]
    expected = [model(x) for x in inputs]
    is_packed = can_pack(dtype)
    assert pack_linears(model) == is_packed
    packed: Any = model[0]
    assert isinstance(packed, PackedLinear) == is_packed
    for x, result in zip(inputs, expected, strict=True):
        torch.testing.assert_close(packed(x), result, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
    assert torch.equal(packed.weight if is_packed else weight, weight)


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
@torch.inference_mode()
def test_a_packed_model_holds_its_weights_once(tmp_path: Path, name: str) -> None:
    family, config = FAMILIES[name]
    save_tiny_model(tmp_path, family, **config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    token_ids = torch.arange(3, 20)[None]
    expected = model(token_ids).logits
    num_layers = sum(type(module) in (nn.Linear, Conv1D) for module in model.modules())
    assert pack_linears(model) == num_layers
    assert not any(type(module) in (nn.Linear, Conv1D) for module in model.modules())
    torch.testing.assert_close(model(token_ids).logits, expected, atol=1e-4, rtol=1e-4)
    is_tied = name != "llama"
    assert (model.lm_head._weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()) if is_tied else True
    assert model.lm_head._weight.is_mkldnn != is_tied


def test_a_layer_that_comes_out_differently_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    monkeypatch.setattr(packed_weight, "packed_product", lambda rows, weight: rows)
    assert pack_linears(model) == 0
    assert type(model[0]) is nn.Linear
    assert "layer 0 is not packed" in caplog.text


def test_layers_of_other_kinds_and_dtypes_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(8, 8), nn.Linear(8, 8).half())
    assert pack_linears(model) == 0


def test_a_dtype_that_this_processor_cannot_pack_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bfloat16 without AVX-512, where oneDNN's operator raises."""
    monkeypatch.setattr(packed_linear, "can_pack", lambda dtype: dtype != torch.bfloat16)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16())
    assert pack_linears(model) == 1
    assert type(model[1]) is nn.Linear
