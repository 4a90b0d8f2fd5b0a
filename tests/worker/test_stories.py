"""Random stories of plans against a dense oracle: every sample must be what the model says of the row's tokens alone.

The oracle knows no blocks: it computes each sequence from its first token on. Blocks that nobody holds are filled with NaN
before every step, so a row that reads one block too many, too early or too late cannot go unnoticed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from plan_driver import MakeRunner
from torch import Tensor

from quire.common.messages import Chunk, Logprobs, RowAdd, SamplingState, StepPlan
from quire.common.model_folder import read_model_folder
from quire.worker.kv_cache import KvCache
from quire.worker.models.transformers_model import TransformersModel, load_transformers_model
from quire.worker.runner import Runner

BLOCK_SIZE = 4
NUM_BLOCKS = 128
NUM_CPU_BLOCKS = 24
MAX_ROWS = 6
MAX_LENGTH = 40
NUM_STEPS = 100
NUM_CANDIDATES = 3


@dataclass
class OracleSequence:
    """What the oracle knows of a sequence."""

    tokens: list[int]
    prompt_len: int
    sampling: SamplingState
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    is_decoding: bool = False
    is_held: bool = False
    candidates: tuple[tuple[int, float], ...] = ()  # of a beam that waits for its token

    @property
    def is_beam(self) -> bool:
        return self.sampling.num_beam_candidates > 0


@dataclass
class Swapped:
    """A preempted sequence whose blocks are in CPU memory; copies_out are under way."""

    sequence: OracleSequence
    cpu_blocks: list[int]


class Story:
    """One step after the other, each a random plan that a scheduler might have made; every result is checked."""

    def __init__(self, runner: Runner, model: TransformersModel, seed: int) -> None:
        self.chance = random.Random(seed)
        self.runner = runner
        self.model = model
        self.rows: dict[int, OracleSequence] = {}
        self.swapped: list[Swapped] = []
        self.returning: list[tuple[OracleSequence, list[int], list[int]]] = []  # (sequence, its copies, CPU blocks), not yet waited for
        self.free_blocks: list[int] = []  # of this step
        self.free_cpu_blocks = list(range(NUM_CPU_BLOCKS))
        self.counts = dict.fromkeys(("adds", "forks", "copies", "grows", "swaps out", "swaps in", "holds", "removals", "appends"), 0)
        self.next_copy_id = 0
        self.copies_under_way: set[int] = set()
        self.plan: dict[str, Any] = {}
        self.step_id = 0

    def step(self) -> None:
        self.plan = {}
        self._remove()
        preempted = self._preempt()
        out = [copy_id for copy_id, _, _ in self.plan.get("swap_out", ())]
        self.free_blocks = self._unused_blocks()
        self._hold()
        self._add()
        back = self._resume()
        self._fork()
        self._append()
        computed = self._compute()
        self.runner.kv_cache.blocks[self.free_blocks] = float("nan")
        result, ack = self.runner.execute(StepPlan(1, self.step_id, debug_checksum=True, **{k: tuple(v) for k, v in self.plan.items()}))
        self.runner.batch.check()
        assert ack.copies_failed == ()
        self._check_copies(out + back, ack.copies_done)
        self._check(computed, result.counts, result.token_ids, dict(result.logprobs), dict(result.beam_candidates))
        self._check_rows()
        self.swapped += preempted
        self.step_id += 1

    # -- what a plan does -------------------------------------------------------------------------------------------

    def _hold(self) -> None:
        for row, sequence in self.rows.items():
            if sequence.is_decoding and self.chance.random() < 0.15:
                sequence.is_held = not sequence.is_held
                self._do("hold_rows", row if sequence.is_held else ~row, "holds")

    def _remove(self) -> None:
        for row in list(self.rows):
            if self.chance.random() < 0.04 or len(self.rows[row].tokens) >= MAX_LENGTH - 2:
                del self.rows[row]
                self._do("remove_rows", row, "removals")

    def _preempt(self) -> list[Swapped]:
        """Swap a decoding sequence out: its row goes at once, its blocks are read behind the forward pass."""
        candidates = [row for row, sequence in self.rows.items() if sequence.is_decoding]
        if not candidates or self.chance.random() > 0.25:
            return []
        row = self.chance.choice(candidates)
        sequence = self.rows[row]
        block_ids = sequence.block_ids[: -(-sequence.num_computed // BLOCK_SIZE)]
        if len(block_ids) > len(self.free_cpu_blocks):
            return []
        del self.rows[row]
        self._do("remove_rows", row, "swaps out")
        cpu_blocks = [self.free_cpu_blocks.pop() for _ in block_ids]
        for block_id, cpu_block in zip(block_ids, cpu_blocks, strict=True):
            self._do("swap_out", (self._copy_id(), block_id, cpu_block))
        return [Swapped(replace(sequence, block_ids=[], is_decoding=False, is_held=False), cpu_blocks)]

    def _add(self) -> None:
        row = self._free_row()
        if row is None or len(self.free_blocks) < 12 or self.chance.random() > 0.5:
            return
        prompt = [self.chance.randrange(3, 4096) for _ in range(self.chance.randint(1, 17))]
        state = SamplingState(temperature=0.0, num_logprobs=0)
        kind = self.chance.random()
        if kind < 0.3:
            state = SamplingState(temperature=1.0, seed=self.chance.randrange(2**64), num_logprobs=0)
        elif kind < 0.5:
            state = SamplingState(num_beam_candidates=NUM_CANDIDATES)
        sequence = OracleSequence(prompt, len(prompt), state)
        donors = [other for other in self.rows.values() if other.num_computed >= BLOCK_SIZE]
        if donors and self.chance.random() < 0.4:  # a prefix hit: full blocks of another sequence, the last token left to compute
            donor = self.chance.choice(donors)
            num_shared = self.chance.randint(1, donor.num_computed // BLOCK_SIZE)
            sequence.tokens[:0] = donor.tokens[: num_shared * BLOCK_SIZE]
            sequence.prompt_len = len(sequence.tokens)
            sequence.num_computed = num_shared * BLOCK_SIZE
            sequence.block_ids = donor.block_ids[:num_shared]
        if len(sequence.tokens) > MAX_LENGTH - 10:
            return
        sequence.block_ids = sequence.block_ids + self._blocks(-(-len(sequence.tokens) // BLOCK_SIZE) - len(sequence.block_ids))
        self._enter(row, sequence)

    def _resume(self) -> list[int]:
        """Start to bring a sequence back, and let one whose copies were started go on; at once, or a step later."""
        started: list[int] = []
        if self.swapped and len(self.free_blocks) >= 12 and self.chance.random() < 0.5:
            swapped = self.swapped.pop(self.chance.randrange(len(self.swapped)))
            sequence = swapped.sequence
            sequence.block_ids = self._blocks(-(-len(sequence.tokens) // BLOCK_SIZE))
            copies = [(self._copy_id(), block, cpu) for block, cpu in zip(sequence.block_ids, swapped.cpu_blocks, strict=False)]
            for copy in copies:
                self._do("swap_in", copy)
            started = [copy_id for copy_id, _, _ in copies]
            self.returning.append((sequence, started, swapped.cpu_blocks))
        if self.returning and self.chance.random() < 0.7 and (row := self._free_row()) is not None:
            sequence, copies_in, cpu_blocks = self.returning.pop(0)
            for copy_id in copies_in:
                self._do("wait_copies", copy_id)
            self.counts["swaps in"] += 1
            self.free_cpu_blocks += cpu_blocks
            self._enter(row, sequence)
        return started

    def _fork(self) -> None:
        for source, sequence in list(self.rows.items()):
            row = self._free_row()
            may_fork = sequence.is_decoding or bool(sequence.candidates)
            if row is None or not may_fork or len(self.free_blocks) < 12 or self.chance.random() > 0.25:
                continue
            index = self.chance.randrange(100)
            sampling = msgspec.structs.replace(sequence.sampling, sequence_index=index)
            fork = replace(sequence, tokens=list(sequence.tokens), block_ids=list(sequence.block_ids), sampling=sampling, is_held=False)
            self.rows[row] = fork
            self._do("forks", (source, row, index), "forks")

    def _append(self) -> None:
        """Choose a token for each beam that has candidates; now and then a beam waits for a step."""
        for row, sequence in self.rows.items():
            if sequence.candidates and self.chance.random() < 0.8:
                sequence.tokens.append(self.chance.choice(sequence.candidates)[0])
                sequence.candidates = ()
                self._do("append_rows", row, "appends")
                self._do("append_ids", sequence.tokens[-1])

    def _compute(self) -> list[OracleSequence]:
        """Chunks, then the sticky rows; the sequences that are sampled, in the order of the result."""
        sampled = []
        for row in self.chance.sample(sorted(self.rows), len(self.rows)):
            sequence = self.rows[row]
            left = len(sequence.tokens) - sequence.num_computed
            if sequence.is_decoding or left == 0 or self.chance.random() < 0.2:
                continue
            count = self.chance.choice([left, left, min(left, 3), 1])
            self._make_room(row, sequence.num_computed, sequence.num_computed + count)
            is_last = count == left
            self._do("chunks", Chunk(row, sequence.num_computed, count, is_last))
            sequence.num_computed += count
            if is_last:
                self._do("samples", (row, row))
                sampled.append(sequence)
        for row in sorted(self.rows):
            sequence = self.rows[row]
            if sequence.is_decoding and not sequence.is_held:
                self._make_room(row, sequence.num_computed, sequence.num_computed + 1)
                sequence.num_computed += 1
                sampled.append(sequence)
        return sampled

    def _make_room(self, row: int, start: int, end: int) -> None:
        """Slots for tokens [start, end): new blocks behind the table, copies of those that others hold too."""
        sequence = self.rows[row]
        while len(sequence.block_ids) * BLOCK_SIZE < end:
            sequence.block_ids += self._blocks(1)
            self._do("grow_rows", row, "grows")
            self._do("grow_block_ids", sequence.block_ids[-1])
        for index in range(start // BLOCK_SIZE, -(-end // BLOCK_SIZE)):
            shared = sequence.block_ids[index]
            if sum(other.block_ids.count(shared) for other in self.rows.values()) > 1:
                (target,) = self._blocks(1)
                sequence.block_ids[index] = target
                self._do("cow", (row, shared, target), "copies")

    # -- what must come out -----------------------------------------------------------------------------------------

    def _check(
        self,
        sampled: Sequence[OracleSequence],
        counts: Sequence[int],
        token_ids: Sequence[int],
        logprobs: dict[int, Logprobs],
        candidates: dict[int, tuple[tuple[int, float], ...]],
    ) -> None:
        assert list(counts) == [0 if sequence.is_beam else 1 for sequence in sampled]
        drawn = iter(token_ids)
        for index, sequence in enumerate(sampled):
            dense = self._logprobs(sequence.tokens)
            if sequence.is_beam:
                sequence.candidates = candidates[index]
                torch.testing.assert_close(torch.tensor([p for _, p in candidates[index]]), dense.topk(NUM_CANDIDATES).values)
                assert [token_id for token_id, _ in candidates[index]] == dense.topk(NUM_CANDIDATES).indices.tolist()
                continue
            token_id = next(drawn)
            assert logprobs[index].logprobs[0] == pytest.approx(float(dense[token_id]), abs=1e-4)
            if sequence.sampling.temperature == 0:
                assert token_id == int(dense.argmax())
            sequence.tokens.append(token_id)
            sequence.is_decoding = True
        assert next(drawn, None) is None

    def _check_copies(self, started: Sequence[int], done: Sequence[int]) -> None:
        """On CPU a copy ends in the step that starts it; on a GPU whenever it does, but at the latest in the step that waits for it."""
        self.copies_under_way |= set(started)
        assert len(set(done)) == len(done), "a copy is reported again"
        assert self.copies_under_way >= set(done), "a copy is reported that is not under way"
        self.copies_under_way -= set(done)
        assert not self.copies_under_way & set(self.plan.get("wait_copies", ()))
        if self.runner.batch.device == "cpu":
            assert not self.copies_under_way
        else:  # so that the story may say what blocks hold
            torch.cuda.synchronize()

    def _check_rows(self) -> None:
        batch = self.runner.batch
        assert batch.rows.keys() == self.rows.keys()
        for row, sequence in self.rows.items():
            assert batch.rows[row].block_ids == sequence.block_ids
            assert batch.rows[row].num_computed == sequence.num_computed
            assert batch.tokens[row, : batch.rows[row].length].tolist() == sequence.tokens

    def _logprobs(self, tokens: Sequence[int]) -> Tensor:
        return self.model.own_logits(torch.tensor(tokens, device=self.runner.batch.device))[-1].log_softmax(-1).cpu()

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _do(self, name: str, value: object, counted: str = "") -> None:
        self.plan.setdefault(name, []).append(value)
        if counted:
            self.counts[counted] += 1

    def _enter(self, row: int, sequence: OracleSequence) -> None:
        self.rows[row] = sequence
        ids = tuple(sequence.tokens), tuple(sequence.block_ids)
        self._do("add_rows", RowAdd(row, ids[0], sequence.prompt_len, sequence.num_computed, ids[1], 0, sequence.sampling), "adds")

    def _unused_blocks(self) -> list[int]:
        """Blocks that no sequence holds and no copy reads, in random order."""
        used = {block_id for _, block_id, _ in self.plan.get("swap_out", ())}
        for sequence in (*self.rows.values(), *(sequence for sequence, _, _ in self.returning)):
            used.update(sequence.block_ids)
        return self.chance.sample(sorted(set(range(NUM_BLOCKS)) - used), NUM_BLOCKS - len(used))

    def _blocks(self, count: int) -> list[int]:
        return [self.free_blocks.pop() for _ in range(count)]

    def _free_row(self) -> int | None:
        free = [row for row in range(MAX_ROWS) if row not in self.rows]
        return self.chance.choice(free) if free else None

    def _copy_id(self) -> int:
        self.next_copy_id += 1
        return self.next_copy_id


@pytest.mark.parametrize("seed", range(6))
@torch.inference_mode()
def test_every_sample_of_a_random_story_is_what_the_tokens_alone_say(
    make_runner: MakeRunner, models: dict[str, TransformersModel], seed: int
) -> None:
    runner = make_runner(block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, num_cpu_blocks=NUM_CPU_BLOCKS, max_rows=MAX_ROWS)
    story = Story(runner, models["tiny"], seed)
    for _ in range(NUM_STEPS):
        story.step()
    print(f"seed {seed}: {story.counts}")
    assert all(story.counts.values()), f"a story without something proves nothing of it: {story.counts}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("seed", range(6))
@torch.inference_mode()
def test_every_sample_of_a_random_story_on_a_gpu_is_what_the_tokens_alone_say(tiny_folder: Path, seed: int) -> None:
    model = load_transformers_model(read_model_folder(tiny_folder), dtype="float32", device="cuda")
    kv_cache = KvCache(
        num_blocks=NUM_BLOCKS,
        num_layers=model.folder.num_layers,
        num_kv_heads=model.num_kv_heads,
        block_size=BLOCK_SIZE,
        head_dim=model.folder.head_dim,
        dtype=torch.float32,
        device="cuda",
    )
    runner = Runner(model, kv_cache, rank=0, max_rows=MAX_ROWS, max_model_len=200, device="cuda", num_cpu_blocks=NUM_CPU_BLOCKS)
    story = Story(runner, model, seed)
    for _ in range(NUM_STEPS):
        story.step()
    assert all(story.counts.values()), f"a story without something proves nothing of it: {story.counts}"
    assert sum(map(len, runner.swap_pool.take_ended())) == len(story.copies_under_way)
