"""Ranks in simulation: they do what a step plan says, on a model whose next token is a hash of the tokens that it reads back
from its blocks. So a wrong block table, a block given away too early, a copy too late, or a wrong prefix hit changes the tokens."""

import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence

from quire.common.messages import (
    LAYOUT_VERSION,
    PROTOCOL_VERSION,
    Logprobs,
    RankHello,
    RowAdd,
    SamplingState,
    StepAck,
    StepPlan,
    StepResult,
)

VOCAB_SIZE = 997
BEAM_VOCAB_SIZE = 41
TOKEN_BYTES = 4
POISON = b"\xff"  # what nobody wrote


def encode_tokens(token_ids: Iterable[int]) -> bytearray:
    return bytearray(array("I", token_ids).tobytes())


Draw = Callable[[bytes | bytearray, SamplingState, int], int]  # as draw()
Candidates = Callable[[bytes | bytearray, SamplingState, int, int], tuple[tuple[int, float], ...]]  # as beam_candidates()


def draw(encoded: bytes | bytearray, sampling: SamplingState, index: int) -> int:
    """What the pretended model says after these tokens, for one sequence of a request."""
    return zlib.crc32(encoded, sampling.seed * 31 + index) % VOCAB_SIZE


def expected_completion(
    prompt_ids: Sequence[int], sampling: SamplingState, *, max_tokens: int, index: int = 0, draw: Draw = draw
) -> list[int]:
    """The completion of a request, without any blocks: until a stop id or max_tokens."""
    encoded = encode_tokens(prompt_ids)
    completion: list[int] = []
    while len(completion) < max_tokens:
        completion.append(draw(encoded, sampling, index))
        encoded += encode_tokens(completion[-1:])
        if completion[-1] in sampling.stop_ids and len(completion) > sampling.min_tokens:
            break
    return completion


def beam_candidates(encoded: bytes | bytearray, sampling: SamplingState, count: int, num_tokens: int) -> tuple[tuple[int, float], ...]:
    """The pretended model's most likely next tokens with their log probabilities, `count` of them, all distinct."""
    first = zlib.crc32(encoded, 7)
    # Few tokens, so that some are stop ids; these are not there while they are forbidden.
    pairs: list[tuple[int, float]] = []
    place = 0
    while len(pairs) < count:
        token_id = (first + place * 7) % BEAM_VOCAB_SIZE
        place += 1
        if token_id in sampling.stop_ids and num_tokens < sampling.min_tokens:
            continue
        pairs.append((token_id, -0.1 - 0.05 * len(pairs) - (zlib.crc32(encoded, token_id) % 997) / 1500))
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))


def logprob_of(encoded: bytes | bytearray, token_id: int) -> float:
    return -(zlib.crc32(encoded, token_id) % 1000) / 100


def hello(
    group_id: str = "g0",
    *,
    term: int = 1,
    rank: int = 0,
    num_gpu_blocks: int = 16,
    num_cpu_blocks: int = 0,
    max_rows: int = 8,
    prefill_tokens_per_s: tuple[tuple[int, float], ...] = (),
    copy_bytes_per_s: float = 0.0,
) -> RankHello:
    return RankHello(
        version=PROTOCOL_VERSION,
        group_id=group_id,
        term=term,
        rank=rank,
        num_gpu_blocks=num_gpu_blocks,
        num_cpu_blocks=num_cpu_blocks,
        block_bytes=1024,
        h2d_bytes_per_s=copy_bytes_per_s,
        d2h_bytes_per_s=copy_bytes_per_s,
        prefill_tokens_per_s=prefill_tokens_per_s,
        max_rows=max_rows,
        model_fingerprint="model",
        layout_version=LAYOUT_VERSION,
    )


class _Row:
    __slots__ = ("block_ids", "encoded", "first_reported", "index", "num_computed", "num_prompt", "num_tokens", "sampling")

    def __init__(self, add: RowAdd) -> None:
        self.encoded = encode_tokens(add.token_ids)
        self.num_tokens = len(add.token_ids)
        self.num_prompt = add.prompt_len
        self.block_ids = list(add.block_ids)
        self.num_computed = add.num_computed
        # Of a prompt token, from the logits of the one before, which the row must have computed itself.
        self.first_reported = add.num_computed + 1
        self.sampling = add.sampling
        self.index = add.sampling.sequence_index

    def fork(self, index: int) -> "_Row":
        child = object.__new__(_Row)
        child.encoded, child.num_tokens, child.num_prompt = bytearray(self.encoded), self.num_tokens, self.num_prompt
        child.first_reported = self.first_reported
        child.block_ids, child.num_computed = list(self.block_ids), self.num_computed
        child.sampling, child.index = self.sampling, index
        return child


class FakeRank:
    """One rank of a group, with its blocks' contents: the bytes of the tokens whose keys and values they would hold.

    Copies between GPU and CPU happen late: when `waits_for(copy_id)` first says False at a step's end, or when a plan waits for
    them. So who reuses a block before its copy is acknowledged gets wrong tokens.
    """

    def __init__(
        self,
        *,
        block_size: int,
        num_blocks: int,
        num_cpu_blocks: int = 0,
        rank: int = 0,
        term: int = 1,
        waits_for: Callable[[int], bool] = lambda copy_id: False,
        fails: Callable[[int], bool] = lambda copy_id: False,
        draw: Draw = draw,
        candidates: Candidates = beam_candidates,
    ) -> None:
        self._block_bytes = block_size * TOKEN_BYTES
        self.gpu = [bytearray(POISON * self._block_bytes) for _ in range(num_blocks)]
        self.cpu = [bytearray(POISON * self._block_bytes) for _ in range(num_cpu_blocks)]
        self._rank = rank
        self._term = term
        self._rows: dict[int, _Row] = {}
        self._sticky: set[int] = set()
        self._held: set[int] = set()
        self._under_way: dict[int, tuple[bool, int, int]] = {}  # by copy id: (outwards, GPU block, CPU block)
        self._waits_for = waits_for
        self._fails = fails
        self._draw = draw
        self._candidates = candidates
        self._next_step_id = 0

    def execute(self, plan: StepPlan) -> tuple[StepResult, StepAck]:
        """In the order of StepPlan's docstring."""
        assert (plan.term, plan.step_id) == (self._term, self._next_step_id), (plan.term, plan.step_id, self._next_step_id)
        self._next_step_id += 1
        self._change_rows(plan)
        contents = [(target, bytes(self.gpu[source])) for _, source, target in plan.cow]
        for (row, source, target), (_, content) in zip(plan.cow, contents, strict=True):
            table = self._rows[row].block_ids
            table[table.index(source)] = target
            self.gpu[target][:] = content
        for copy_id, gpu_block, cpu_block in plan.swap_in:
            self._under_way[copy_id] = (False, gpu_block, cpu_block)
        done: list[int] = []
        failed: list[int] = []
        for copy_id in self._under_way.keys() & plan.wait_copies:  # the others have ended, and the acknowledgement is on its way
            self._end_copy(copy_id, done, failed)
        result = self._compute(plan)
        for copy_id, gpu_block, cpu_block in plan.swap_out:
            self._under_way[copy_id] = (True, gpu_block, cpu_block)
        for copy_id in [copy_id for copy_id in self._under_way if not self._waits_for(copy_id)]:
            self._end_copy(copy_id, done, failed)
        return result, StepAck(plan.term, plan.step_id, self._rank, copies_done=tuple(done), copies_failed=tuple(failed))

    def _change_rows(self, plan: StepPlan) -> None:
        rows = self._rows
        for row in plan.remove_rows:
            del rows[row]
            self._sticky.discard(row)
            self._held.discard(row)
        for add in plan.add_rows:
            assert add.row not in rows, f"row {add.row} is taken"
            rows[add.row] = _Row(add)
        for source, target, index in plan.forks:
            assert target not in rows, f"row {target} is taken"
            rows[target] = rows[source].fork(index)
            if source in self._sticky:
                self._sticky.add(target)
        for row, token_id in zip(plan.append_rows, plan.append_ids, strict=True):
            rows[row].encoded += encode_tokens((token_id,))
            rows[row].num_tokens += 1
        for row, block_id in zip(plan.grow_rows, plan.grow_block_ids, strict=True):
            rows[row].block_ids.append(block_id)
        for row in plan.hold_rows:
            assert (row if row >= 0 else ~row) in rows
            if row >= 0:
                self._held.add(row)
            else:
                self._held.remove(~row)

    def _end_copy(self, copy_id: int, done: list[int], failed: list[int]) -> None:
        outwards, gpu_block, cpu_block = self._under_way.pop(copy_id)
        source, target = (self.gpu[gpu_block], self.cpu[cpu_block]) if outwards else (self.cpu[cpu_block], self.gpu[gpu_block])
        if self._fails(copy_id):
            target[:] = POISON * self._block_bytes
            failed.append(copy_id)
        else:
            target[:] = source
            done.append(copy_id)

    def _compute(self, plan: StepPlan) -> StepResult:
        rows = self._rows
        decoding = sorted(self._sticky - self._held)
        prompt_logprobs: list[tuple[int, Logprobs]] = []
        for index, chunk in enumerate(plan.chunks):
            row = rows[chunk.row]
            assert chunk.start == row.num_computed, chunk
            self._write(row, chunk.count)
            if row.sampling.num_prompt_logprobs is not None:
                positions = range(max(chunk.start, row.first_reported), chunk.start + chunk.count)
                values = tuple(logprob_of(row.encoded[: p * TOKEN_BYTES], p) for p in positions)
                prompt_logprobs.append((index, Logprobs(values, (1,) * len(values), ((),) * len(values), ((),) * len(values))))
        for number in decoding:
            self._write(rows[number], 1)
        counts: list[int] = []
        token_ids: list[int] = []
        beams: list[tuple[int, tuple[tuple[int, float], ...]]] = []
        logprobs: list[tuple[int, Logprobs]] = []
        for source, number in plan.samples:
            if source != number:
                assert rows[number].encoded == rows[source].encoded, "a row is sampled from another that holds other tokens"
                rows[number].num_computed = rows[source].num_computed
        for index, number in enumerate([*(row for _, row in plan.samples), *decoding]):
            row = rows[number]
            self._verify(row)
            if row.sampling.num_beam_candidates:
                num_completion = row.num_tokens - row.num_prompt
                beams.append((index, self._candidates(row.encoded, row.sampling, row.sampling.num_beam_candidates, num_completion)))
                counts.append(0)
                continue
            token_id = self._draw(row.encoded, row.sampling, row.index)
            if row.sampling.num_logprobs is not None:
                logprobs.append((index, Logprobs((logprob_of(row.encoded, token_id),), (1,), ((),), ((),))))
            row.encoded += encode_tokens((token_id,))
            row.num_tokens += 1
            counts.append(1)
            token_ids.append(token_id)
            self._sticky.add(number)
        return StepResult(
            plan.term,
            plan.step_id,
            counts=tuple(counts),
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs),
            prompt_logprobs=tuple(prompt_logprobs),
            beam_candidates=tuple(beams),
        )

    def _write(self, row: _Row, count: int) -> None:
        """Keys and values of the row's next tokens, into its blocks."""
        start, end = row.num_computed * TOKEN_BYTES, (row.num_computed + count) * TOKEN_BYTES
        assert end <= len(row.encoded), "tokens that are not known are to be computed"
        size = self._block_bytes
        while start < end:
            offset = start % size
            length = min(size - offset, end - start)
            self.gpu[row.block_ids[start // size]][offset : offset + length] = row.encoded[start : start + length]
            start += length
        row.num_computed += count

    def _verify(self, row: _Row) -> None:
        """What the next token is drawn from is in the row's blocks, not in what the row remembers."""
        assert row.num_computed == row.num_tokens, "a row is sampled before all its tokens are computed"
        held = b"".join(map(self.gpu.__getitem__, row.block_ids))
        assert held.startswith(row.encoded), "the blocks of a row do not hold its tokens"
