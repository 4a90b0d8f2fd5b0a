"""RMS norm, with the addition to the residual stream that comes before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels.backend import runs_triton


def rms_norm(hidden: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None, output: Tensor | None = None) -> Tensor:
    """Norm of each row of `hidden`, or of `residual` after `hidden` was added to it, in place.

    hidden, residual: [num_tokens, width], last dim contiguous
    weight:           [width]
    output:           [num_tokens, width], may be `hidden` itself; new if None

    The sum that is stored is rounded to the stream's dtype; the norm is taken of the rounded sum, so that it depends on what
    the next layer reads. Sums are float32.
    """
    assert hidden.stride(1) == 1, hidden.stride()
    assert residual is None or residual.stride(1) == 1
    output = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if output is None else output
    if not runs_triton(hidden):
        return output.copy_(rms_norm_reference(hidden, weight, eps=eps, residual=residual))
    num_tokens, width = hidden.shape
    padded_width = triton.next_power_of_2(width)
    _rms_norm_kernel[(num_tokens,)](
        output,
        residual,
        hidden,
        weight,
        eps,
        output.stride(0),
        0 if residual is None else residual.stride(0),
        hidden.stride(0),
        WIDTH=width,
        PADDED_WIDTH=padded_width,
        num_warps=max(1, min(16, padded_width // 512)),  # 16 numbers a thread: two 16-byte loads
    )
    return output


@triton.jit
def _rms_norm_kernel(
    output: tl.tensor,  # [num_tokens, WIDTH]
    residual: tl.tensor,  # None, or [num_tokens, WIDTH]
    hidden: tl.tensor,  # [num_tokens, WIDTH]
    weight: tl.tensor,  # [WIDTH]
    eps: float,
    output_stride: int,
    residual_stride: int,
    hidden_stride: int,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED_WIDTH)
    is_column = column < WIDTH
    numbers = tl.load(hidden + token * hidden_stride + column, mask=is_column, other=0.0).to(tl.float32)
    factors = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    if residual is not None:
        place = residual + token * residual_stride + column
        sums = (numbers + tl.load(place, mask=is_column, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(place, sums, mask=is_column)
        numbers = sums.to(tl.float32)
    scale = tl.rsqrt(tl.sum(numbers * numbers, 0) / WIDTH + eps)
    tl.store(output + token * output_stride + column, (numbers * scale * factors).to(output.dtype.element_ty), mask=is_column)


def rms_norm_reference(hidden: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None) -> Tensor:
    """The same, step by step."""
    if residual is not None:
        residual.copy_(hidden.float() + residual.float())
    numbers = (hidden if residual is None else residual).float()
    return (numbers * torch.rsqrt(numbers.square().mean(-1, keepdim=True) + eps) * weight.float()).to(hidden.dtype)
