"""Products with weights on CPU as oneDNN computes them, the weights laid out once as its kernels read them."""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

# The first difference from torch's own result, relative to its largest number, at which a weight is left as it was.
_MAX_RELATIVE_ERROR: Final = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_CHECKED_ROWS: Final = 3


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes linear layers of this dtype on this machine: bfloat16 wants AVX-512 or AVX-NE-CONVERT of it."""
    if not has_onednn():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype in _MAX_RELATIVE_ERROR


def has_onednn() -> bool:
    """Whether this torch has oneDNN's operators: they are what torch.compile calls, and not part of its documented interface."""
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def packed(weight: Tensor) -> Tensor:
    """A weight [num_outputs, num_inputs] in oneDNN's own layout, for packed_product() alone; a dtype for which can_pack()."""
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return result


def packed_product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight.T + bias, as torch's linear() computes it. rows: [..., num_inputs]; weight: from packed(), or a plain one.

    torch sends float32 to MKL, which leaves half of an AMD core unused, and lays 16-bit weights out anew for oneDNN in each
    call. GFLOP/s at 1, 32 and 512 rows of a 512 x 1536 layer: float32 9, 82, 116 with linear() and 20, 200, 272 with this;
    bfloat16 15, 261, 485 and 31, 365, 522 (one core of an AMD EPYC with AVX-512, torch 2.13, 2026-11-25).
    """
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result


def is_as_torch_computes(weight: Tensor, packed_weight: Tensor) -> bool:
    """Whether a few random rows come out as from torch's own product, so that a processor for which oneDNN is wrong is found."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_CHECKED_ROWS, weight.shape[1], generator=generator).to(weight.dtype)
    expected, actual = F.linear(rows, weight).float(), packed_product(rows, packed_weight).float()
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return bool(error <= _MAX_RELATIVE_ERROR[weight.dtype])
