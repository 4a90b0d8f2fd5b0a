"""The batch that lives on a rank: a row per running sequence, on the device, with the host's knowledge of its sizes."""

import zlib
from collections.abc import Sequence
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.common.errors import InternalError
from quire.common.messages import Logprobs, RowAdd, SamplingState
from quire.worker.batch_memory import BatchMemory
from quire.worker.device_tensor import device_tensor
from quire.worker.kernel_attention import DecodePlans
from quire.worker.sampling_rows import COLUMNS, SamplingRows

RowIds: TypeAlias = npt.NDArray[np.int64]


class RowSizes:
    """What the host knows of all rows' sizes, by row: all that follows from the plans. Steps change them many at a time."""

    # Invariant, of rows in the batch: num_computed <= min(length, capacity).

    def __init__(self, max_rows: int) -> None:
        self.length = np.zeros(max_rows, dtype=np.int64)  # tokens of prompt and completion, sampled ones included
        self.num_computed = np.zeros(max_rows, dtype=np.int64)
        self.capacity = np.zeros(max_rows, dtype=np.int64)  # slots of the row's blocks


class Row:
    """What the host knows about one row but its tokens' ids."""

    __slots__ = ("_sizes", "block_ids", "index", "is_held", "is_sticky", "next_logprob", "prompt_len", "sampling")

    def __init__(self, sizes: RowSizes, index: int, *, prompt_len: int, block_ids: list[int], sampling: SamplingState) -> None:
        self._sizes = sizes
        self.index = index
        self.prompt_len = prompt_len
        self.block_ids = block_ids
        self.sampling = sampling
        self.is_sticky = False  # a token was drawn into it: it decodes one token in every step
        self.is_held = False
        # Log probability of the next prompt token to compute, if the prompt's are asked for: the step before has its logits.
        self.next_logprob: Logprobs | None = None

    @property
    def length(self) -> int:
        return int(self._sizes.length[self.index])

    @property
    def num_computed(self) -> int:
        return int(self._sizes.num_computed[self.index])

    @num_computed.setter
    def num_computed(self, value: int) -> None:
        self._sizes.num_computed[self.index] = value


class Batch:
    """Rows of fixed number and width. The host never waits for the device here: sizes follow from the plans.

    tokens:         [max_rows, max_tokens_per_row] int64
    lengths:        [max_rows] int64; tokens of prompt and completion
    prompt_lengths: [max_rows] int64
    block_tables:   [max_rows, max_blocks_per_row] int64

    On a GPU what a plan changes is there once `flush` was called. Every method raises InternalError when the plan contradicts
    what the rank holds; the rank must then not go on.
    """

    def __init__(self, *, max_rows: int, max_tokens_per_row: int, block_size: int, num_blocks: int, vocab_size: int, device: str) -> None:
        self.rows: dict[int, Row] = {}
        self.sizes = RowSizes(max_rows)
        self.block_size = block_size
        self.device = device
        self.max_rows = max_rows
        self._max_tokens_per_row = max_tokens_per_row
        # One more than the tokens need: a plan may give a row its next block before its end is known.
        self._max_blocks_per_row = -(-max_tokens_per_row // block_size) + 1
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        self._memory = BatchMemory(
            {
                "tokens": ((max_rows, max_tokens_per_row), torch.int64),
                "block_tables": ((max_rows, self._max_blocks_per_row), torch.int64),
                "lengths": ((max_rows,), torch.int64),
                "prompt_lengths": ((max_rows,), torch.int64),
                **{name: ((max_rows,), dtype) for name, dtype in COLUMNS.items()},
            },
            device=device,
        )
        self.tokens = self._memory["tokens"]
        self.lengths = self._memory["lengths"]
        self.prompt_lengths = self._memory["prompt_lengths"]
        self.block_tables = self._memory["block_tables"]
        self.decode_plans = DecodePlans(max_rows=max_rows, device=device)
        self.sampling = SamplingRows(self._memory, vocab_size=vocab_size, device=device)
        self._decoding: RowIds | None = None  # None: to be found out

    # -- what plans change ------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Bring what plans changed to the device, behind what it has been told so far."""
        self._memory.flush()

    def clear(self) -> None:
        """Forget all rows."""
        self.rows.clear()
        self.sampling.clear()
        self._decoding = None

    def remove(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._row(row)
            del self.rows[row]
            self.sampling.remove(row)
            self._decoding = None

    def add(self, adds: Sequence[RowAdd]) -> None:
        """Put sequences into free rows.

        Raises:
            NotSupported: a row's sampling state asks for what this rank cannot do.
        """
        for added in adds:
            self._check_add(added)
            row = added.row
            self.rows[row] = Row(self.sizes, row, prompt_len=added.prompt_len, block_ids=list(added.block_ids), sampling=added.sampling)
            self.sizes.length[row] = len(added.token_ids)
            self.sizes.num_computed[row] = added.num_computed
            self.sizes.capacity[row] = len(added.block_ids) * self.block_size
            self._memory.write("tokens", row * self._max_tokens_per_row, added.token_ids)
            self._memory.write("block_tables", row * self._max_blocks_per_row, added.block_ids)
            self._memory.write("lengths", row, (len(added.token_ids),))
            self._memory.write("prompt_lengths", row, (added.prompt_len,))
            self.sampling.set(row, added.sampling, prompt_len=added.prompt_len)

    def fork(self, forks: Sequence[tuple[int, int, int]]) -> None:
        """Copy source rows into free target rows; a target draws as the sequence of its own index."""
        if not forks:
            return
        origins: dict[int, int] = {}  # of each target: a fork may itself be forked, but all are copied at once
        for source, target, sequence_index in forks:
            origin = self._row(source)
            self._check_free(target)
            sampling = msgspec.structs.replace(origin.sampling, sequence_index=sequence_index)
            copy = Row(self.sizes, target, prompt_len=origin.prompt_len, block_ids=list(origin.block_ids), sampling=sampling)
            copy.is_sticky = origin.is_sticky
            copy.next_logprob = origin.next_logprob
            self.rows[target] = copy
            for column in (self.sizes.length, self.sizes.num_computed, self.sizes.capacity):
                column[target] = column[source]
            origins[target] = origins.get(source, source)
        self._decoding = None
        self.flush()  # a source may have been added by this very plan
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
        self.flush()  # a row's length may have been written by this very plan
        lengths: dict[int, int] = {}
        for row, token_id in zip(rows, token_ids, strict=True):
            self._row(row)
            _check(0 <= token_id < self._vocab_size, f"row {row} gets token {token_id}; ids are below {self._vocab_size}")
            position = lengths[row] = self._lengthen(row)
            self._memory.write("tokens", row * self._max_tokens_per_row + position, (token_id,))
        for row, position in lengths.items():
            self._memory.write("lengths", row, (position + 1,))

    def grow(self, rows: Sequence[int], block_ids: Sequence[int]) -> None:
        """Append a block to a row's table, for each pair in order."""
        for row, block_id in zip(rows, block_ids, strict=True):
            table = self._row(row).block_ids
            self._check_blocks(row, (block_id,), num_held=len(table))
            self._memory.write("block_tables", row * self._max_blocks_per_row + len(table), (block_id,))
            table.append(block_id)
            self.sizes.capacity[row] += self.block_size

    def hold(self, hold_rows: Sequence[int]) -> None:
        """Hold each row >= 0, release each row whose complement is given."""
        for row in hold_rows:
            self._row(row if row >= 0 else ~row).is_held = row >= 0
            self._decoding = None

    def replace_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Put copies in the place of shared blocks of rows' tables: (row, shared block, its copy)."""
        self.flush()  # the table may have been written by this very plan
        for row, source, target in copies:
            table = self._row(row).block_ids
            _check(source in table, f"row {row} does not hold block {source}, which is to be copied to {target}")
            index = table.index(source)
            self._check_blocks(row, (target,), num_held=index)
            table[index] = target
            self._memory.write("block_tables", row * self._max_blocks_per_row + index, (target,))

    # -- what steps ask and change ----------------------------------------------------------------------------------

    def decoding_rows(self) -> RowIds:
        """The rows that decode a token in this step, ascending. The same array as long as they are the same."""
        if self._decoding is None:
            rows = sorted(row for row, state in self.rows.items() if state.is_sticky and not state.is_held)
            self._decoding = np.array(rows, dtype=np.int64)
        return self._decoding

    def check_slots(self, row: int, *, start: int, end: int) -> None:
        """That tokens [start, end) of a row are the next ones to compute and have slots."""
        state = self._row(row)
        _check(
            state.num_computed == start < end <= min(state.length, len(state.block_ids) * self.block_size),
            f"row {row} is to compute tokens {start} to {end - 1}; it has {state.length} tokens, {state.num_computed} of them computed, "
            f"and slots for {len(state.block_ids) * self.block_size}",
        )

    def compute_decodes(self, rows: RowIds) -> None:
        """Note that each row's last token is computed by this step, once it is seen to have a slot."""
        length = self.sizes.length[rows]
        is_wrong = (self.sizes.num_computed[rows] != length - 1) | (length > self.sizes.capacity[rows])
        if is_wrong.any():
            row = int(rows[is_wrong.argmax()])
            self.check_slots(row, start=self.rows[row].length - 1, end=self.rows[row].length)
        self.sizes.num_computed[rows] = length

    def lengthen_drawn(self, rows: RowIds) -> None:
        """Note that a drawn token is appended to each row, which from now on is sticky. The device is told by others.

        rows: distinct
        """
        lengths = self.sizes.length[rows]
        if len(rows) and int(lengths.max()) >= self._max_tokens_per_row:
            self._lengthen(int(rows[lengths.argmax()]))  # which says what is wrong
        self.sizes.length[rows] = lengths + 1
        if rows is self._decoding:
            return
        for row in rows.tolist():
            state = self.rows[row]
            if not state.is_sticky:
                state.is_sticky = True
                self._decoding = None

    def append_drawn(self, rows: Sequence[int], token_ids: Tensor) -> None:
        """Append a drawn token to each row, which from now on is sticky.

        rows: distinct; token_ids: [len(rows)] int64
        """
        self.lengthen_drawn(np.array(rows, dtype=np.int64))
        indices = self._tensor(rows)
        self.tokens[indices, self.lengths[indices]] = token_ids
        self.lengths[indices] += 1

    def checksum(self) -> int:
        """crc32 of the device's lengths and block tables: ranks of a group must agree after every step.

        The bytes, for each row in ascending order: row, length, number of blocks, block ids; little-endian int32 each.
        """
        self.flush()
        crc = 0
        for row in sorted(self.rows):
            num_blocks = len(self.rows[row].block_ids)
            words = [row, int(self.lengths[row]), num_blocks, *self.block_tables[row, :num_blocks].tolist()]
            crc = zlib.crc32(b"".join(word.to_bytes(4, "little") for word in words), crc)
        return crc

    def check(self) -> None:
        """Assert every invariant, the device's copy included."""
        self.flush()
        self.sampling.check(self.rows)
        for row, state in self.rows.items():
            assert self.sizes.capacity[row] == len(state.block_ids) * self.block_size, (row, state.block_ids)
            assert state.num_computed <= min(state.length, len(state.block_ids) * self.block_size), (row, state.length)
            assert 0 < state.prompt_len <= state.length <= self._max_tokens_per_row, (row, state.length)
            assert int(self.lengths[row]) == state.length, (row, state.length)
            assert int(self.prompt_lengths[row]) == state.prompt_len, (row, state.length)
            assert self.block_tables[row, : len(state.block_ids)].tolist() == state.block_ids, (row, state.length)

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _row(self, row: int) -> Row:
        _check(row in self.rows, f"row {row} is not in the batch")
        return self.rows[row]

    def _lengthen(self, row: int) -> int:
        """Make room for one token; its position."""
        position = int(self.sizes.length[row])
        _check(position < self._max_tokens_per_row, f"row {row} would pass {self._max_tokens_per_row} tokens")
        self.sizes.length[row] = position + 1
        return position

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
        _check(row not in self.rows and 0 <= row < self.max_rows, f"row {row} is in use or outside the batch")

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
