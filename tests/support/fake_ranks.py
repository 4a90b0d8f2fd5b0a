"""Ranks in simulation: they do what a step plan says, on a model whose next token is a hash of the tokens that it reads back
from its blocks. So a wrong block table, a block given away too early, or a wrong prefix hit changes the tokens."""

import zlib
from collections.abc import Sequence

from quire.common.messages import LAYOUT_VERSION, PROTOCOL_VERSION, RankHello, SamplingState, StepPlan, StepResult

VOCAB_SIZE = 997


def next_token(token_ids: Sequence[int], sampling: SamplingState) -> int:
    """What the pretended model says after these tokens."""
    return zlib.crc32(b"%d:" % sampling.seed + b",".join(b"%d" % token_id for token_id in token_ids)) % VOCAB_SIZE


def expected_completion(prompt_ids: Sequence[int], sampling: SamplingState, *, max_tokens: int) -> list[int]:
    """The completion of a request, without any blocks: until a stop id or max_tokens."""
    token_ids = list(prompt_ids)
    while len(token_ids) < len(prompt_ids) + max_tokens:
        token_ids.append(next_token(token_ids, sampling))
        if token_ids[-1] in sampling.stop_ids and len(token_ids) - len(prompt_ids) > sampling.min_tokens:
            break
    return token_ids[len(prompt_ids) :]


def hello(group_id: str = "g0", *, term: int = 1, rank: int = 0, num_gpu_blocks: int = 16, max_rows: int = 8) -> RankHello:
    return RankHello(
        version=PROTOCOL_VERSION,
        group_id=group_id,
        term=term,
        rank=rank,
        num_gpu_blocks=num_gpu_blocks,
        num_cpu_blocks=0,
        block_bytes=1024,
        h2d_bytes_per_s=0.0,
        d2h_bytes_per_s=0.0,
        prefill_tokens_per_s=(),
        max_rows=max_rows,
        model_fingerprint="model",
        layout_version=LAYOUT_VERSION,
    )


class _Row:
    def __init__(self, token_ids: Sequence[int], block_ids: Sequence[int], num_computed: int, sampling: SamplingState) -> None:
        self.token_ids = list(token_ids)
        self.block_ids = list(block_ids)
        self.num_computed = num_computed
        self.sampling = sampling


class FakeRanks:
    """The ranks of one group."""

    def __init__(self, *, block_size: int, num_blocks: int) -> None:
        self._block_size = block_size
        self._kv: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._rows: dict[int, _Row] = {}
        self._sticky: set[int] = set()
        self._next_step_id = 0

    def execute(self, plan: StepPlan) -> StepResult:
        assert plan.step_id == self._next_step_id, (plan.step_id, self._next_step_id)
        self._next_step_id += 1
        for row in plan.remove_rows:
            del self._rows[row]
            self._sticky.discard(row)
        for add in plan.add_rows:
            assert add.row not in self._rows, f"row {add.row} is taken"
            self._rows[add.row] = _Row(add.token_ids, add.block_ids, add.num_computed, add.sampling)
        for row, block_id in zip(plan.grow_rows, plan.grow_block_ids, strict=True):
            self._rows[row].block_ids.append(block_id)
        decoding = sorted(self._sticky)
        for chunk in plan.chunks:
            assert chunk.start == self._rows[chunk.row].num_computed, chunk
            self._compute(self._rows[chunk.row], chunk.count)
        for row in decoding:
            self._compute(self._rows[row], 1)
        sampled = [target for _, target in plan.samples] + decoding
        token_ids = [self._sample(self._rows[row]) for row in sampled]
        self._sticky.update(row for _, row in plan.samples)
        return StepResult(plan.term, plan.step_id, counts=(1,) * len(sampled), token_ids=tuple(token_ids))

    def _compute(self, row: _Row, count: int) -> None:
        for position in range(row.num_computed, row.num_computed + count):
            self._kv[row.block_ids[position // self._block_size]][position % self._block_size] = row.token_ids[position]
        row.num_computed += count

    def _sample(self, row: _Row) -> int:
        """Draw from what the blocks hold, not from what the row remembers."""
        read = [self._kv[row.block_ids[p // self._block_size]][p % self._block_size] for p in range(row.num_computed)]
        assert read == row.token_ids, "the blocks of a row do not hold its tokens"
        row.token_ids.append(next_token(row.token_ids, row.sampling))
        return row.token_ids[-1]
