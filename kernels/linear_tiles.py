"""Tile sizes of the linear layers of few rows: a committed table, so that nothing is tuned while serving."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearTile:
    """How one program computes its columns of a product."""

    num_columns: int
    num_inputs: int  # of one turn of the loop
    num_warps: int
    num_stages: int  # turns whose loads are in flight, the one that computes included
    uses_tensor_cores: bool = True  # else products are multiplied and summed, which serves a single row


def row_tile(*, num_inputs: int, has_norm: bool) -> LinearTile | None:
    """The tile for a single row; None where torch's own product is quicker or no tile fits.

    Measured by tools/gpu/linear.py on an NVIDIA H100 80GB HBM3, Triton 3.6, 2026-11-25: a layer of Llama 3 8B's shape takes 161
    us instead of 174 with what lies between its products, one of Qwen3 0.6B's 20.8 instead of 31.9. docs/kernel_notes.md has
    the numbers. For 2 rows and more, products that take the norm in on their way were slower than torch's and a norm.
    """
    if num_inputs % 1024:
        return None
    if has_norm:
        return LinearTile(num_columns=1, num_inputs=1024, num_warps=1, num_stages=2, uses_tensor_cores=False)
    return LinearTile(num_columns=4, num_inputs=512 if num_inputs >= 4096 else 1024, num_warps=4, num_stages=2, uses_tensor_cores=False)


def head_tile(*, num_rows: int, num_inputs: int) -> LinearTile | None:
    """The tile for logits of a large vocabulary; None where torch's own product is quicker or no tile fits."""
    if num_inputs % 1024 or num_rows > 64:
        return None
    if num_rows == 1:
        return LinearTile(num_columns=1, num_inputs=1024, num_warps=1, num_stages=2, uses_tensor_cores=False)
    if num_rows <= 8:
        return LinearTile(num_columns=32, num_inputs=256, num_warps=4, num_stages=4)
    if num_rows <= 32:
        return LinearTile(num_columns=64, num_inputs=128, num_warps=4, num_stages=4)
    return LinearTile(num_columns=128, num_inputs=64, num_warps=4, num_stages=5)
