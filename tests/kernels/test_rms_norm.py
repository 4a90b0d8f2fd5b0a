import pytest
import torch
from paged_cases import kernel_device

from quire.kernels.rms_norm import rms_norm, rms_norm_reference


@pytest.mark.kernel
@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("width", [16, 130])
@pytest.mark.parametrize("has_residual", [False, True])
def test_the_norm_equals_the_reference(num_tokens: int, width: int, has_residual: bool) -> None:
    hidden = torch.randn(num_tokens, 3 * width, device=kernel_device())[:, width : 2 * width]
    weight = torch.randn(width, device=hidden.device)
    residual = torch.randn(num_tokens, width, device=hidden.device) if has_residual else None
    expected_residual = None if residual is None else residual.clone()
    expected = rms_norm_reference(hidden, weight, eps=1e-5, residual=expected_residual)
    torch.testing.assert_close(rms_norm(hidden, weight, eps=1e-5, residual=residual), expected)
    torch.testing.assert_close(residual, expected_residual)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [896, 1024, 4096, 5120, 8192])
def test_bfloat16_is_right_on_the_gpu(width: int) -> None:
    hidden, residual = torch.randn(2, 129, width, device="cuda").bfloat16()
    weight = torch.randn(width, device="cuda").bfloat16()
    wide_residual = residual.float()
    rms_norm_reference(hidden.float(), weight, eps=1e-5, residual=wide_residual)
    actual = rms_norm(hidden, weight, eps=1e-5, residual=residual)
    torch.testing.assert_close(residual.float(), wide_residual, atol=2e-2, rtol=1e-2)
    expected = rms_norm_reference(residual.float(), weight, eps=1e-5)
    torch.testing.assert_close(actual.float(), expected, atol=2e-2, rtol=1e-2)
