"""Which of an operation's two ways runs: its Triton kernel or plain torch."""

from typing import Final

import torch
import triton
from torch import Tensor

# Read once, as Triton reads it once for each kernel, when the kernel is defined.
IS_INTERPRETED: Final = bool(triton.knobs.runtime.interpret)


def runs_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor go to their Triton kernels: on a GPU, and everywhere under TRITON_INTERPRET=1."""
    return tensor.is_cuda or IS_INTERPRETED


def num_multiprocessors(device: torch.device) -> int:
    """How many multiprocessors share a grid; 4 where there is no GPU, so that interpreted tests split work as a GPU would."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
