import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quire.kernels.dense_attention import MIN_TOKENS, SIZE_STEP, dense_attention, is_supported, padded_size


def torchs(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def test_sizes_are_few_and_hold_every_prompt() -> None:
    assert [padded_size(count) for count in (1, SIZE_STEP, SIZE_STEP + 1)] == [SIZE_STEP, SIZE_STEP, 2 * SIZE_STEP]
    assert padded_size(MIN_TOKENS) == MIN_TOKENS, "the smallest prompt has no padding"


def test_the_reference_is_torchs_attention() -> None:
    qkv = torch.randn(9, 10, 16, generator=torch.Generator().manual_seed(0))
    query, key, value = qkv.split((6, 2, 2), dim=1)
    actual = dense_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(actual, torchs(query, key, value, scale=0.3), atol=1e-5, rtol=1e-5)


def test_only_sixteen_bits_on_a_gpu_are_supported() -> None:
    assert not is_supported(head_dim=128, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert not is_supported(head_dim=128, dtype=torch.float32, device=torch.device("cuda"))
    assert not is_supported(head_dim=256, dtype=torch.bfloat16, device=torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("heads", [(32, 8, 128), (16, 8, 128), (40, 40, 128), (8, 2, 64)])
def test_padding_changes_no_token(heads: tuple[int, int, int]) -> None:
    num_heads, num_kv_heads, head_dim = heads
    count, size = MIN_TOKENS + 77, padded_size(MIN_TOKENS + 77)
    qkv = torch.randn(size, num_heads + 2 * num_kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    qkv[count:] = 0
    query, key, value = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    actual = dense_attention(query, key, value, scale=head_dim**-0.5)[:count].float()
    expected = torchs(query[:count].float(), key[:count].float(), value[:count].float(), scale=head_dim**-0.5)
    assert float((actual - expected).abs().max()) < 2e-2
