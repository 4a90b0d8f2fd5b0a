"""Linear layers of few rows, at the speed at which their weights can be read, with what else a layer does to the same numbers."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quire.kernels.backend import runs_triton
from quire.kernels.linear_tiles import LinearTile
from quire.kernels.rms_norm import rms_norm_reference
from quire.kernels.silu_mul import silu_mul_reference

# Bytes of its weights that a program asks for while the kernel before it still runs.
_PREFETCHED_BYTES = 16384


def skinny_linear(
    inputs: Tensor,
    weight: Tensor,
    *,
    tile: LinearTile,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    is_gated: bool = False,
    output: Tensor | None = None,
    overlaps: bool = False,
) -> Tensor:
    """inputs @ weight.T, for up to 128 rows.

    inputs:   [num_rows, num_inputs], last dim contiguous; num_inputs is a multiple of the tile's
    weight:   [num_columns, num_inputs], contiguous; of the inputs' dtype
    norm:     [num_inputs]; weights of an RMS norm of the inputs that comes first
    residual: [num_rows, num_columns], last dim contiguous: the product is added to it, in place, and it is the result
    is_gated: the first half of the columns are gates: the result is silu(gate) * other, [num_rows, num_columns / 2]
    output:   for the result, if there is no residual; new if None
    overlaps: whether the program may start while the kernel before it ends. It reads nothing but weights before that has ended,
              and lets the kernel after it start likewise, which must also be one that waits.

    Sums are float32. The norm's factor is applied to the sums, not to the inputs: a row is read once. Until then its numbers are as
    large as the residual stream's, times the norm's weights, and rounded to the inputs' dtype: but for float16, which would
    overflow at 65504. Those stay float32, and so are not for tensor cores.
    """
    num_rows, num_inputs = inputs.shape
    num_columns = weight.shape[0] // 2 if is_gated else weight.shape[0]
    assert inputs.stride(1) == 1, inputs.stride()
    assert weight.stride() == (num_inputs, 1), weight.stride()
    assert weight.dtype == inputs.dtype, (weight.dtype, inputs.dtype)
    assert num_inputs % tile.num_inputs == 0, (weight.shape, tile)
    assert tile.uses_tensor_cores or not tile.has_weights_left, tile
    assert norm is None or inputs.dtype != torch.float16 or not tile.uses_tensor_cores, tile
    assert residual is None or (not is_gated and residual.stride(1) == 1)
    if residual is not None:
        output = residual
    elif output is None:
        output = torch.empty((num_rows, num_columns), dtype=inputs.dtype, device=inputs.device)
    if not runs_triton(inputs):
        return output.copy_(skinny_linear_reference(inputs, weight, norm=norm, eps=eps, residual=residual, is_gated=is_gated))
    _skinny_linear_kernel[(triton.cdiv(num_columns, tile.num_columns),)](
        output,
        inputs,
        weight,
        norm,
        eps,
        num_rows,
        num_columns,
        output.stride(0),
        inputs.stride(0),
        NUM_INPUTS=num_inputs,
        ROWS=max(16, triton.next_power_of_2(num_rows)) if tile.uses_tensor_cores else triton.next_power_of_2(num_rows),
        COLUMNS=tile.num_columns,
        TILE=tile.num_inputs,
        HAS_RESIDUAL=residual is not None,
        IS_GATED=is_gated,
        USES_DOT=tile.uses_tensor_cores,
        WEIGHTS_LEFT=tile.has_weights_left,
        OVERLAPS=overlaps,
        PREFETCHED=max(1, _PREFETCHED_BYTES // tile.num_columns // 128),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=overlaps,
    )
    return output


@triton.jit(do_not_specialize=["num_rows"])
def _skinny_linear_kernel(
    output: tl.tensor,  # [num_rows, num_columns]
    inputs: tl.tensor,  # [num_rows, NUM_INPUTS]
    weight: tl.tensor,  # [num_columns, NUM_INPUTS], twice as many columns with IS_GATED
    norm: tl.tensor,  # None, or [NUM_INPUTS]
    eps: float,
    num_rows: int,
    num_columns: int,
    output_stride: int,
    inputs_stride: int,
    NUM_INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_GATED: tl.constexpr,
    USES_DOT: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
    OVERLAPS: tl.constexpr,
    PREFETCHED: tl.constexpr,
) -> None:
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_columns
    place = tl.arange(0, TILE)
    weights = weight + column.to(tl.int64)[:, None] * NUM_INPUTS + place[None, :]
    others = weight + (column.to(tl.int64) + num_columns)[:, None] * NUM_INPUTS + place[None, :]
    if OVERLAPS:
        line = tl.arange(0, PREFETCHED) * (128 * 8 // weight.dtype.element_ty.primitive_bitwidth)
        _prefetch(weight + column.to(tl.int64)[:, None] * NUM_INPUTS + line[None, :])
        if IS_GATED:
            _prefetch(weight + (column.to(tl.int64) + num_columns)[:, None] * NUM_INPUTS + line[None, :])
        gdc_launch_dependents()
        gdc_wait()
    row = tl.arange(0, ROWS)
    is_row = row < num_rows
    source = inputs + row.to(tl.int64)[:, None] * inputs_stride + place[None, :]
    squares = tl.zeros([ROWS], tl.float32)
    if WEIGHTS_LEFT:
        sums = tl.zeros([COLUMNS, ROWS], tl.float32)
        other_sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    elif USES_DOT:
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        other_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    else:
        parts = tl.zeros([ROWS, COLUMNS, TILE], tl.float32)
        other_parts = tl.zeros([ROWS, COLUMNS, TILE], tl.float32)
    for first in range(0, NUM_INPUTS, TILE):
        numbers = tl.load(source + first, mask=is_row[:, None], other=0.0)
        if norm is not None:
            exact = numbers.to(tl.float32)
            squares += tl.sum(exact * exact, 1)
            exact *= tl.load(norm + first + place).to(tl.float32)[None, :]
            # Were bfloat16 kept in float32 too, a gated row of 4096 would take 166 registers instead of 128 (Triton 3.6): a
            # quarter fewer programs on a multiprocessor, and as many loads fewer in flight.
            numbers = exact if numbers.dtype == tl.float16 else exact.to(numbers.dtype)
        tile = tl.load(weights + first, mask=is_column[:, None], other=0.0)
        if WEIGHTS_LEFT:
            sums = tl.dot(tile, tl.trans(numbers), sums, input_precision="ieee")
            if IS_GATED:
                other_tile = tl.load(others + first, mask=is_column[:, None], other=0.0)
                other_sums = tl.dot(other_tile, tl.trans(numbers), other_sums, input_precision="ieee")
        elif USES_DOT:
            sums = tl.dot(numbers, tl.trans(tile), sums, input_precision="ieee")
            if IS_GATED:
                other_tile = tl.load(others + first, mask=is_column[:, None], other=0.0)
                other_sums = tl.dot(numbers, tl.trans(other_tile), other_sums, input_precision="ieee")
        else:
            parts += numbers.to(tl.float32)[:, None, :] * tile.to(tl.float32)[None, :, :]
            if IS_GATED:
                other_tile = tl.load(others + first, mask=is_column[:, None], other=0.0)
                other_parts += numbers.to(tl.float32)[:, None, :] * other_tile.to(tl.float32)[None, :, :]
    if WEIGHTS_LEFT:
        sums = tl.trans(sums)
        if IS_GATED:
            other_sums = tl.trans(other_sums)
    elif not USES_DOT:
        sums = tl.sum(parts, 2)
        if IS_GATED:
            other_sums = tl.sum(other_parts, 2)
    dtype = output.dtype.element_ty
    if norm is not None:
        factor = tl.rsqrt(squares / NUM_INPUTS + eps)[:, None]
        sums *= factor
        if IS_GATED:
            other_sums *= factor
    if IS_GATED:
        gate = sums.to(dtype).to(tl.float32)
        sums = gate * tl.sigmoid(gate) * other_sums.to(dtype).to(tl.float32)
    is_result = is_row[:, None] & is_column[None, :]
    target = output + row.to(tl.int64)[:, None] * output_stride + column[None, :]
    if HAS_RESIDUAL:
        sums += tl.load(target, mask=is_result, other=0.0).to(tl.float32)
    tl.store(target, sums.to(dtype), mask=is_result)


@triton.jit
def _prefetch(pointers: tl.tensor) -> None:
    """Ask for what lies there, without waiting: the second-level cache will have it."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1)


def skinny_linear_reference(
    inputs: Tensor, weight: Tensor, *, norm: Tensor | None, eps: float, residual: Tensor | None, is_gated: bool
) -> Tensor:
    """The same, launch by launch."""
    if norm is not None:
        inputs = rms_norm_reference(inputs, norm, eps=eps)
    product = F.linear(inputs, weight)
    if is_gated:
        product = silu_mul_reference(product)
    return product if residual is None else (product.float() + residual.float()).to(residual.dtype)
