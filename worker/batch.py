"""The batch that lives on a rank: a row per running sequence, on the device, with the host's knowledge of its sizes."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor

from quire.common.errors import InternalError
from quire.common.messages import Logprobs, RowAdd, SamplingState
from quire.worker.device_tensor import device_tensor
from quire.worker.kernel_attention import DecodePlans
from quire.worker.sampling_rows import SamplingRows


@dataclass(slots=True)
class Row:
    """What the host knows about a row: all that follows from the plans, so everything but its tokens' ids."""

    # Invariant: num_computed <= length; the slots of [0, num_computed) lie in block_ids.
    length: int  # tokens of prompt and completion, sampled ones included
    prompt_len: int
    num_computed: int
    block_ids: list[int]
    sampling: SamplingState
    is_sticky: bool = False  # a token was drawn into it: it decodes one token in every step
    is_held: bool = False
    # Log probability of the next prompt token to compute, if the prompt's are asked for: the step before has its logits.
    next_logprob: Logprobs | None = None


class Batch:
    """Rows of fixed number and width. The host never waits for the device here: sizes follow from the plans.

    tokens:         [max_rows, max_tokens_per_row] int64
    lengths:        [max_rows] int64; tokens of prompt and completion
    prompt_lengths: [max_rows] int64
    block_tables:   [max_rows, max_blocks_per_row] int64

    Every method raises InternalError when the plan contradicts what the rank holds; the rank must then not go on.
    """

    def __init__(self, *, max_rows: int, max_tokens_per_row: int, block_size: int, num_blocks: int, vocab_size: int, device: str) -> None:
        self.rows: dict[int, Row] = {}
        self.block_size = block_size
        self.device = device
        self._max_rows = max_rows
        self._max_tokens_per_row = max_tokens_per_row
        # One more than the tokens need: a plan may give a row its next block before its end is known.
        self._max_blocks_per_row = -(-max_tokens_per_row // block_size) + 1
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        self.tokens = torch.zeros((max_rows, max_tokens_per_row), dtype=torch.int64, device=device)
        self.lengths = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.prompt_lengths = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.block_tables = torch.zeros((max_rows, self._max_blocks_per_row), dtype=torch.int64, device=device)
        self.decode_plans = DecodePlans(max_rows=max_rows, device=device)
        self.sampling = SamplingRows(max_rows=max_rows, vocab_size=vocab_size, device=device)

    # -- what plans change ------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget all rows."""
        self.rows.clear()
        self.sampling.clear()

    def remove(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._row(row)
            del self.rows[row]
            self.sampling.remove(row)

    def add(self, adds: Sequence[RowAdd]) -> None:
        """Put sequences into free rows.

        Raises:
            NotSupported: a row's sampling state asks for what this rank cannot do.
        """
        if not adds:
            return
        for added in adds:
            self._check_add(added)
            self.rows[added.row] = Row(len(added.token_ids), added.prompt_len, added.num_computed, list(added.block_ids), added.sampling)
            self.tokens[added.row, : len(added.token_ids)] = self._tensor(added.token_ids)
            self.block_tables[added.row, : len(added.block_ids)] = self._tensor(added.block_ids)
        rows = self._tensor([added.row for added in adds])
        self.lengths[rows] = self._tensor([len(added.token_ids) for added in adds])
        self.prompt_lengths[rows] = self._tensor([added.prompt_len for added in adds])
        self.sampling.set(
            [added.row for added in adds], [added.sampling for added in adds], prompt_lens=[added.prompt_len for added in adds]
        )

    def fork(self, forks: Sequence[tuple[int, int, int]]) -> None:
        """Copy source rows into free target rows; a target draws as the sequence of its own index."""
        if not forks:
            return
        origins: dict[int, int] = {}  # of each target: a fork may itself be forked, but all are copied at once
        for source, target, sequence_index in forks:
            origin = self._row(source)
            self._check_free(target)
            sampling = msgspec.structs.replace(origin.sampling, sequence_index=sequence_index)
            self.rows[target] = replace(origin, block_ids=list(origin.block_ids), sampling=sampling, is_held=False)
            origins[target] = origins.get(source, source)
        sources, targets = self._tensor(list(origins.values())), self._tensor(list(origins))
        num_tokens = max(self.rows[row].length for row in origins)
        num_blocks = max(len(self.rows[row].block_ids) for row in origins)
        self.tokens[targets, :num_tokens] = self.tokens[sources, :num_tokens]
        self.block_tables[targets, :num_blocks] = self.block_tables[sources, :num_blocks]
        self.lengths[targets] = self.lengths[sources]
        self.prompt_lengths[targets] = self.prompt_lengths[sources]
        self.sampling.fork(list(origins.values()), list(origins), [sequence_index for _, _, sequence_index in forks])

    def append(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Append to each row, in order, a token that the scheduler chose."""
        if not rows:
            return
        positions = []
        for row, token_id in zip(rows, token_ids, strict=True):
            state = self._row(row)
            _check(0 <= token_id < self._vocab_size, f"row {row} gets token {token_id}; ids are below {self._vocab_size}")
            positions.append(self._lengthen(row, state))
        indices = self._tensor(rows)
        self.tokens[indices, self._tensor(positions)] = self._tensor(token_ids)
        self.lengths[indices] = self._tensor([self.rows[row].length for row in rows])

    def grow(self, rows: Sequence[int], block_ids: Sequence[int]) -> None:
        """Append a block to a row's table, for each pair in order."""
        if not rows:
            return
        indices = []
        for row, block_id in zip(rows, block_ids, strict=True):
            table = self._row(row).block_ids
            self._check_blocks(row, (block_id,), num_held=len(table))
            indices.append(len(table))
            table.append(block_id)
        self.block_tables[self._tensor(rows), self._tensor(indices)] = self._tensor(block_ids)

    def hold(self, hold_rows: Sequence[int]) -> None:
        """Hold each row >= 0, release each row whose complement is given."""
        for row in hold_rows:
            self._row(row if row >= 0 else ~row).is_held = row >= 0

    def replace_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Put copies in the place of shared blocks of rows' tables: (row, shared block, its copy)."""
        indices = []
        for row, source, target in copies:
            table = self._row(row).block_ids
            _check(source in table, f"row {row} does not hold block {source}, which is to be copied to {target}")
            indices.append(table.index(source))
            self._check_blocks(row, (target,), num_held=indices[-1])
            table[indices[-1]] = target
        rows, _, targets = self._tensor(copies).unbind(1)
        self.block_tables[rows, self._tensor(indices)] = targets

    # -- what steps ask and change ----------------------------------------------------------------------------------

    def decoding_rows(self) -> list[int]:
        """The rows that decode a token in this step, ascending."""
        return sorted(row for row, state in self.rows.items() if state.is_sticky and not state.is_held)

    def check_slots(self, row: int, *, start: int, end: int) -> None:
        """That tokens [start, end) of a row are the next ones to compute and have slots."""
        state = self._row(row)
        _check(
            state.num_computed == start < end <= min(state.length, len(state.block_ids) * self.block_size),
            f"row {row} is to compute tokens {start} to {end - 1}; it has {state.length} tokens, {state.num_computed} of them computed, "
            f"and slots for {len(state.block_ids) * self.block_size}",
        )

    def append_drawn(self, rows: Sequence[int], token_ids: Tensor) -> None:
        """Append a drawn token to each row, which from now on is sticky.

        rows: distinct; token_ids: [len(rows)] int64
        """
        for row in rows:
            state = self.rows[row]
            self._lengthen(row, state)
            state.is_sticky = True
        indices = self._tensor(rows)
        self.tokens[indices, self.lengths[indices]] = token_ids
        self.lengths[indices] += 1

    def checksum(self) -> int:
        """crc32 of the device's lengths and block tables: ranks of a group must agree after every step.

        The bytes, for each row in ascending order: row, length, number of blocks, block ids; little-endian int32 each.
        """
        crc = 0
        for row in sorted(self.rows):
            num_blocks = len(self.rows[row].block_ids)
            words = [row, int(self.lengths[row]), num_blocks, *self.block_tables[row, :num_blocks].tolist()]
            crc = zlib.crc32(b"".join(word.to_bytes(4, "little") for word in words), crc)
        return crc

    def check(self) -> None:
        """Assert every invariant, the device's copy included."""
        self.sampling.check(self.rows)
        for row, state in self.rows.items():
            assert state.num_computed <= min(state.length, len(state.block_ids) * self.block_size), (row, state)
            assert 0 < state.prompt_len <= state.length <= self._max_tokens_per_row, (row, state)
            assert int(self.lengths[row]) == state.length, (row, state)
            assert int(self.prompt_lengths[row]) == state.prompt_len, (row, state)
            assert self.block_tables[row, : len(state.block_ids)].tolist() == state.block_ids, (row, state)

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _row(self, row: int) -> Row:
        _check(row in self.rows, f"row {row} is not in the batch")
        return self.rows[row]

    def _lengthen(self, row: int, state: Row) -> int:
        """Make room for one token; its position."""
        _check(state.length < self._max_tokens_per_row, f"row {row} would pass {self._max_tokens_per_row} tokens")
        state.length += 1
        return state.length - 1

    def _check_add(self, added: RowAdd) -> None:
        num_tokens = len(added.token_ids)
        self._check_free(added.row)
        _check(added.adapter_id == 0, f"row {added.row} wants adapter {added.adapter_id}; this rank has none")
        _check(
            num_tokens <= self._max_tokens_per_row
            and 0 <= min(added.token_ids, default=0) <= max(added.token_ids, default=0) < self._vocab_size,
            f"row {added.row} has {num_tokens} tokens; ids are below {self._vocab_size}, {self._max_tokens_per_row} fit",
        )
        _check(0 < added.prompt_len <= num_tokens, f"row {added.row} has {num_tokens} tokens, {added.prompt_len} of them are its prompt")
        self._check_blocks(added.row, added.block_ids, num_held=0)
        _check(
            0 <= added.num_computed <= min(num_tokens, len(added.block_ids) * self.block_size),
            f"row {added.row} has {added.num_computed} computed tokens of {num_tokens} in {len(added.block_ids)} blocks",
        )

    def _check_free(self, row: int) -> None:
        _check(row not in self.rows and 0 <= row < self._max_rows, f"row {row} is in use or outside the batch")

    def _check_blocks(self, row: int, block_ids: Sequence[int], *, num_held: int) -> None:
        _check(
            all(0 <= block_id < self._num_blocks for block_id in block_ids) and num_held + len(block_ids) <= self._max_blocks_per_row,
            f"row {row} has {num_held} blocks and gets {list(block_ids)[:8]}; ids are below {self._num_blocks} and "
            f"at most {self._max_blocks_per_row} fit",
        )

    def _tensor(self, values: Sequence[int] | Sequence[tuple[int, ...]]) -> Tensor:
        return device_tensor(values, device=self.device)


def _check(is_true: bool, message: str) -> None:
    if not is_true:
        raise InternalError(f"the plan does not fit the batch: {message}")
