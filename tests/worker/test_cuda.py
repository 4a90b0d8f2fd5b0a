"""A rank on a GPU: its tokens are those of the CPU, its copies lose no bit."""

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_driver import GREEDY, PlanDriver
from tiny_families import FAMILIES
from tiny_models import save_tiny_model

from quire.common.errors import ConfigError, InternalError
from quire.common.messages import Chunk, RowAdd, SamplingState, StepPlan
from quire.common.model_folder import ModelFolder, read_model_folder
from quire.worker import cuda_swap_pool, host_link, rank_process
from quire.worker.cuda_swap_pool import CudaSwapPool
from quire.worker.device_tensor import device_tensor
from quire.worker.gpu_memory import MARGIN_BYTES
from quire.worker.host_copy import HostCopy
from quire.worker.kv_cache import KvCache
from quire.worker.models.load_model import DTYPES
from quire.worker.models.self_check import check_model
from quire.worker.models.transformers_model import TransformersModel, load_transformers_model
from quire.worker.rank_spec import RankSpec
from quire.worker.runner import Runner
from quire.worker.warm_up import measure_prefill, measure_step_bytes, touch_decodes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

MODELS = ("llama", "gemma2", "gpt_oss", "qwen3")
NUM_TOKENS = 12
PROMPT_LENGTHS = (1, 7, 16, 33, 2, 48, 5, 17, 64, 3, 11, 15, 31, 32, 8, 20)
SAMPLED = SamplingState(temperature=1.0, top_p=0.9, top_k=20, seed=2**64 - 3)


@dataclass(frozen=True)
class Loaded:
    """A model on both devices, and what the CPU says."""

    folder: ModelFolder
    models: dict[str, TransformersModel]  # by device
    prompts: list[list[int]]
    expected: list[list[int]]

    def runner(self, device: str = "cuda", *, block_size: int = 16, num_cpu_blocks: int = 0) -> Runner:
        return make_runner(self.models[device], device, block_size=block_size, num_cpu_blocks=num_cpu_blocks)


LoadModel = Callable[[str], Loaded]


def make_runner(model: TransformersModel, device: str, *, dtype: str = "float32", block_size: int = 16, num_cpu_blocks: int = 0) -> Runner:
    folder = model.folder
    kv_cache = KvCache(
        num_blocks=max(64, 1024 // block_size),
        num_layers=folder.num_layers,
        num_kv_heads=model.num_kv_heads,
        block_size=block_size,
        head_dim=folder.head_dim,
        dtype=DTYPES[dtype],
        device=device,
    )
    return Runner(model, kv_cache, rank=0, max_rows=len(PROMPT_LENGTHS), max_model_len=128, device=device, num_cpu_blocks=num_cpu_blocks)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def empty_gpu() -> None:
    """Pools of the tests before are given back: a rank counts what is free when it starts."""
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> LoadModel:
    @cache
    def load_named(name: str) -> Loaded:
        family, config = FAMILIES[name]
        folder = read_model_folder(save_tiny_model(tmp_path_factory.mktemp(name), family, **config))
        models = {device: load_transformers_model(folder, dtype="float32", device=device) for device in ("cpu", "cuda")}
        chance = random.Random(name)
        prompts = [[chance.randrange(3, folder.vocab_size) for _ in range(length)] for length in PROMPT_LENGTHS]
        runner = make_runner(models["cpu"], "cpu")
        expected = PlanDriver(runner).generate(prompts, num_tokens=NUM_TOKENS, chunk=64)
        return Loaded(folder, models, prompts, expected)

    return load_named


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block_size", "chunk", "stagger"), [(1, 7, 1), (16, 1, 0), (16, 64, 2), (64, 16, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_a_crowd_draws_what_it_draws_on_cpu(load: LoadModel, name: str, block_size: int, chunk: int, stagger: int) -> None:
    loaded = load(name)
    driver = PlanDriver(loaded.runner(block_size=block_size))
    assert driver.generate(loaded.prompts, num_tokens=NUM_TOKENS, chunk=chunk, stagger=stagger) == loaded.expected


@pytest.mark.parametrize(("index", "chunk"), [(0, 64), (3, 7), (8, 16), (8, 64)])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_alone_draws_what_it_draws_on_cpu(load: LoadModel, name: str, index: int, chunk: int) -> None:
    loaded = load(name)
    tokens = PlanDriver(loaded.runner()).generate([loaded.prompts[index]], num_tokens=NUM_TOKENS, chunk=chunk)
    assert tokens == [loaded.expected[index]]


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_that_is_computed_already_is_shared(load: LoadModel, name: str) -> None:
    loaded = load(name)
    prompt, expected = loaded.prompts[3], loaded.expected[3]
    driver = PlanDriver(loaded.runner(block_size=4))
    first = driver.add(0, prompt, room=NUM_TOKENS)
    driver.step(add_rows=(first,), chunks=(Chunk(0, 0, len(prompt), True),), samples=((0, 0),))
    second = RowAdd(1, tuple(prompt), len(prompt), 16, first.block_ids[:4] + driver.blocks(17 + NUM_TOKENS), 0, GREEDY)
    result = driver.step(remove_rows=(0,), add_rows=(second,), chunks=(Chunk(1, 16, 17, True),), samples=((1, 1),))
    assert go_on(driver, result.token_ids) == expected


@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_that_was_swapped_out_and_in_goes_on(load: LoadModel, name: str) -> None:
    """In the midst of others, which go on; what its blocks held on the device is destroyed meanwhile."""
    loaded = load(name)
    prompt, expected = loaded.prompts[5], loaded.expected[5]
    driver = PlanDriver(loaded.runner(block_size=4, num_cpu_blocks=40))
    other = driver.add(1, loaded.prompts[2], room=3 * NUM_TOKENS)
    added = driver.add(0, prompt, room=NUM_TOKENS)
    chunks = (Chunk(0, 0, len(prompt), True), Chunk(1, 0, 16, True))
    tokens = [driver.step(add_rows=(added, other), chunks=chunks, samples=((0, 0), (1, 1))).token_ids[0]]
    tokens += [driver.step().token_ids[0] for _ in range(3)]
    num_computed = len(prompt) + 3
    used = added.block_ids[: -(-num_computed // 4)]
    cpu_blocks = random.Random(1).sample(range(40), len(used))
    copies = tuple((index, block, cpu) for index, (block, cpu) in enumerate(zip(used, cpu_blocks, strict=True)))
    driver.step(remove_rows=(0,), swap_out=copies)
    assert driver.last_ack is not None
    ended = list(driver.last_ack.copies_done)
    driver.step(wait_copies=tuple(range(len(copies))))
    ended += driver.last_ack.copies_done
    assert sorted(ended) == list(range(len(copies))), "a step's ack has what it waited for"
    driver.runner.kv_cache.blocks[list(added.block_ids)] = float("nan")
    block_ids = driver.blocks(len(prompt) + NUM_TOKENS)
    back = tuple((100 + index, block, cpu) for index, (block, cpu) in enumerate(zip(block_ids, cpu_blocks, strict=False)))
    whole = (*prompt, *tokens)
    result = driver.step(
        swap_in=back,
        wait_copies=tuple(copy_id for copy_id, _, _ in back),
        add_rows=(RowAdd(0, whole, len(prompt), num_computed, block_ids, 0, GREEDY),),
        chunks=(Chunk(0, num_computed, 1, True),),
        samples=((0, 0),),
    )
    assert sorted(driver.last_ack.copies_done) == [copy_id for copy_id, _, _ in back]
    tokens.append(result.token_ids[0])
    while len(tokens) < NUM_TOKENS:
        tokens.append(driver.step().token_ids[0])
    assert tokens == expected


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_several_completions_of_one_prompt_share_its_blocks(load: LoadModel, name: str, sampling: SamplingState) -> None:
    loaded = load(name)
    prompt = loaded.prompts[7]  # 17 tokens, so that the last block is shared and must be copied

    def draw(device: str) -> list[list[int]]:
        driver = PlanDriver(loaded.runner(device, block_size=4))
        added = driver.add(0, prompt, sampling)
        samples = ((0, 0), (0, 1), (0, 2))
        columns = [
            driver.step(add_rows=(added,), forks=((0, 1, 1), (0, 2, 2)), chunks=(Chunk(0, 0, 17, True),), samples=samples).token_ids,
            driver.step(cow=tuple((row, added.block_ids[4], driver.blocks(1)[0]) for row in (1, 2))).token_ids,
        ]
        for position in range(18, 16 + NUM_TOKENS):
            grown = driver.blocks(12) if position % 4 == 0 else ()
            columns.append(driver.step(grow_rows=(0, 1, 2) if grown else (), grow_block_ids=grown).token_ids)
        return [list(tokens) for tokens in zip(*columns, strict=True)]

    drawn = draw("cuda")
    assert drawn == draw("cpu")
    if sampling is GREEDY:
        assert drawn == [loaded.expected[7]] * 3


def go_on(driver: PlanDriver, first: Sequence[int]) -> list[int]:
    tokens = list(first)
    while len(tokens) < NUM_TOKENS:
        tokens += driver.step().token_ids
    return tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [*MODELS, "mistral", "mixtral", "gemma3", "gpt2", "opt", "phi3"])
def test_families_pass_their_check_on_the_gpu(tmp_path: Path, name: str, dtype: str) -> None:
    family, config = FAMILIES[name]
    model = load_transformers_model(read_model_folder(save_tiny_model(tmp_path, family, **config)), dtype=dtype, device="cuda")
    check_model(model, dtype=dtype, device="cuda", max_model_len=256)


def test_a_rank_warms_up_and_measures_itself(load: LoadModel) -> None:
    loaded = load("llama")
    runner = loaded.runner(num_cpu_blocks=64)
    touch_decodes(runner, max_rows=len(PROMPT_LENGTHS))
    speeds = measure_prefill(runner, max_tokens=127)
    assert [length for length, _ in speeds] == [64]
    assert all(speed > 0 for _, speed in (*speeds, *enumerate(runner.swap_pool.measure())))
    assert PlanDriver(runner).generate(loaded.prompts, num_tokens=NUM_TOKENS, chunk=16) == loaded.expected
    step_bytes = measure_step_bytes(
        loaded.models["cuda"], block_size=16, max_rows=8, max_tokens=200, max_model_len=128, dtype=torch.float32, device="cuda"
    )
    assert 8 * 513 * 4 < step_bytes < 2**28


def rank_spec(folder: ModelFolder, **changes: Any) -> RankSpec:
    return RankSpec(
        group_id="g", term=1, rank=0, tensor_parallel_size=1, model_path=str(folder.path), device="cuda", dtype="bfloat16",
        num_cpu_blocks=64, block_size=16, max_model_len=200, max_sequences=8, max_batched_tokens=256, scheduler_address="",
        rank_lease_s=30.0, num_threads=1, log_level="info", report_path="", **changes,
    )  # fmt: skip


@pytest.mark.usefixtures("empty_gpu")
def test_a_rank_that_is_told_nothing_takes_what_the_gpu_has_left(load: LoadModel) -> None:
    """Needs the GPU for itself."""
    free_bytes = torch.cuda.mem_get_info()[0]
    with ExitStack() as at_end:
        runner, hello, _ = rank_process._load(rank_spec(load("llama").folder, num_gpu_blocks=None), at_end)
    assert free_bytes - 4 * 2**30 < hello.num_gpu_blocks * hello.block_bytes < free_bytes - MARGIN_BYTES
    assert hello.num_gpu_blocks == runner.kv_cache.num_blocks
    assert (hello.num_cpu_blocks, hello.device) == (64, "cuda")
    assert min(hello.h2d_bytes_per_s, hello.d2h_bytes_per_s) > 0
    assert [length for length, _ in hello.prefill_tokens_per_s] == [64]
    # The last block of the pool is as good as the first.
    block_ids = (hello.num_gpu_blocks - 1, 0)
    added = RowAdd(0, tuple(range(3, 23)), 20, 0, block_ids, 0, GREEDY)
    result, _ = runner.execute(StepPlan(1, 0, add_rows=(added,), chunks=(Chunk(0, 0, 20, True),), samples=((0, 0),)))
    assert result.counts == (1,)


@pytest.mark.usefixtures("empty_gpu")
def test_a_rank_takes_as_many_blocks_as_it_is_told_or_says_why_not(load: LoadModel) -> None:
    folder = load("llama").folder
    with ExitStack() as at_end:
        _, hello, _ = rank_process._load(rank_spec(folder, num_gpu_blocks=77), at_end)
        assert hello.num_gpu_blocks == 77
        with pytest.raises(ConfigError, match=r"1000000000 KV blocks of 4096 bytes .* and the GPU has .* GiB free, room for \d+ blocks"):
            rank_process._load(rank_spec(folder, num_gpu_blocks=10**9), at_end)


# -- swap -------------------------------------------------------------------------------------------------------------


def kv_cache_of(dtype: torch.dtype = torch.bfloat16, num_blocks: int = 24) -> KvCache:
    return KvCache(num_blocks=num_blocks, num_layers=3, num_kv_heads=2, block_size=4, head_dim=8, dtype=dtype, device="cuda")


def fill_with_random_bytes(kv_cache: KvCache) -> torch.Tensor:
    """Any pattern of bits, NaN of all kinds among them; the same on the host."""
    flat = kv_cache.blocks.view(torch.uint8)
    flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    return flat.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slab_blocks", [1, 5, 100])
def test_swapped_blocks_come_back_byte_for_byte(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, slab_blocks: int) -> None:
    """Neighbours, which share a transfer inside a slab, and scattered blocks."""
    kv_cache = kv_cache_of(dtype)
    monkeypatch.setattr(cuda_swap_pool, "SLAB_BYTES", slab_blocks * kv_cache.block_bytes)
    before = fill_with_random_bytes(kv_cache)
    pool = CudaSwapPool(kv_cache, num_blocks=16)
    assert pool.num_blocks == 16
    moves = [(0, 3), (1, 4), (2, 5), (3, 6), (9, 0), (7, 15), (6, 14), (20, 1), (21, 2)]
    pool.start_out([(index, *move) for index, move in enumerate(moves)])
    pool.wait(range(len(moves)))
    torch.cuda.current_stream().synchronize()  # it is this stream that waited
    assert pool.take_ended() == (tuple(range(len(moves))), ())
    kv_cache.blocks.view(torch.uint8).fill_(0)
    targets = random.Random(0).sample(range(24), len(moves))
    pool.start_in([(50 + index, target, cpu) for index, (target, (_, cpu)) in enumerate(zip(targets, moves, strict=True))])
    pool.wait(range(50, 50 + len(moves)))
    after = kv_cache.blocks.view(torch.uint8).cpu()  # on the stream that waits
    for target, (source, _) in zip(targets, moves, strict=True):
        assert torch.equal(after[target], before[source])
    assert pool.take_ended() == (tuple(range(50, 50 + len(moves))), ())
    assert pool.take_ended() == ((), ())


def test_a_copy_is_named_once_it_has_ended_and_nobody_is_kept_waiting() -> None:
    kv_cache = kv_cache_of()
    pool = CudaSwapPool(kv_cache, num_blocks=4)
    torch.cuda._sleep(200_000_000)  # a tenth of a second on the stream that computes, behind which the copy runs
    pool.start_out([(1, 0, 0)])
    assert pool.take_ended() == ((), ())
    with pytest.raises(InternalError, match="copy 1 is started while"):
        pool.start_in([(1, 1, 1)])
    pool.wait((1,))
    assert pool.take_ended() == ((), ())  # what is launched from now on waits, the host does not
    torch.cuda.current_stream().synchronize()
    assert pool.take_ended() == ((1,), ())
    for copy in ((3, 24, 0), (3, 0, 4)):
        with pytest.raises(InternalError, match="copy 3 is between"):
            pool.start_out([copy])


def test_what_a_step_exchanges_with_the_host_does_not_wait_for_blocks_on_their_way() -> None:
    """The blocks take 11 ms each way, which a copy engine would have behind it before anything that is asked for later."""
    kv_cache = KvCache(num_blocks=64, num_layers=32, num_kv_heads=8, block_size=64, head_dim=128, dtype=torch.bfloat16, device="cuda")
    pool = CudaSwapPool(kv_cache, num_blocks=128)
    host_link.touch(torch.device("cuda"))
    sent, fetched = device_tensor(range(5000), device="cuda"), HostCopy(torch.arange(77, device="cuda"))  # memory of these sizes is pinned
    torch.cuda.synchronize()
    pool.start_in([(index, index, index) for index in range(64)])
    pool.start_out([(64 + index, index, 64 + index) for index in range(64)])
    sent = device_tensor(range(5000), device="cuda")
    fetched = HostCopy(sent[100:200])
    torch.cuda.current_stream().synchronize()
    done, failed = pool.take_ended()
    assert fetched.tolist() == list(range(100, 200))
    assert failed == ()
    assert 63 not in done, "the last block in"
    assert 127 not in done, "the last block out"
    pool.clear()


def test_pinned_memory_is_not_given_out_again_before_a_kernel_has_read_it() -> None:
    pool = CudaSwapPool(kv_cache_of(), num_blocks=4)
    host_link.touch(torch.device("cuda"))
    torch.cuda._sleep(200_000_000)  # a tenth of a second on the stream that computes, behind which the block leaves
    pool.start_out([(1, 0, 0)])
    sent = [device_tensor([number] * 1000, device="cuda") for number in range(20)]
    fetched = [HostCopy(tensor) for tensor in sent]
    assert pool.take_ended() == ((), ()), "until here kernels were asked, and none has run"
    torch.cuda.current_stream().synchronize()
    assert [copy.tolist() for copy in fetched] == [[number] * 1000 for number in range(20)]


def test_a_copy_out_reads_what_was_computed_before_it() -> None:
    kv_cache = kv_cache_of()
    pool = CudaSwapPool(kv_cache, num_blocks=1)
    torch.cuda._sleep(100_000_000)
    kv_cache.blocks[5] = 3.0
    pool.start_out([(1, 5, 0)])
    pool.start_in([(2, 6, 0)])
    pool.clear()
    pool.start_in([(3, 7, 0)])
    pool.wait((3,))
    assert bool((kv_cache.blocks[7] == 3).all())


def test_memory_that_cannot_be_pinned_makes_the_pool_smaller(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    kv_cache = kv_cache_of()
    monkeypatch.setattr(cuda_swap_pool, "SLAB_BYTES", 5 * kv_cache.block_bytes)
    cpu_pool = kv_cache.cpu_pool
    made: list[int] = []

    def pin(num_blocks: int) -> KvCache:
        if len(made) == 2:
            raise RuntimeError("CUDA error: out of memory")
        made.append(num_blocks)
        return cpu_pool(num_blocks)

    monkeypatch.setattr(kv_cache, "cpu_pool", pin)
    assert CudaSwapPool(kv_cache, num_blocks=12).num_blocks == 10
    assert "the swap pool has 10 blocks instead of 12: no more memory can be pinned (CUDA error: out of memory)" in caplog.text
    made.clear()
    monkeypatch.setattr(cuda_swap_pool, "available_memory_bytes", lambda: 2**30)
    assert CudaSwapPool(kv_cache, num_blocks=12).num_blocks == 0
    assert "1 GiB are left to the rest of the host" in caplog.text
