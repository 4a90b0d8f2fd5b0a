from typing import Any

import pytest
import torch
from paged_cases import kernel_device
from torch import Tensor

from quire.kernels.linear_tiles import LinearTile, few_rows_tile
from quire.kernels.skinny_linear import skinny_linear, skinny_linear_reference

TILES = {
    "tensor cores": LinearTile(num_columns=16, num_inputs=32, num_warps=2, num_stages=3),
    "weights left": LinearTile(num_columns=16, num_inputs=32, num_warps=2, num_stages=3, has_weights_left=True),
    "multiplied": LinearTile(num_columns=4, num_inputs=64, num_warps=2, num_stages=2, uses_tensor_cores=False),
}


def products(
    num_rows: int, num_columns: int, num_inputs: int, tile: LinearTile, dtype: torch.dtype, *, kind: str, **options: Any
) -> tuple[Tensor, Tensor]:
    """The kernel's result, and the reference's in float32."""
    generator = torch.Generator().manual_seed(0)

    is_gated = kind in ("gated", "gate")  # gated: with a norm before it

    def numbers(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(kernel_device(), dtype)

    # Inputs as a model has them: a part of a wider tensor.
    inputs = numbers(num_rows, num_inputs + 16)[:, :num_inputs]
    weight = numbers(num_columns * (2 if is_gated else 1), num_inputs) * num_inputs**-0.5
    norm = 1 + 0.1 * numbers(num_inputs) if kind in ("norm", "gated") else None
    residual = numbers(num_rows, num_columns) if kind == "residual" else None
    exact = {name: None if tensor is None else tensor.float() for name, tensor in (("norm", norm), ("residual", residual))}
    expected = skinny_linear_reference(inputs.float(), weight.float(), eps=1e-5, is_gated=is_gated, **exact)
    output = torch.full((num_rows, num_columns), float("nan"), dtype=dtype, device=kernel_device())
    actual = skinny_linear(inputs, weight, tile=tile, norm=norm, eps=1e-5, residual=residual, is_gated=is_gated, output=output, **options)
    assert actual is (output if residual is None else residual)
    return actual.float(), expected


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["plain", "norm", "residual", "gated", "gate"])
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("num_rows", [1, 2, 5, 17])
def test_every_kind_of_product_is_right(num_rows: int, tile: LinearTile, kind: str) -> None:
    if num_rows > 2 and not tile.uses_tensor_cores:
        num_rows = 1
    actual, expected = products(num_rows, 37, 128, tile, torch.float32, kind=kind)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("tile", "kind"),
    [("multiplied", "plain"), ("multiplied", "norm"), ("multiplied", "residual"), ("multiplied", "gated"),
     ("tensor cores", "plain"), ("tensor cores", "residual")],
)  # fmt: skip
def test_half_precision_is_summed_in_float32(tile: str, kind: str) -> None:
    actual, expected = products(1, 37, 256, TILES[tile], torch.float16, kind=kind)
    torch.testing.assert_close(actual, expected, atol=4e-3, rtol=4e-3)


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["norm", "gated"])
def test_tensor_cores_are_not_given_float16_numbers_without_their_factor(kind: str) -> None:
    with pytest.raises(AssertionError, match="uses_tensor_cores=True"):
        products(1, 37, 256, TILES["tensor cores"], torch.float16, kind=kind)


@pytest.mark.kernel
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(("size", "norm_size"), [(1e4, 8.0), (1e-3, 1e-3)])
def test_a_float16_row_is_normed_whatever_the_size_of_its_numbers(size: float, norm_size: float, is_gated: bool) -> None:
    """A number times its norm's weight lies beyond float16, as massive activations do, or where float16 has few digits."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(kernel_device())

    row, norm = (numbers(1, 256) * size).half(), ((1 + 0.1 * numbers(256)) * norm_size).half()
    weight = (numbers(74, 256) / 16 / norm_size).half()
    expected = skinny_linear_reference(row.float(), weight.float(), norm=norm.float(), eps=1e-9, residual=None, is_gated=is_gated)
    actual = skinny_linear(row, weight, tile=TILES["multiplied"], norm=norm, eps=1e-9, is_gated=is_gated)
    torch.testing.assert_close(actual.float(), expected, atol=2e-3, rtol=4e-3)


@pytest.mark.parametrize(
    ("num_columns", "num_inputs", "most_rows"),
    [(5120, 8192, 32), (8192, 4096, 32), (8192, 14336, 64), (28672, 8192, 1), (4096, 8192, 1), (8192, 5120, 1)],
)
def test_few_rows_have_a_tile_where_it_was_measured(num_columns: int, num_inputs: int, most_rows: int) -> None:
    """A single row has a tile of its own kind, and shapes that are not in the table none."""
    shape = {"num_columns": num_columns, "num_inputs": num_inputs}
    tiles = {num_rows: few_rows_tile(num_rows=num_rows, **shape) for num_rows in (0, 1, 2, 8, 31, 32, 33, 63, 64, 65, 128, 8192)}
    assert {num_rows for num_rows, tile in tiles.items() if tile is not None} == {rows for rows in tiles if 2 <= rows <= most_rows}
    assert all(tile.has_weights_left and num_inputs % tile.num_inputs == 0 for tile in tiles.values() if tile is not None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["plain", "norm", "residual", "gated"])
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("num_rows", [1, 7, 16, 33])
def test_bfloat16_is_right_on_the_gpu(num_rows: int, overlaps: bool, kind: str) -> None:
    tile = LinearTile(num_columns=32, num_inputs=256, num_warps=4, num_stages=3)
    actual, expected = products(num_rows, 4096, 1024, tile, torch.bfloat16, kind=kind, overlaps=overlaps)
    torch.testing.assert_close(actual, expected, atol=6e-2, rtol=2e-2)
