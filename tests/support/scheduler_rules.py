"""A scheduler that is watched: each decision is compared with its rule in docs/DESIGN.md §5, found anew in the slow and obvious way."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from quire.cluster.scheduler.group import Group
from quire.cluster.scheduler.request import Request, RequestState
from quire.cluster.scheduler.scheduler import Scheduler, SchedulerConfig
from quire.common.messages import AttachGroup, StepPlan, Submit

# The rules' numbers once more: what is watched must not come from what is watched.
HIGHEST_CLASS = 3
LOOK_AHEAD = 8
MAX_SKIPS = 8
MAX_LONG_PREFILLS = 1
PREFILL_SHARE = 1 / 8


class WatchedScheduler(Scheduler):
    """Raises AssertionError, naming the rule, at the decision that breaks it. `seen` counts what happened, for coverage."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float], *, most_plans_waited: int) -> None:
        super().__init__(config)
        self._most_plans_waited = most_plans_waited
        self._clock = clock
        self.seen: Counter[str] = Counter()
        # How often a waiting request was passed over by others of its class or a lower one, by handle.
        self._passes: Counter[int] = Counter()
        # Plans with work in them, of all groups; and how many there had been when a request began to wait, by handle.
        self.num_working_plans = 0
        self._waiting_since: dict[int, int] = {}
        self.longest_wait = 0
        self._checked: dict[str, tuple[object, ...]] = {}  # what was seen of a group when it was checked last
        self._has_preempted = False  # in the step that is planned
        self._prefilling_before: dict[str, set[int]] = {}  # sequences in prefill after the last plan, by group

    @property
    def has_messages(self) -> bool:
        return bool(self._outbox.to_gateways or self._outbox.to_controller)

    def attach(self, message: AttachGroup, now_s: float) -> None:
        super().attach(message, now_s)
        group = self.groups[message.group_id]
        if group.term == message.term:
            _watch(group, "admit", self._before_admit)
            _watch(group, "_preempt", self._before_preempt, self._after_preempt)
            _watch(group, "_swap_in", self._before_swap_in, self._after_swap_in)

    def next_plan(self, group_id: str, now_s: float) -> StepPlan | None:
        self._has_preempted = False
        plan = super().next_plan(group_id, now_s)
        group = self.groups.get(group_id)
        if group is None:
            return plan
        if plan is None:
            runs = [s for s in group.batch.decoding.values() if not s.is_planned_to_its_end]
            if runs and len(group.outstanding) < 2:
                assert self._lacks_blocks(group, runs), "plan-ahead: a row could go on, and is not planned"
            elif group.is_ready and not group.outstanding:
                assert now_s - group.last_sent_s < self.config.heartbeat_s, "an idle group hears nothing"
        else:
            self._watch_plan(group, plan)
        return plan

    def submit(self, gateway: bytes, message: Submit, now_s: float) -> None:
        accounts = self.queue._tenants
        active = [account.served for account in accounts.values() if account.num_active]
        was_active = message.tenant in accounts and accounts[message.tenant].num_active > 0
        super().submit(gateway, message, now_s)
        key = (gateway, message.request_id)
        if key in self._by_key and active and not was_active:
            assert accounts[message.tenant].served >= min(active), "S2: a tenant has saved up a right to be served alone"
        assert sum(not r.is_preempted for r in self.queue.all()) <= self.config.max_waiting_requests, "S3: the queue has no bound"

    def tick(self, now_s: float) -> None:
        super().tick(now_s)
        assert all(request.deadline_s > now_s for request in self._by_handle.values()), "S8: a request outlives its deadline"

    def _check_group(self, group: Group) -> None:
        """Check a group that something happened to since it was checked; each way of changing one shows in these numbers."""
        state = (group.num_steps_done, group._next_step_id, group.pool.num_held, group.pool.num_cached, len(group.copies))
        now = (group, state, len(group.running), len(group.swapped), len(group.batch.free_rows))
        if self._checked.get(group.group_id) != now:
            super()._check_group(group)
            self._checked[group.group_id] = now

    def check(self) -> None:
        super().check()
        now_s, ageing_s = self._clock(), self.config.ageing_s
        for request in self.queue.all():
            if request.handle not in self._waiting_since:
                self._waiting_since[request.handle] = self.num_working_plans
            if not request.is_preempted:
                level = request.submit.priority + int((now_s - request.arrival_s) / ageing_s + 1e-9)
                assert min(HIGHEST_CLASS, level) - 1 <= request.level <= level, "S2: a waiting request has not the class of its age"

    # -- S1 ---------------------------------------------------------------------------------------------------------------

    def _watch_plan(self, group: Group, plan: StepPlan) -> None:
        config = group.config
        sent = group.outstanding[-1]
        num_chunk_tokens = sum(chunk.count for chunk in plan.chunks)
        beams = sum(sequence.request.beam is not None and sequence.prefill_end - start == 1 for sequence, start in sent.chunks)
        num_prefill = num_chunk_tokens - beams
        assert all(s.num_planned < s.max_total for s in sent.sampled), "plan-ahead: a step is planned behind a known end"
        assert sent.num_decoding + num_chunk_tokens <= config.max_batched_tokens, "S1: a step with more tokens than allowed"
        for sequence, start in sent.chunks:
            if sequence.sampling.num_prompt_logprobs is None:
                blocks = sequence.block_hashes[start // config.block_size : sequence.num_planned // config.block_size]
                assert all(map(group.pool.knows, blocks)), "§4: a block of planned tokens cannot be found"
        longs = [
            chunk
            for chunk, (s, start) in zip(plan.chunks, sent.chunks, strict=True)
            if s.prefill_end - start > config.max_batched_tokens / 2
        ]
        assert len(longs) <= MAX_LONG_PREFILLS, "S1: too many long prompts at once"
        if sent.sampled or plan.chunks:
            self.num_working_plans += 1
        chunked = {id(sequence) for sequence, _ in sent.chunks}
        left_out = [s for s in group.batch.prefilling if id(s) not in chunked and s.leader is None]
        room = config.max_batched_tokens - sent.num_decoding - num_chunk_tokens
        assert room == 0 or all(chunk.is_last for chunk in plan.chunks), "S1: a prompt waits while a step has room for it"
        assert all(s.num_to_prefill > 0 for s in group.batch.prefilling), "a sequence in prefill has nothing to compute"
        left_out_short = [s for s in left_out if s.prefill_end - s.num_planned <= config.max_batched_tokens / 2]
        if left_out_short:
            assert room == 0, "S1: a prompt waits while a step has room for it"
            was_there = any(id(s) in self._prefilling_before.get(group.group_id, ()) for s in left_out_short)
            assert not was_there or num_prefill >= int(config.max_batched_tokens * PREFILL_SHARE), (
                "S1: decoding leaves prompts less than their share"
            )
        short_first = [s for s, start in sent.chunks if s.prefill_end - start <= config.max_batched_tokens / 2]
        if longs and (short_first or left_out_short) and not left_out_short and sum(c.count for c in longs) > 1:
            self.seen["a long prompt beside short ones"] += 1
        assert not (
            longs and left_out_short and sum(c.count for c in longs) > max(1, (config.max_batched_tokens - sent.num_decoding) // 2)
        ), "S1: a long prompt takes what short ones need"
        had_prompts = num_prefill > 0 or bool(self._prefilling_before.get(group.group_id))  # they may have been preempted meanwhile
        self._prefilling_before[group.group_id] = {id(s) for s in group.batch.prefilling}
        held = group.batch.held - group.batch.beam_rows
        if held:
            self.seen["held rows"] += 1
            rows = [s for row, s in group.batch.decoding.items() if row in held]
            by_share = sent.num_decoding + beams >= math.floor(config.max_batched_tokens * (1 - PREFILL_SHARE)) and had_prompts
            if sent.num_decoding or num_chunk_tokens:
                # Who was held for the prompts' share stays held when a victim makes room behind that.
                by_share |= self._has_preempted
                assert by_share or self._lacks_blocks(group, rows), "S1: a row is held though there are blocks for it"
            num_coming = _num_coming(group)
            num_waiting = _wanted(group, [s for s in rows if s.num_planned >= s.write_limit])
            can_yield = [r for r in group.running.values() if r.state is RequestState.RUNNING and r.needs_steps]
            enough = num_waiting <= num_coming + _num_unheld(group)
            assert by_share or enough or not can_yield, "S5: rows wait for blocks that do not come"
        self.seen["plans ahead"] += len(group.outstanding) == 2
        self.seen["copies on write"] += len(plan.cow)
        self.seen["forks"] += len(plan.forks)
        self.seen["plans that wait for copies"] += bool(plan.wait_copies)

    @staticmethod
    def _lacks_blocks(group: Group, sequences: list[Any]) -> bool:
        """Whether some of these sequences need a block that is not there: all others of the pool are held."""
        by_request: Counter[int] = Counter(s.handle for s in sequences if s.num_planned >= s.write_limit)
        return any(_num_unheld(group) < count for count in by_request.values())

    # -- S2, S3, S7, dispatch ----------------------------------------------------------------------------------------------

    def _before_admit(self, group: Group, request: Request, now_s: float) -> None:
        groups = [g for g in self.groups.values() if g.is_ready]
        waiting = self._in_order([*self.queue.all(), request])
        place = waiting.index(request)
        passed = waiting[:place]
        closed: set[str] = set()
        for other in passed:
            takers = [g for g in groups if g.group_id not in closed and self._takes(g, other, now_s)]
            assert other.awaits_result or not takers, "S2: a request goes before one that fits"
            if other.is_preempted or self._passes[other.handle] >= MAX_SKIPS:
                assert any(g.group_id == other.kept_by for g in groups), "S2: nothing is kept for one that was passed over often"
                closed.add(other.kept_by)
            if other.level <= request.level:
                self._passes[other.handle] += 1
                if len(groups) == 1 and len(self.groups) == 1:
                    assert self._passes[other.handle] <= MAX_SKIPS, "S2: a request is passed over too often"
        assert group.group_id not in closed, "S2: kept blocks are given to another"
        assert len(passed) <= LOOK_AHEAD, "S2: the look-ahead has no bound"
        assert not group.draining or request.group_id == group.group_id, "a draining group takes something new"
        if len(self.groups) == 1:
            others = [r for r in self.queue.all() if r.is_preempted and r.level >= request.level and not request.is_preempted]
            assert not others, "S7: something new goes before what was preempted"
        ahead = [r for r in group.swapped.values() if self._swapped_class(r, now_s) >= request.level]
        assert not ahead, "S7: something goes before what was swapped out"
        headroom = 0
        if group.running:
            headroom = max(1, group.pool.num_blocks // 100) + (len(group.running) if request.is_preempted else 0)
        num_new = self._new_blocks(group, request)
        assert num_new + headroom <= _num_unheld(group), "S3, S7: admission leaves nothing to grow"
        held = [s for row, s in group.batch.decoding.items() if row in group._draft.held and s.num_planned >= s.write_limit]
        promised = _wanted(group, held) - _num_coming(group)
        assert num_new + max(0, promised) <= _num_unheld(group), "S5: a newcomer takes blocks that held rows wait for"
        self._watch_choice(group, [g for g in groups if g.group_id not in closed], request, now_s)
        self.seen["hits"] += group.prefix_hits(request)
        self.seen["passed over"] += bool(passed)
        self._end_wait(request)
        self._passes.pop(request.handle, None)

    def _in_order(self, requests: list[Request]) -> list[Request]:
        """Waiting requests in the order in which they go."""
        accounts = self.queue._tenants
        urgent = {r.handle: (min(r.deadline_s, r.arrival_s + self.config.patience_s), r.arrival_s, r.handle) for r in requests}
        first: dict[tuple[str, int], tuple[float, float, int]] = {}  # of a tenant's new requests of a class
        for r in requests:
            if not r.is_preempted:
                lane = (r.submit.tenant, r.level)
                first[lane] = min(first.get(lane, urgent[r.handle]), urgent[r.handle])

        def place(r: Request) -> tuple[Any, ...]:
            if r.is_preempted:
                return (-r.level, 0, r.arrival_s, r.handle)
            return (-r.level, 1, accounts[r.submit.tenant].served, first[r.submit.tenant, r.level], urgent[r.handle])

        return sorted(requests, key=place)

    def _takes(self, group: Group, request: Request, now_s: float) -> bool:
        """Whether the group could take a waiting request now."""
        if any(self._swapped_class(r, now_s) >= request.level for r in group.swapped.values()):
            return False
        if group.draining and not (request.is_preempted and request.group_id == group.group_id):
            return False
        return group.has_room(request)

    def _swapped_class(self, request: Request, now_s: float) -> int:
        return min(HIGHEST_CLASS, request.level + int((now_s - request.preempted_at_s) / self.config.ageing_s))

    @staticmethod
    def _new_blocks(group: Group, request: Request) -> int:
        """Blocks that stop being available when the request is admitted, at least."""
        found = group.ledger.find(request.sequences[0])
        size = group.config.block_size
        return math.ceil(len(request.sequences[0].token_ids) / size) - len(found) + group.pool.num_unheld(found)

    def _watch_choice(self, group: Group, groups: list[Group], request: Request, now_s: float) -> None:
        able = [g for g in groups if self._takes(g, request, now_s)]
        assert group in able, "a request goes where it does not fit"
        cached = {g.group_id: g.prefix_hits(request) for g in able if not g.is_overloaded}
        best = max(cached.values(), default=0)
        if best:
            assert cached.get(group.group_id) == best, "dispatch: another group has more of the prompt"
            most = max(g.pool.num_available for g in able if cached.get(g.group_id) == best)
            assert group.pool.num_available == most, "dispatch: another group with as much of the prompt has more blocks"
        else:
            assert group.pool.num_available == max(g.pool.num_available for g in able), "dispatch: another group has more blocks"
        self.seen["choices by prefix"] += len(able) > 1 and best > 0
        self.seen["choices by blocks"] += len(able) > 1 and not best

    # -- S5, S6, S7 ---------------------------------------------------------------------------------------------------------

    def _before_preempt(self, group: Group, victim: Request, beneficiary: Request | None, now_s: float) -> None:
        candidates = [
            r
            for r in group.running.values()
            if r.state is RequestState.RUNNING and any(s.num_planned < s.max_total - 1 for s in r.sequences)
        ]
        lowest = min(r.level for r in candidates)
        latest = max((r for r in candidates if r.level == lowest), key=lambda r: (r.arrival_s, r.handle))
        assert victim is latest, "S5: the victim is not the latest arrival of the lowest class"
        if beneficiary is None:
            assert len(candidates) > 1, "S5: a preemption of the only one that runs"
            there = _num_unheld(group) + _num_coming(group)
            assert there < _wanted_soon(group, victim), "S5: a preemption though blocks are there for a while"
            self.seen["preemptions ahead"] += 1
        else:
            first = (-beneficiary.level, beneficiary.arrival_s, beneficiary.handle)
            seniors = [r for r in group.running.values() if (-r.level, r.arrival_s, r.handle) <= first]
            waiting = [s for r in seniors for s in r.sequences if s.num_planned >= s.write_limit and s.row >= 0 and s.block_table]
            assert _num_unheld(group) < _wanted(group, waiting), "S5: a preemption though blocks are there"
        saved: Counter[int] = Counter()
        for sequence in victim.sequences:
            saved.update(sequence.block_table[: math.ceil(sequence.num_planned / group.config.block_size)])
        self._fits = fits = bool(saved) and len(saved) <= group.cpu_pool.num_available
        partly = any(s.leader is not None or not s.block_table for s in victim.sequences)
        partly |= any(s.sampling.num_prompt_logprobs is not None and s.num_planned < s.num_prompt_tokens for s in victim.sequences)
        lost = sum(group.pool.ref_count(block) == count for block, count in saved.items()) * group.config.block_size
        recompute_s = group.meter.recompute_s(lost)
        swap_s = group.meter.swap_s(len(saved), backlog=len(group.copies))
        mode = group.config.preemption
        self._swap_expected = (
            fits and not partly and (mode == "swap" or (mode == "auto" and (recompute_s is None or swap_s <= recompute_s)))
        )
        assert self._swap_expected or beneficiary is not None, "S5: a victim is recomputed before anybody needs its blocks"
        self._level_before = victim.level

    def _after_preempt(self, group: Group, recompute: bool, victim: Request, *_: Any) -> None:
        self._has_preempted = True
        assert recompute != self._swap_expected, "S6: the dearer kind of preemption was chosen"
        if group.config.preemption == "auto" and self._fits and group.meter.recompute_s(1) is not None:
            self.seen[f"{'recompute' if recompute else 'swap'} was cheaper"] += 1
        kind = "recompute" if recompute else "swap"
        self.seen[f"preemptions by {kind}"] += 1
        if victim.beam:
            self.seen[f"beams preempted by {kind}"] += 1
        elif len(victim.sequences) > 1:
            self.seen[f"several sequences preempted by {kind}"] += 1
        self._waiting_since[victim.handle] = self.num_working_plans

    def _before_swap_in(self, group: Group, request: Request, now_s: float) -> None:
        assert request.transfer is None, "a request swaps in before its copies out have ended"
        assert not request.awaits_result, "a request swaps in before its last token is there"
        self._available_before = group.pool.num_available
        self._num_rows = sum(r.num_rows for r in group.running.values()) + request.num_rows - 1 if group.running else 0
        before = [
            r
            for r in group.swapped.values()
            if r.transfer is None
            and not r.awaits_result
            and (-self._swapped_class(r, now_s), r.arrival_s, r.handle)
            < (-self._swapped_class(request, now_s), request.arrival_s, request.handle)
        ]
        assert not before, "S7: a swapped request comes back before one that goes first"

    def _after_swap_in(self, group: Group, is_in: bool, request: Request, *_: Any) -> None:
        if not is_in:
            return
        self.seen["swaps in"] += 1
        if self._num_rows:
            assert group.pool.num_available >= max(1, group.pool.num_blocks // 100) + self._num_rows, "S7: nothing to grow after a swap"
        self._end_wait(request)

    def _end_wait(self, request: Request) -> None:
        num_plans = self.num_working_plans - self._waiting_since.pop(request.handle, self.num_working_plans)
        self.longest_wait = max(self.longest_wait, num_plans)
        assert num_plans <= self._most_plans_waited, f"a request waits while {num_plans} plans serve others"


def _watch(group: Group, name: str, before: Callable[..., None], after: Callable[..., None] | None = None) -> None:
    """Have the group's method watched."""
    method = getattr(group, name)

    def watched(*args: Any) -> Any:
        before(group, *args)
        result = method(*args)
        if after is not None:
            after(group, result, *args)
        return result

    setattr(group, name, watched)


def _wanted_soon(group: Group, victim: Request) -> int:
    """Blocks that those who run will lack within a block's worth of tokens; nothing if that is the victim alone."""
    size = group.config.block_size
    rows = [s for r in group.running.values() if r.state is RequestState.RUNNING for s in r.sequences if s.row >= 0 and s.block_table]
    needs = [math.ceil(min(s.num_planned + size, s.max_total - 1) / size) - len(s.block_table) for s in rows]
    has_others = any(need > 0 and s.request is not victim for need, s in zip(needs, rows, strict=True))
    return sum(max(0, need) for need in needs) if has_others else 0


def _wanted(group: Group, sequences: list[Any]) -> int:
    """Blocks that must be had before these sequences can write: new ones, and a copy for each but the last holder of a shared one."""
    size = group.config.block_size
    count = 0
    holders = dict(enumerate(group.pool._ref_counts))
    for sequence in sequences:
        place = sequence.num_planned // size
        if place == len(sequence.block_table):
            count += 1
        elif holders[sequence.block_table[place]] > 1:
            holders[sequence.block_table[place]] -= 1
            count += 1
    return count


def _num_coming(group: Group) -> int:
    """Blocks that nobody holds but copies out of them."""
    leaving = Counter(copy.gpu_block for copy in group.copies.under_way() if copy.is_out)
    return sum(group.pool.ref_count(block) == count for block, count in leaving.items())


def _num_unheld(group: Group) -> int:
    """Blocks that nobody holds: free ones and cached ones."""
    return group.pool._ref_counts.count(0)
