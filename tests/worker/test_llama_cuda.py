"""Native models on a GPU: graphs or no graphs, swapped or not, the tokens are those of the CPU."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from native_models import NATIVE_MODELS
from plan_driver import GREEDY, PlanDriver
from tiny_models import DEMO_MODEL, save_tiny_model

from quire.common.messages import Chunk, SamplingState, StepPlan
from quire.common.model_folder import ModelFolder, read_model_folder
from quire.worker.graphed_steps import GraphedSteps
from quire.worker.kv_cache import KvCache
from quire.worker.models.llama import LlamaConfig, LlamaModel, LlamaShare, LlamaWeights
from quire.worker.models.llama_weights import empty_weights, fill_at_random
from quire.worker.models.load_model import load_llama_model
from quire.worker.models.transformers_model import load_transformers_model
from quire.worker.runner import Runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

NUM_TOKENS = 12
PROMPT_LENGTHS = (1, 7, 16, 33, 2, 48, 5, 17, 64, 3, 11, 15, 31, 32, 8, 20)
# Largest difference of bfloat16 logits from those of transformers' modules in bfloat16, relative to the largest logit. Two ways
# to compute the same differ by rounding alone; seen at most: see docs/kernel_notes.md.
MAX_BF16_ERROR = 3e-2


@dataclass(frozen=True)
class Loaded:
    folder: ModelFolder
    model: LlamaModel
    prompts: list[list[int]]
    expected: list[list[int]]  # by the CPU


LoadModel = Callable[[str], Loaded]


def make_runner(model: LlamaModel, device: str, *, block_size: int = 16, num_cpu_blocks: int = 0, has_graphs: bool = True) -> Runner:
    folder = model.folder
    kv_cache = KvCache(
        num_blocks=max(64, 1024 // block_size),
        num_layers=folder.num_layers,
        num_kv_heads=model.num_kv_heads,
        block_size=block_size,
        head_dim=folder.head_dim,
        dtype=model.weights.embedding.dtype,
        device=device,
    )
    runner = Runner(
        model, kv_cache, rank=0, max_rows=16, max_model_len=128, max_batched_tokens=512, device=device, num_cpu_blocks=num_cpu_blocks
    )
    if has_graphs and device == "cuda":
        assert isinstance(runner.steps, GraphedSteps)
        runner.steps.capture()
    return runner


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> LoadModel:
    @cache
    def load_named(name: str) -> Loaded:
        if name == "built-in":
            path = DEMO_MODEL
        else:
            family, config = NATIVE_MODELS[name]
            path = save_tiny_model(tmp_path_factory.mktemp(name), family, **config)
        folder = read_model_folder(path)
        chance = random.Random(name)
        prompts = [[chance.randrange(3, folder.vocab_size) for _ in range(length)] for length in PROMPT_LENGTHS]
        on_cpu = make_runner(load_llama_model(folder, dtype="float32", device="cpu"), "cpu")
        expected = PlanDriver(on_cpu).generate(prompts, num_tokens=NUM_TOKENS, chunk=64)
        return Loaded(folder, load_llama_model(folder, dtype="float32", device="cuda"), prompts, expected)

    return load_named


@pytest.mark.parametrize(
    ("block_size", "chunk", "stagger", "has_graphs"), [(1, 7, 1, True), (16, 1, 0, True), (16, 64, 2, False), (64, 16, 1, True)]
)
@pytest.mark.parametrize("name", [*NATIVE_MODELS, "built-in"])
def test_a_crowd_draws_what_it_draws_on_cpu(
    load: LoadModel, name: str, block_size: int, chunk: int, stagger: int, has_graphs: bool
) -> None:
    loaded = load(name)
    driver = PlanDriver(make_runner(loaded.model, "cuda", block_size=block_size, has_graphs=has_graphs))
    assert driver.generate(loaded.prompts, num_tokens=NUM_TOKENS, chunk=chunk, stagger=stagger) == loaded.expected


def test_a_billion_parameters_draw_what_they_draw_on_cpu() -> None:
    """Llama 3.2 1B's shape with random weights."""
    folder = ModelFolder(
        path=Path(), model_type="llama", num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64, hidden_size=2048,
        vocab_size=128256, max_positions=8192, dtype="float32", eos_token_ids=(), generation={}, has_chat_template=False,
        fingerprint="", weight_files=(),
    )  # fmt: skip
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64, vocab_size=128256,
        max_positions=8192, norm_eps=1e-5, is_tied=True, has_qkv_bias=False, has_qk_norm=False, sliding_window=None,
        rope_theta=500000.0, rope=(("rope_type", "default"),),
    )  # fmt: skip
    share = LlamaShare(config)
    weights = {device: empty_weights(share, dtype=torch.float32, device=device) for device in ("cpu", "cuda")}
    fill_at_random(weights["cuda"], share)
    pairs = zip(all_tensors(weights["cpu"]), all_tensors(weights["cuda"]), strict=True)
    for on_cpu, on_gpu in pairs:
        on_cpu.copy_(on_gpu)
    chance = random.Random(0)
    prompts = [[chance.randrange(128256) for _ in range(length)] for length in (1, 33, 70, 16)]
    expected = PlanDriver(make_runner(LlamaModel(folder, share, weights["cpu"]), "cpu")).generate(prompts, num_tokens=6, chunk=64)
    for has_graphs in (True, False):
        runner = make_runner(LlamaModel(folder, share, weights["cuda"]), "cuda", has_graphs=has_graphs)
        assert PlanDriver(runner).generate(prompts, num_tokens=6, chunk=64) == expected


def all_tensors(weights: LlamaWeights) -> Iterator[torch.Tensor]:
    yield weights.embedding
    yield weights.final_norm
    for layer in weights.layers:
        yield from (layer.input_norm, layer.qkv, layer.output, layer.mlp_norm, layer.gate_up, layer.down)


def test_steps_launched_ahead_give_what_steps_alone_give(load: LoadModel) -> None:
    """The host is three steps ahead all the time, and rows leave and enter meanwhile."""
    loaded = load("llama")
    driver = PlanDriver(make_runner(loaded.model, "cuda", block_size=64))
    runner = driver.runner
    adds = [driver.add(row, loaded.prompts[row], room=NUM_TOKENS) for row in range(6)]
    plans = [StepPlan(1, 0, add_rows=tuple(adds[:4]), chunks=tuple(Chunk(row, 0, len(loaded.prompts[row]), True) for row in range(4)),
                      samples=tuple((row, row) for row in range(4)))]  # fmt: skip
    plans += [StepPlan(1, step) for step in range(1, 4)]
    late = tuple(Chunk(row, 0, len(loaded.prompts[row]), True) for row in (4, 5))
    plans.append(StepPlan(1, 4, remove_rows=(1,), add_rows=tuple(adds[4:]), chunks=late, samples=((4, 4), (5, 5))))
    plans += [StepPlan(1, step) for step in range(5, 12)]
    drawn: dict[int, list[int]] = {row: [] for row in range(6)}
    rows_of = [*[[0, 1, 2, 3]] * 4, [4, 5, 0, 2, 3], *[[0, 2, 3, 4, 5]] * 7]
    launched = deque(runner.launch(plan) for plan in plans[:3])
    for rows, plan in zip(rows_of, [*plans[3:], None, None, None], strict=True):
        for row, token_id in zip(rows, launched.popleft().finish()[0].token_ids, strict=True):
            drawn[row].append(token_id)
        if plan is not None:
            launched.append(runner.launch(plan))
    for row in (0, 2, 3):
        assert drawn[row] == loaded.expected[row]
    assert drawn[1] == loaded.expected[1][:4]
    for row in (4, 5):
        assert drawn[row] == loaded.expected[row][:8]


def test_seeded_rows_draw_the_same_with_and_without_graphs(load: LoadModel) -> None:
    loaded = load("qwen3")
    states = [SamplingState(temperature=0.9, top_p=(1.0, 0.9)[row % 2], top_k=(0, 20)[row // 8], seed=2**64 - 1 - row) for row in range(16)]
    runs = [
        PlanDriver(make_runner(loaded.model, "cuda", has_graphs=has_graphs)).generate(
            loaded.prompts, num_tokens=NUM_TOKENS, chunk=64, sampling=states, stagger=1
        )
        for has_graphs in (True, False)
    ]
    assert runs[0] == runs[1]
    special = [SamplingState(temperature=0.9, top_p=state.top_p, top_k=state.top_k, seed=state.seed, num_logprobs=1) for state in states]
    driver = PlanDriver(make_runner(loaded.model, "cuda"))
    assert driver.generate(loaded.prompts, num_tokens=NUM_TOKENS, chunk=64, sampling=special, stagger=1) == runs[0]


def test_a_sequence_that_was_swapped_out_and_in_goes_on(load: LoadModel) -> None:
    loaded = load("llama")
    prompt, expected = loaded.prompts[5], loaded.expected[5]
    driver = PlanDriver(make_runner(loaded.model, "cuda", block_size=4, num_cpu_blocks=40))
    added = driver.add(0, prompt, room=NUM_TOKENS)
    tokens = [driver.step(add_rows=(added,), chunks=(Chunk(0, 0, len(prompt), True),), samples=((0, 0),)).token_ids[0]]
    tokens += [driver.step().token_ids[0] for _ in range(3)]
    used = added.block_ids[: -(-(len(prompt) + 3) // 4)]
    copies = tuple((index, block, 39 - index) for index, block in enumerate(used))
    driver.step(remove_rows=(0,), swap_out=copies)
    driver.step(wait_copies=tuple(range(len(copies))))
    driver.runner.kv_cache.blocks.fill_(float("nan"))
    back = driver.blocks(4 * len(used) + NUM_TOKENS)
    moved = tuple((100 + index, back[index], 39 - index) for index in range(len(used)))
    resumed = prompt + tokens
    again = type(added)(3, tuple(resumed), len(prompt), len(resumed) - 1, back, 0, GREEDY)
    driver.runner.kv_cache.blocks[list(back[len(used) :])] = 0
    step = driver.step(
        add_rows=(again,), swap_in=moved, wait_copies=tuple(copy[0] for copy in moved),
        chunks=(Chunk(3, len(resumed) - 1, 1, True),), samples=((3, 3),),
    )  # fmt: skip
    tokens.append(step.token_ids[0])
    while len(tokens) < NUM_TOKENS:
        tokens.append(driver.step().token_ids[0])
    assert tokens == expected


@pytest.mark.parametrize("name", NATIVE_MODELS)
def test_bfloat16_logits_are_those_of_transformers_up_to_rounding(load: LoadModel, name: str) -> None:
    folder = load(name).folder
    theirs = load_transformers_model(folder, dtype="bfloat16", device="cuda")
    exact = load_transformers_model(folder, dtype="float32", device="cuda")
    native = load_llama_model(folder, dtype="bfloat16", device="cuda")
    runner = make_runner(native, "cuda")
    worst = {"ours": 0.0, "theirs": 0.0}
    for prompt in load(name).prompts:
        token_ids = torch.tensor(prompt, device="cuda")
        expected = exact.own_logits(token_ids)[-1]
        driver = PlanDriver(runner)
        driver.step(add_rows=(driver.add(0, prompt, room=2),), chunks=(Chunk(0, 0, len(prompt), True),), samples=((0, 0),))
        ours = runner.steps.last_logits(1)[0].float()  # type: ignore[union-attr]
        driver.step(remove_rows=(0,))
        for who, logits in (("ours", ours), ("theirs", theirs.own_logits(token_ids)[-1])):
            error = float((logits - expected).abs().max() / expected.abs().max())
            worst[who] = max(worst[who], error)
    print(f"{name}: {worst}")
    assert worst["ours"] <= max(MAX_BF16_ERROR, 1.5 * worst["theirs"])
