"""Minutes of a small model's life on a GPU: the real scheduler a step ahead of a real rank, with too few blocks for all."""

import random
from collections import Counter, deque

import pytest
import torch
from fake_ranks import hello
from tiny_models import DEMO_MODEL

from quire.cluster.scheduler.scheduler import Scheduler, SchedulerConfig
from quire.common.hashing import cache_root, hash_full_blocks
from quire.common.messages import (
    PROTOCOL_VERSION,
    Accepted,
    AttachGroup,
    Cancel,
    Failed,
    Finished,
    Hello,
    Rejected,
    SamplingState,
    SequenceStart,
    Submit,
    Tokens,
)
from quire.common.model_folder import read_model_folder
from quire.worker.graphed_steps import GraphedSteps
from quire.worker.kv_cache import KvCache
from quire.worker.launched_step import LaunchedStep
from quire.worker.models.load_model import load_llama_model
from quire.worker.runner import Runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

NUM_STEPS = 30_000
NUM_CANCELS = 3_000
NUM_SWAPS = 500
MAX_ROWS = 16
BLOCK_SIZE = 4
NUM_BLOCKS = 120
_ROOT = cache_root(model="m", adapter="", tenant_scope="t", cache_salt="")
_GATEWAY = b"gateway"


class Soak:
    """Requests that come, end, and are cancelled; every whole completion of a prompt must begin like every other."""

    def __init__(self, runner: Runner, *, seed: int) -> None:
        self._chance = random.Random(seed)
        self._runner = runner
        self._scheduler = Scheduler(SchedulerConfig("s"))
        attach = AttachGroup(PROTOCOL_VERSION, "g0", 1, "m", 1, BLOCK_SIZE, 128, MAX_ROWS, 64, "swap")
        self._scheduler.attach(attach, 0.0)
        self._scheduler.rank_hello(hello(num_gpu_blocks=NUM_BLOCKS, num_cpu_blocks=runner.swap_pool.num_blocks, max_rows=MAX_ROWS), 0.0)
        self._scheduler.hello(_GATEWAY, Hello(PROTOCOL_VERSION, "gateway"))
        self._prompts = [[self._chance.randrange(3, 4096) for _ in range(self._chance.randrange(1, 50))] for _ in range(40)]
        self._known: dict[int, list[int]] = {}  # by prompt: its longest completion
        self._running: dict[str, tuple[int, list[int]]] = {}  # by request: its prompt, its tokens
        self._names: dict[int, str] = {}  # by handle
        self._next_id = 0
        self._now_s = 0.0
        self._launched: deque[LaunchedStep] = deque()
        self.counts: Counter[str] = Counter()

    def turn(self, *, may_submit: bool) -> None:
        self._now_s += 0.002
        while may_submit and len(self._running) < 24:
            self._submit()
        if self._running and may_submit and self._chance.random() < 0.12:
            request_id = self._chance.choice(list(self._running))
            self._scheduler.cancel(_GATEWAY, Cancel(request_id, 0, None, "a test"))
            del self._running[request_id]
            self.counts["cancels"] += 1
        while (plan := self._scheduler.next_plan("g0", self._now_s)) is not None:
            self.counts["swapped blocks"] += len(plan.swap_out)
            self._launched.append(self._runner.launch(plan))
        if self._launched:
            result, ack = self._launched.popleft().finish()
            self._scheduler.apply("g0", result, self._now_s)
            self._scheduler.ack("g0", ack, self._now_s)
            self.counts["steps"] += 1
        self._scheduler.tick(self._now_s)
        self._receive()

    @property
    def is_idle(self) -> bool:
        return not self._running and not self._launched

    def check_free(self) -> None:
        self._scheduler.check()
        self._runner.batch.check()
        assert self._scheduler.groups["g0"].pool.num_held == 0
        assert self._scheduler.groups["g0"].cpu_pool.num_held == 0

    def _submit(self) -> None:
        index = self._chance.randrange(len(self._prompts))
        request_id = str(self._next_id)
        self._next_id += 1
        self._running[request_id] = index, []
        prompt = self._prompts[index]
        self._scheduler.submit(
            _GATEWAY,
            Submit(
                request_id, 0, "t", 2, "m", "", tuple(prompt), tuple(hash_full_blocks(_ROOT, prompt, block_size=BLOCK_SIZE)), _ROOT,
                (SequenceStart(0),), 1, SamplingState(temperature=0.0), self._chance.randrange(1, 60), 1000.0, 0.0,
            ),
            self._now_s,
        )  # fmt: skip

    def _receive(self) -> None:
        for _, message in self._scheduler.take_outbox().to_gateways:
            match message:
                case Accepted():
                    self._names[message.handle] = message.request_id
                case Tokens():
                    for handle, token_id in zip(message.handles, message.token_ids, strict=True):
                        if self._names[handle] in self._running:
                            self._running[self._names[handle]][1].append(token_id)
                case Finished():
                    self.counts["preemptions"] += message.num_preemptions
                    if self._names[message.handle] in self._running:
                        self._compare(*self._running.pop(self._names[message.handle]))
                case Rejected() | Failed():
                    raise AssertionError(message)

    def _compare(self, prompt: int, token_ids: list[int]) -> None:
        known = self._known.setdefault(prompt, token_ids)
        shorter, longer = sorted((known, token_ids), key=len)
        assert longer[: len(shorter)] == shorter, (prompt, self.counts)
        self._known[prompt] = longer
        self.counts["completions"] += 1


def test_after_thousands_of_cancels_and_swaps_every_block_is_free() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = load_llama_model(read_model_folder(DEMO_MODEL), dtype="float32", device="cuda")
    folder = model.folder
    kv_cache = KvCache(
        num_blocks=NUM_BLOCKS,
        num_layers=folder.num_layers,
        num_kv_heads=model.num_kv_heads,
        block_size=BLOCK_SIZE,
        head_dim=folder.head_dim,
        dtype=torch.float32,
        device="cuda",
    )
    runner = Runner(model, kv_cache, rank=0, max_rows=MAX_ROWS, max_model_len=128, max_batched_tokens=64, device="cuda", num_cpu_blocks=200)
    assert isinstance(runner.steps, GraphedSteps)
    runner.steps.capture()
    soak = Soak(runner, seed=1)
    allocated = 0
    while soak.counts["steps"] < NUM_STEPS:
        soak.turn(may_submit=True)
        if soak.counts["steps"] == NUM_STEPS // 10:
            allocated = torch.cuda.memory_allocated()
    while not soak.is_idle:
        soak.turn(may_submit=False)
    print(soak.counts)
    soak.check_free()
    assert soak.counts["cancels"] >= NUM_CANCELS
    assert soak.counts["swapped blocks"] >= NUM_SWAPS
    assert soak.counts["completions"] >= 1000
    assert torch.cuda.memory_allocated() <= allocated + 2**20
