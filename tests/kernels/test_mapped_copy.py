import pytest
import torch
from paged_cases import kernel_device

from quire.kernels.mapped_copy import mapped_copy

DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (5, 3), (4, 256), (1025,), (3, 5000)])
@pytest.mark.parametrize("is_to_device", [True, False], ids=["to the device", "to the host"])
def test_numbers_arrive_and_nothing_beside_them_changes(dtype: torch.dtype, shape: tuple[int, ...], is_to_device: bool) -> None:
    """The target lies inside a larger tensor, at a place that is no multiple of 16 bytes."""
    device = kernel_device()
    is_pinned = device.type == "cuda"
    random = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    source = random.pin_memory() if is_pinned and is_to_device else random.to("cpu" if is_to_device else device)
    count = random.numel()
    where = {"device": device} if is_to_device else {"pin_memory": is_pinned}
    around = torch.full((count + 8,), 7, dtype=dtype, **where)
    before = around.clone()
    mapped_copy(source, around[3 : 3 + count].view(shape))
    if is_pinned:
        torch.cuda.synchronize()
    assert torch.equal(around[3 : 3 + count].view(shape).cpu(), random)
    assert torch.equal(around[:3].cpu(), before[:3].cpu())
    assert torch.equal(around[3 + count :].cpu(), before[3 + count :].cpu())
