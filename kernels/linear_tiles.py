"""Tile sizes of the linear layers of few rows: a committed table, so that nothing is tuned while serving."""

from dataclasses import dataclass
from typing import Final

# By columns and inputs, up to how many rows the tile of few_rows_tile() is quicker than torch. The shapes are queries, keys and values,
# attention's output and the MLP's down of one of two ranks of a Llama of 70 billion parameters; its gates stay torch's. Powers of two,
# as kernels are compiled by them: CUDA graphs of sizes up to the same power launch the same kernels (worker/graph_sizes.py).
_MOST_ROWS: Final = {(5120, 8192): 32, (8192, 4096): 32, (8192, 14336): 64}


@dataclass(frozen=True, slots=True)
class LinearTile:
    """How one program computes its columns of a product."""

    num_columns: int
    num_inputs: int  # of one turn of the loop
    num_warps: int
    num_stages: int  # turns whose loads are in flight, the one that computes included
    uses_tensor_cores: bool = True  # else products are multiplied and summed, which serves a single row
    # Weights are the left factor: of 64 columns and more, warpgroup products take them from shared memory as they came.
    has_weights_left: bool = False


def row_tile(*, num_inputs: int, is_gated: bool = False) -> LinearTile | None:
    """The tile for a single row; None where torch's own product is quicker or no tile fits.

    Measured by tools/gpu/linear.py on an NVIDIA H200, Triton 3.6, 2026-11-29; docs/kernel_notes.md has the numbers, and those of an
    H100. For 2 rows and more, products that take the norm in on their way were slower than torch's and a norm.
    """
    if num_inputs % 1024:
        return None
    if is_gated and num_inputs > 1024:
        return LinearTile(num_columns=2, num_inputs=512, num_warps=1, num_stages=2, uses_tensor_cores=False)
    columns = 1 if is_gated else 2
    return LinearTile(num_columns=columns, num_inputs=1024, num_warps=1, num_stages=2, uses_tensor_cores=False)


def few_rows_tile(*, num_rows: int, num_columns: int, num_inputs: int) -> LinearTile | None:
    """The tile for 2 rows and more of a product that takes nothing in on its way; None where torch's own is quicker, or nobody measured.

    Measured by `tools/gpu/linear.py --models "llama-70b half" --tiles 64x128x4x6` on an NVIDIA H200, Triton 3.6, 2026-11-30: microseconds
    of this tile and of cuBLAS, of 2, 8, 16, 32 and 64 rows.

    5120 x 8192   23.6 / 25.6   24.0 / 27.0   23.7 / 27.0   24.6 / 27.6   31.3 / 29.4
    8192 x 4096   19.2 / 19.5   19.2 / 19.5   19.4 / 19.7   19.8 / 20.0   21.2 / 20.8
    8192 x 14336  56.3 / 59.3   56.4 / 59.9   56.8 / 60.6   57.7 / 61.6   60.8 / 64.3
    """
    if not 2 <= num_rows <= _MOST_ROWS.get((num_columns, num_inputs), 0):
        return None
    return LinearTile(num_columns=64, num_inputs=128, num_warps=4, num_stages=6, has_weights_left=True)


def head_tile(*, num_rows: int, num_inputs: int) -> LinearTile | None:
    """The tile for logits of a large vocabulary; None where torch's own product is quicker or no tile fits."""
    if num_inputs % 1024 or num_rows > 64:
        return None
    if num_rows == 1:
        return row_tile(num_inputs=num_inputs)
    if num_rows <= 8:
        return LinearTile(num_columns=32, num_inputs=256, num_warps=4, num_stages=4)
    if num_rows <= 32:
        return LinearTile(num_columns=64, num_inputs=128, num_warps=4, num_stages=4)
    return LinearTile(num_columns=128, num_inputs=64, num_warps=4, num_stages=5)
