"""The keys and values of a rank: one pool of blocks."""

from typing import Final

import torch
from torch import Tensor

# How a block lies in memory, outermost first (LAYOUT_VERSION in common/messages.py names it). Block first makes a block one
# run of memory, so that a swap is one copy instead of two per layer. The only place that knows the order.
PHYSICAL_ORDER: Final = ("block", "layer", "kind", "head", "offset", "dim")

# What kernels see of one layer, and what block copies see of the pool.
_LAYER_ORDER: Final = ("block", "kind", "head", "offset", "dim")
_BLOCK_ORDER: Final = ("block", "layer", "kind", "head", "offset", "dim")


class KvCache:
    """The tensors behind block ids. Which block is whose is the scheduler's to know."""

    def __init__(
        self,
        *,
        num_blocks: int,
        num_layers: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str,
        is_pinned: bool = False,
    ) -> None:
        sizes = {"block": num_blocks, "layer": num_layers, "kind": 2, "head": num_kv_heads, "offset": block_size, "dim": head_dim}
        self.num_blocks = num_blocks
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.block_size = block_size
        self.head_dim = head_dim
        # Zeros, not garbage: what an uninitialised slot holds is multiplied by a weight of 0, and must be finite for that.
        self._pool = torch.zeros([sizes[name] for name in PHYSICAL_ORDER], dtype=dtype, device=device, pin_memory=is_pinned)
        self.blocks = self._pool.permute([PHYSICAL_ORDER.index(name) for name in _BLOCK_ORDER])
        rest = [name for name in PHYSICAL_ORDER if name != "layer"]
        order = [rest.index(name) for name in _LAYER_ORDER]
        self._layers = [layer.permute(order) for layer in self._pool.unbind(PHYSICAL_ORDER.index("layer"))]

    @property
    def block_bytes(self) -> int:
        """One block, all layers, keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.block_size * self.head_dim * self._pool.itemsize

    def layer(self, layer_index: int) -> Tensor:
        """[num_blocks, 2, num_kv_heads, block_size, head_dim]: a strided view; keys are [:, 0], values [:, 1]."""
        return self._layers[layer_index]

    def cpu_pool(self, num_blocks: int) -> "KvCache":
        """Blocks of the same layout in CPU memory, which is pinned if this pool is on a GPU: only then are copies one DMA each."""
        return KvCache(
            num_blocks=num_blocks,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            block_size=self.block_size,
            head_dim=self.head_dim,
            dtype=self._pool.dtype,
            device="cpu",
            is_pinned=self._pool.is_cuda and num_blocks > 0,
        )
