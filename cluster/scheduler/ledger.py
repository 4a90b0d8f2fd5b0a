"""Who holds which block of a worker group: the tables of its sequences, the names of full blocks, and copies under way."""

import math
from collections.abc import Iterable

from quire.cluster.scheduler.block_pool import BlockPool
from quire.cluster.scheduler.copies import CopyLedger
from quire.cluster.scheduler.request import Request, RequestState, Sequence, Transfer
from quire.cluster.scheduler.step_draft import StepDraft
from quire.common.hashing import hash_block


class Ledger:
    """One GPU pool and one CPU pool, whose ids mean the same on every rank, and the block tables that refer to them."""

    def __init__(self, *, block_size: int, num_gpu_blocks: int, num_cpu_blocks: int, num_ranks: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_gpu_blocks, block_size=block_size)
        self.cpu_pool = BlockPool(num_cpu_blocks, block_size=block_size)
        self.copies = CopyLedger(self.pool, self.cpu_pool, num_ranks=num_ranks)

    # -- names --------------------------------------------------------------------------------------------------------

    def find(self, sequence: Sequence) -> list[int]:
        """Blocks with the sequence's first tokens. The last token is always computed: the next one is drawn from its logits.
        A request for log probabilities of its prompt computes all of it."""
        return self.pool.find(self._usable_hashes(sequence))

    def num_cached(self, sequence: Sequence) -> int:
        """About how many blocks `find` would find."""
        return self.pool.num_known(self._usable_hashes(sequence))

    def _usable_hashes(self, sequence: Sequence) -> list[bytes]:
        if sequence.sampling.num_prompt_logprobs is not None:
            return []
        self._extend_hashes(sequence, len(sequence.token_ids) // self.block_size)
        return sequence.block_hashes[: (len(sequence.token_ids) - 1) // self.block_size]

    def publish_planned(self, sequence: Sequence) -> None:
        """Blocks of known tokens can be found as soon as they are planned: a later plan that reads them is computed later.

        Those of a prompt whose log probabilities are asked for may be computed twice, so nobody shares them before its end.
        """
        if sequence.sampling.num_prompt_logprobs is not None and sequence.num_planned < sequence.num_prompt_tokens:
            return
        self._publish(sequence, min(sequence.num_planned // self.block_size, len(sequence.block_hashes)))

    def publish_decoded(self, sequence: Sequence) -> None:
        """Blocks that decoding filled can be found once their tokens are known; the last token's keys are not written yet."""
        num_full = (len(sequence.token_ids) - 1) // self.block_size
        self._extend_hashes(sequence, num_full)
        if sequence.block_table and sequence.request.state is RequestState.RUNNING:
            self._publish(sequence, num_full)

    def _extend_hashes(self, sequence: Sequence, num_full: int) -> None:
        """Name the sequence's first full blocks."""
        hashes, block_size = sequence.block_hashes, self.block_size
        while len(hashes) < num_full:
            start = len(hashes) * block_size
            parent = hashes[-1] if hashes else sequence.request.submit.cache_root
            hashes.append(hash_block(parent, sequence.token_ids[start : start + block_size]))

    def _publish(self, sequence: Sequence, num_full: int) -> None:
        while sequence.num_published < num_full:
            self.pool.publish(sequence.block_table[sequence.num_published], sequence.block_hashes[sequence.num_published])
            sequence.num_published += 1

    # -- tables -------------------------------------------------------------------------------------------------------

    def num_blocks(self, num_tokens: int) -> int:
        return math.ceil(num_tokens / self.block_size)

    def open_table(self, sequence: Sequence, *, shared: list[int], num_cached: int) -> None:
        """Give a sequence without blocks the blocks of all its tokens: `shared` ones, of which the first num_cached are
        computed, and new ones."""
        self.pool.fork(shared)
        sequence.block_table = shared + self.pool.allocate(self.num_blocks(len(sequence.token_ids)) - len(shared))
        sequence.num_planned = num_cached * self.block_size
        sequence.num_published = num_cached

    def fork_table(self, parent: Sequence, child: Sequence) -> None:
        """Let the child hold all that the parent holds."""
        child.block_table, child.cpu_table = list(parent.block_table), list(parent.cpu_table)
        child.block_hashes = list(parent.block_hashes)
        child.num_published, child.num_planned = parent.num_published, parent.num_planned
        self.pool.fork(child.block_table)
        self.cpu_pool.fork(child.cpu_table)

    def close_table(self, sequence: Sequence) -> None:
        """Give back all that a sequence holds."""
        self.pool.free(sequence.block_table)
        self.cpu_pool.free(sequence.cpu_table)
        sequence.forget_blocks()

    def computed_blocks(self, sequence: Sequence) -> list[int]:
        """The blocks of a running sequence with keys and values in them."""
        return sequence.block_table[: self.num_blocks(sequence.num_planned)]

    # -- writing ------------------------------------------------------------------------------------------------------

    def num_blocks_wanted(self, sequences: Iterable[Sequence]) -> int:
        """Blocks that a request's sequences need to write their next token: new ones, and copies of shared ones; the last
        holder writes in place."""
        num_blocks = 0
        writers: dict[int, int] = {}  # by the block that they are about to write into
        for sequence in sequences:
            place = sequence.num_planned // self.block_size
            if place == len(sequence.block_table):
                num_blocks += 1
            else:
                writers[sequence.block_table[place]] = writers.get(sequence.block_table[place], 0) + 1
        return num_blocks + sum(min(count, self.pool.ref_count(block_id) - 1) for block_id, count in writers.items())

    def give(self, sequences: Iterable[Sequence], draft: StepDraft) -> int:
        """Append a block to each table, or take a copy of the shared one that is about to be written into; how many were
        appended. `num_blocks_wanted` of them are available."""
        num_appended = 0
        for sequence in sequences:
            table = sequence.block_table
            place = sequence.num_planned // self.block_size
            if place == len(table):
                table += self.pool.allocate(1)
                draft.grows.append((sequence.row, table[-1]))
                num_appended += 1
            elif self.pool.ref_count(table[place]) > 1:
                source, table[place] = table[place], self.pool.allocate(1)[0]
                self.pool.free([source])
                draft.cow.append((sequence.row, source, table[place]))
            sequence.write_limit = len(table) * self.block_size
        return num_appended

    # -- swapping -----------------------------------------------------------------------------------------------------

    def swap_out(self, request: Request, blocks: list[int], draft: StepDraft) -> None:
        """Move a request's computed blocks, each once, to the CPU pool, which has room for them. What siblings share stays shared."""
        cpu_blocks = dict(zip(blocks, self.cpu_pool.allocate(len(blocks)), strict=True))
        request.transfer = Transfer()
        draft.swap_out += self.copies.start(cpu_blocks.items(), request=request, transfer=request.transfer, is_out=True)
        for sequence in request.sequences:
            num_planned = sequence.num_planned
            cpu_table = [cpu_blocks[block_id] for block_id in self.computed_blocks(sequence)]
            self.cpu_pool.fork(cpu_table)
            self.close_table(sequence)
            sequence.cpu_table, sequence.num_planned = cpu_table, num_planned
        self.cpu_pool.free(list(cpu_blocks.values()))  # the tables and the copies hold them now

    def swap_in(self, request: Request, *, headroom: int, draft: StepDraft) -> tuple[int, int] | None:
        """Bring a swapped request's blocks back, with those of its newest tokens; None if fewer than `headroom` would be left.

        Full blocks that the pool still knows are taken from there, the others copied: (blocks found, blocks copied). What
        siblings share stays shared, but for a block that they are about to write into: there each gets a copy of its own.
        """
        found: dict[int, int] = {}  # GPU block by CPU block
        copied: dict[int, None] = {}  # CPU blocks that need a GPU block, in order
        num_own = 0
        for sequence in request.sequences:
            num_full = sequence.num_planned // self.block_size
            num_own += self.num_blocks(len(sequence.token_ids)) - min(num_full, len(sequence.cpu_table))
            for place, cpu_block in enumerate(sequence.cpu_table[:num_full]):
                if cpu_block in found or cpu_block in copied:
                    continue
                known = self.pool.find([sequence.block_hashes[place]]) if place < len(sequence.block_hashes) else []
                if known:
                    found[cpu_block] = known[0]
                else:
                    copied[cpu_block] = None
        if len(copied) + num_own + headroom > self.pool.num_available - self.pool.num_unheld(set(found.values())):
            return None
        self.pool.fork(found.values())  # lest `allocate` takes them; given back below, when the tables hold them
        homes = {**found, **dict(zip(copied, self.pool.allocate(len(copied)), strict=True))}
        pairs = [(homes[cpu_block], cpu_block) for cpu_block in copied]
        for sequence in request.sequences:
            num_full = sequence.num_planned // self.block_size
            sequence.block_table = [homes[cpu_block] for cpu_block in sequence.cpu_table[:num_full]]
            self.pool.fork(sequence.block_table)
            sequence.block_table += self.pool.allocate(self.num_blocks(len(sequence.token_ids)) - len(sequence.block_table))
            pairs += zip(sequence.block_table[num_full:], sequence.cpu_table[num_full:], strict=False)  # a last, partial block
        self.pool.free(list(homes.values()))
        request.transfer = Transfer()
        draft.swap_in += self.copies.start(pairs, request=request, transfer=request.transfer, is_out=False)
        return len(found), len(pairs)

    def swapped_in(self, sequence: Sequence) -> None:
        """All copies of a sequence's blocks have ended: they can be found, and their places in the CPU pool are free."""
        self.cpu_pool.free(sequence.cpu_table)
        sequence.cpu_table = []
        self.publish_planned(sequence)

    def check(self, requests: Iterable[Request]) -> None:
        """Assert that the pools' counts are those of the tables of `requests` and of the copies."""
        gpu_holders = [0] * self.pool.num_blocks
        cpu_holders = [0] * self.cpu_pool.num_blocks
        for request in requests:
            for sequence in request.sequences:
                table = sequence.block_table if request.state is RequestState.RUNNING else sequence.cpu_table
                assert sequence.num_planned <= len(table) * self.block_size, "tokens are planned without a block"
                for block_id in sequence.block_table:
                    gpu_holders[block_id] += 1
                for block_id in sequence.cpu_table:
                    cpu_holders[block_id] += 1
        for copy in self.copies.under_way():
            gpu_holders[copy.gpu_block] += 1
            cpu_holders[copy.cpu_block] += 1
        self.pool.check(gpu_holders)
        if cpu_holders:
            self.cpu_pool.check(cpu_holders)
