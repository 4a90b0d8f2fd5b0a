"""The block ledger once more, slow and obvious: one record per block, found by looking at all of them."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Block:
    block_id: int
    last_used: int  # grows with every block that loses its last holder
    num_holders: int = 0
    name: bytes | None = None  # hash of its contents, while it can be found by it


class SlowBlockPool:
    """What BlockPool promises, by loops over a list. Callers keep its rules; nothing is asserted here."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [Block(block_id, last_used=block_id) for block_id in range(num_blocks)]
        self._num_uses = num_blocks

    def free_blocks(self) -> list[Block]:
        return [block for block in self._unheld() if block.name is None]

    def cached_blocks(self) -> list[Block]:
        return [block for block in self._unheld() if block.name is not None]

    def allocate(self, num_blocks: int) -> list[int] | None:
        """None when there are not so many."""
        taken = [*self.free_blocks(), *self.cached_blocks()][:num_blocks]
        if len(taken) < num_blocks:
            return None
        for block in taken:
            block.num_holders, block.name = 1, None
        return [block.block_id for block in taken]

    def fork(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            self.blocks[block_id].num_holders += 1

    def free(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids[::-1]:
            block = self.blocks[block_id]
            block.num_holders -= 1
            if block.num_holders == 0:
                self._num_uses += 1
                block.last_used = self._num_uses

    def publish(self, block_id: int, name: bytes) -> None:
        if self.blocks[block_id].name is None and all(block.name != name for block in self.blocks):
            self.blocks[block_id].name = name

    def unpublish(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            self.blocks[block_id].name = None

    def find(self, names: Sequence[bytes]) -> list[int]:
        found: list[int] = []
        for name in names:
            holders_of_name = [block.block_id for block in self.blocks if block.name == name]
            if not holders_of_name:
                break
            found += holders_of_name
        return found

    def _unheld(self) -> list[Block]:
        """Blocks without holders, least recently used first."""
        return sorted((block for block in self.blocks if block.num_holders == 0), key=lambda block: block.last_used)
