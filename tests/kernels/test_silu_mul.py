import pytest
import torch
from paged_cases import kernel_device

from quire.kernels.silu_mul import silu_mul, silu_mul_reference


@pytest.mark.kernel
@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("width", [1, 129, 2050])
def test_the_gate_equals_the_reference(num_tokens: int, width: int) -> None:
    gate_up = torch.randn(num_tokens, 2 * width, device=kernel_device()) * 10
    torch.testing.assert_close(silu_mul(gate_up), silu_mul_reference(gate_up))


@pytest.mark.gpu
def test_bfloat16_is_right_on_the_gpu() -> None:
    gate_up = torch.randn(129, 2 * 14336, device="cuda").bfloat16()
    torch.testing.assert_close(silu_mul(gate_up).float(), silu_mul_reference(gate_up.float()), atol=2e-2, rtol=1e-2)
