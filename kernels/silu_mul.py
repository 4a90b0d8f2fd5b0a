"""The gate of a Llama-like MLP: SiLU of one half of a product times the other half."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.backend import runs_triton

_COLUMNS = 2048  # of one program; eight 16-byte loads of each half for each of 32 threads of bf16


def silu_mul(gate_up: Tensor, *, output: Tensor | None = None) -> Tensor:
    """silu(gate) * up.

    gate_up: [num_tokens, 2 * width], the gate's columns then the other ones, last dim contiguous
    output:  [num_tokens, width]; new if None

    The product is taken in float32.
    """
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1, gate_up.stride()
    output = torch.empty((num_tokens, width), dtype=gate_up.dtype, device=gate_up.device) if output is None else output
    if not runs_triton(gate_up):
        return output.copy_(silu_mul_reference(gate_up))
    _silu_mul_kernel[(triton.cdiv(width, _COLUMNS), num_tokens)](
        output, gate_up, width, output.stride(0), gate_up.stride(0), COLUMNS=_COLUMNS, num_warps=4
    )
    return output


@triton.jit
def _silu_mul_kernel(
    output: tl.tensor,  # [num_tokens, width]
    gate_up: tl.tensor,  # [num_tokens, 2 * width]
    width: int,
    output_stride: int,
    gate_up_stride: int,
    COLUMNS: tl.constexpr,
) -> None:
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < width
    gate = tl.load(gate_up + token * gate_up_stride + column, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * gate_up_stride + width + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(output + token * output_stride + column, (gate * tl.sigmoid(gate) * up).to(output.dtype.element_ty), mask=is_column)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """The same, step by step."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return (F.silu(gate) * up).to(gate_up.dtype)
