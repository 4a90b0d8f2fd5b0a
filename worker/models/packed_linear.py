"""transformers' linear layers with packed weights."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quire.worker.models.packed_weight import can_pack, is_as_torch_computes, packed, packed_product

_log = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """x @ weight.T + bias, as nn.Linear computes it, by packed_product()."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, is_shared: bool) -> None:
        """weight: [out_features, in_features]; is_shared: others hold it too, so a second layout of it would be a second copy"""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._weight = weight if is_shared else packed(weight)

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], a copy unless it is shared: for the few models that look at their layers' weights."""
        return self._weight.to_dense() if self._weight.is_mkldnn else self._weight

    def forward(self, x: Tensor) -> Tensor:
        return packed_product(x, self._weight, self.bias)


@torch.inference_mode()
def pack_linears(module: Any) -> int:
    """Replace a model's linear layers on CPU; how many. The others give what they gave.

    Which ones depends on the model and the machine alone, so that ranks that compute the same thing compute it alike.
    """
    num_packed = 0
    shared = _shared_weights(module)
    for name, layer in list(module.named_modules()):
        if type(layer) not in (nn.Linear, Conv1D) or layer.weight.device.type != "cpu" or not can_pack(layer.weight.dtype):
            continue
        weight = layer.weight.detach()
        bias = None if layer.bias is None else layer.bias.detach()
        is_shared = weight.data_ptr() in shared
        weight = weight if isinstance(layer, nn.Linear) else weight.t().contiguous()
        replacement = PackedLinear(weight, bias, is_shared=is_shared)
        if is_as_torch_computes(weight, replacement._weight):
            module.set_submodule(name, replacement)
            num_packed += 1
        else:
            _log.warning("layer %s is not packed: oneDNN computes it differently", name)
    return num_packed


def _shared_weights(module: Any) -> set[int]:
    """Addresses of weights that more than one module holds, tied embeddings above all."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in module.named_parameters(remove_duplicate=False):
        (shared if parameter.data_ptr() in seen else seen).add(parameter.data_ptr())
    return shared
