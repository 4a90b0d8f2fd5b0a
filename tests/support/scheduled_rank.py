"""The real scheduler and a real rank in one process, in lock step: what a request gives when blocks are scarce.

On several ranks each runs a scheduler of its own: it is pure, so all make the same plans of the same results.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from fake_ranks import hello

from quire.cluster.scheduler.scheduler import Scheduler, SchedulerConfig
from quire.common.hashing import cache_root, hash_full_blocks
from quire.common.messages import (
    PROTOCOL_VERSION,
    Accepted,
    AttachGroup,
    Failed,
    Finished,
    Hello,
    Rejected,
    SamplingState,
    SequenceStart,
    StepPlan,
    Submit,
    Tokens,
)
from quire.worker.runner import Runner

GREEDY = SamplingState(temperature=0.0)
_GATEWAY = b"gateway"
_ROOT = cache_root(model="m", adapter="", tenant_scope="t", cache_salt="")
_MAX_STEPS = 2000


@dataclass
class Outcome:
    """What came of some requests."""

    completions: list[list[list[int]]]  # by request and sequence
    num_cached_tokens: list[int] = field(default_factory=list)  # of each request's prompt
    num_preemptions: int = 0
    num_copies: Counter[str] = field(default_factory=Counter)  # blocks copied, by "out", "in", "on write"
    most_shared_blocks: int = 0  # held by more than one sequence at a time


def run_scheduled(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    sampling: SamplingState | Sequence[SamplingState] = GREEDY,
    num_sequences: int = 1,
    preemption: str = "auto",
    max_batched_tokens: int = 16,
    one_by_one: bool = False,
) -> Outcome:
    """Run requests to their ends through a scheduler with the runner's own pools; `one_by_one`: each waits for the one before."""
    scheduler = Scheduler(SchedulerConfig("s", checks_ranks=True))
    cache = runner.kv_cache
    max_rows = 8
    attach = AttachGroup(PROTOCOL_VERSION, "g0", 1, "m", 1, cache.block_size, 128, max_rows, max_batched_tokens, preemption)
    scheduler.attach(attach, 0.0)
    num_cpu_blocks = runner.swap_pool.num_blocks
    scheduler.rank_hello(hello(num_gpu_blocks=cache.num_blocks, num_cpu_blocks=num_cpu_blocks, max_rows=max_rows), 0.0)
    scheduler.hello(_GATEWAY, Hello(PROTOCOL_VERSION, "gateway"))
    states = [sampling] * len(prompts) if isinstance(sampling, SamplingState) else sampling
    waiting = deque(
        Submit(
            request_id=str(index),
            attempt=0,
            tenant="t",
            priority=2,
            model="m",
            adapter="",
            prompt_ids=tuple(prompt),
            block_hashes=tuple(hash_full_blocks(_ROOT, prompt, block_size=cache.block_size)),
            cache_root=_ROOT,
            sequences=tuple(SequenceStart(states[index].sequence_index + sequence) for sequence in range(num_sequences)),
            n=num_sequences,
            sampling=states[index],
            max_tokens=num_tokens,
            time_left_s=1000.0,
            age_s=0.0,
        )
        for index, prompt in enumerate(prompts)
    )
    outcome = Outcome([[[] for _ in range(num_sequences)] for _ in prompts], [0] * len(prompts))
    plans: deque[StepPlan] = deque()
    num_submitted = num_ended = 0
    for step in range(_MAX_STEPS):
        now_s = step * 0.01
        while waiting and (not one_by_one or num_ended == num_submitted):
            num_submitted += 1
            scheduler.submit(_GATEWAY, waiting.popleft(), now_s)
        while (plan := scheduler.next_plan("g0", now_s)) is not None:
            plans.append(plan)
            outcome.num_copies += Counter({"out": len(plan.swap_out), "in": len(plan.swap_in), "on write": len(plan.cow)})
            outcome.most_shared_blocks = max(outcome.most_shared_blocks, scheduler.groups["g0"].pool.num_shared)
        if plans:
            result, ack = runner.execute(plans.popleft())
            runner.batch.check()
            scheduler.apply("g0", result, now_s)
            scheduler.ack("g0", ack, now_s)
        scheduler.check()
        for _, message in scheduler.take_outbox().to_gateways:
            match message:
                case Accepted():
                    assert message.handle == int(message.request_id)
                case Tokens():
                    for handle, sequence, token_id in zip(message.handles, message.sequences, message.token_ids, strict=True):
                        outcome.completions[handle][sequence - states[handle].sequence_index].append(token_id)
                case Finished():
                    if message.is_last:
                        num_ended += 1
                        outcome.num_preemptions += message.num_preemptions
                        outcome.num_cached_tokens[message.handle] = message.usage.num_cached_tokens
                case Rejected() | Failed():
                    raise AssertionError(message)
        if num_ended == len(prompts) and not plans:
            assert scheduler.groups["g0"].pool.num_held == 0
            assert scheduler.groups["g0"].cpu_pool.num_held == 0
            return outcome
    raise AssertionError(f"only {num_ended} of {len(prompts)} requests ended after {_MAX_STEPS} steps")
