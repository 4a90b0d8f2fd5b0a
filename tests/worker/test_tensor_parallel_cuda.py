"""Two ranks with a GPU each draw what one rank draws on CPU, and have the same numbers to the last bit."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from native_models import NATIVE_MODELS
from plan_driver import PlanDriver
from tiny_families import FAMILIES
from tiny_models import DEMO_MODEL, save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from quire.common.messages import SamplingState
from quire.common.model_folder import ModelFolder, read_model_folder
from quire.kernels.linear_tiles import few_rows_tile
from quire.worker.kv_cache import KvCache
from quire.worker.models.load_model import load_model
from quire.worker.runner import Runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")]

SIZE = 2
NUM_TOKENS = 12
PROMPT_LENGTHS = (1, 7, 16, 33, 2, 48, 5, 17, 64, 3, 11, 15, 31, 32, 8, 20)
# As of one rank in test_llama_cuda.py.
MAX_BF16_ERROR = 3e-2
# Of a larger model: how much further from float32 than transformers' own bfloat16 logits.
MAX_BF16_ERROR_RATIO = 1.5
_TIMEOUT_S = 200
_RANK = Path(__file__).resolve().parents[1] / "support/gpu_rank.py"


def run(**how: Any) -> dict[str, Any]:
    return {"block_size": 16, "chunk": 64, "stagger": 0, "has_graphs": True, "sampling": None, **how}


RUNS = (run(block_size=1, chunk=7, stagger=1), run(stagger=2, has_graphs=False), run(chunk=1))


def on_two_gpus(folder: Path, at: Path, **job: Any) -> list[dict[str, Any]]:
    """What each rank found."""
    job = {
        "folder": str(folder),
        "dtype": "float32",
        "backend": "auto",
        "prompts": [],
        "num_tokens": NUM_TOKENS,
        "runs": [],
        "logits_of": [],
        **job,
    }
    (at / "job.json").write_text(json.dumps(job))
    processes = []
    for rank in range(SIZE):
        command = [
            sys.executable,
            "-P",
            str(_RANK),
            str(at / "store"),
            str(rank),
            str(SIZE),
            str(at / "job.json"),
            str(at / f"{rank}.json"),
        ]
        visible = ",".join(str((rank + step) % SIZE) for step in range(SIZE))
        processes.append(subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": visible}))
    try:
        codes = [process.wait(_TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * SIZE
    return [json.loads((at / f"{rank}.json").read_text()) for rank in range(SIZE)]


@torch.inference_mode()
def on_cpu(
    folder: ModelFolder, prompts: list[list[int]], *, sampling: list[SamplingState] | None = None, num_tokens: int = NUM_TOKENS
) -> list[list[int]]:
    """What one rank draws there."""
    model = load_model(folder, dtype="float32", device="cpu", backend="auto")
    kv_cache = KvCache(
        num_blocks=128, num_layers=folder.num_layers, num_kv_heads=folder.num_kv_heads, block_size=16, head_dim=folder.head_dim,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    runner = Runner(model, kv_cache, rank=0, max_rows=16, max_model_len=128, max_batched_tokens=512, device="cpu")
    return PlanDriver(runner).generate(prompts, num_tokens=num_tokens, chunk=64, sampling=sampling)


def make_prompts(folder: ModelFolder) -> list[list[int]]:
    chance = random.Random(folder.model_type)
    return [[chance.randrange(3, folder.vocab_size) for _ in range(length)] for length in PROMPT_LENGTHS]


@pytest.mark.parametrize("name", ["built-in", "llama", "tied", "mistral", "qwen2", "qwen3"])
def test_a_crowd_draws_what_it_draws_on_cpu(tmp_path: Path, name: str) -> None:
    path = DEMO_MODEL
    if name != "built-in":
        family, config = NATIVE_MODELS[name]
        path = save_tiny_model(tmp_path / "model", family, **config)
    folder = read_model_folder(path)
    prompts = make_prompts(folder)
    states = [SamplingState(temperature=0.9, top_p=(1.0, 0.9)[row % 2], top_k=(0, 20)[row // 8], seed=row) for row in range(len(prompts))]
    seeded = run(sampling=[msgspec.structs.asdict(state) for state in states])
    ranks = on_two_gpus(path, tmp_path, prompts=prompts, runs=[*RUNS, seeded, {**seeded, "has_graphs": False}])
    assert ranks[0] == ranks[1]
    expected = on_cpu(folder, prompts)
    assert ranks[0]["drawn"][:3] == [expected] * 3
    assert ranks[0]["drawn"][3:] == [on_cpu(folder, prompts, sampling=states)] * 2


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi3"])
def test_other_families_are_split_as_well(tmp_path: Path, name: str) -> None:
    family, config = FAMILIES[name]
    folder = read_model_folder(save_tiny_model(tmp_path / "model", family, **config))
    prompts = make_prompts(folder)
    ranks = on_two_gpus(folder.path, tmp_path, prompts=prompts, runs=RUNS[:1])
    assert ranks[0] == ranks[1]
    assert ranks[0]["drawn"] == [on_cpu(folder, prompts)]


def save_random_model(path: Path, config: Any, *, dtype: torch.dtype) -> Any:
    """A model of transformers' on the GPU, with random weights, and its folder, with a tokenizer."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_MODEL / name, path / name)
    return model


def test_a_billion_parameters_draw_what_they_draw_on_cpu(tmp_path: Path) -> None:
    """Llama 3.2 1B's shape with random weights, and its logits in bfloat16."""
    config = AutoConfig.for_model(
        "llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = save_random_model(tmp_path / "model", config, dtype=torch.float32)
    chance = random.Random(0)
    prompts = [[chance.randrange(128256) for _ in range(length)] for length in (1, 33, 70, 16)]
    with torch.inference_mode():
        prompt = torch.tensor([prompts[2]], device="cuda")
        exact_logits = model(prompt).logits[0, -1].cpu()
        rounded_logits = model.bfloat16()(prompt).logits[0, -1].float().cpu()
    del model
    torch.cuda.empty_cache()
    folder = read_model_folder(tmp_path / "model")
    expected = on_cpu(folder, prompts, num_tokens=6)
    ranks = on_two_gpus(folder.path, tmp_path, prompts=prompts, num_tokens=6, runs=RUNS[:2])
    assert ranks[0] == ranks[1]
    assert ranks[0]["drawn"] == [expected] * 2
    (tmp_path / "16 bits").mkdir()
    ranks = on_two_gpus(
        folder.path, tmp_path / "16 bits", dtype="bfloat16", prompts=prompts, num_tokens=6, runs=RUNS[:1], logits_of=prompts[2]
    )
    assert ranks[0] == ranks[1]
    logits = torch.tensor(ranks[0]["logits"])
    assert float((logits - exact_logits).abs().max()) < MAX_BF16_ERROR_RATIO * float((rounded_logits - exact_logits).abs().max())


def test_layers_of_seventy_billion_parameters_compute_few_rows_right(tmp_path: Path) -> None:
    """Two layers of Llama 3 70B's widths, whose ranks take our kernel for few rows: prompts of up to 64 rows a step, and decodes of 8.

    Rounded logits may draw another token than exact ones, but none whose exact logit is lower by more than their two errors. Of two
    layers, since behind the last one's attention a step goes on with the rows that it samples alone.
    """
    config = AutoConfig.for_model(
        "llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=2, num_attention_heads=64, num_key_value_heads=8,
        head_dim=128, vocab_size=4096, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    assert torch.cuda.get_device_capability()[0] == 9, "the tile is for Hopper"
    for num_columns, num_inputs in ((5120, 8192), (8192, 4096), (8192, 14336)):
        assert few_rows_tile(num_rows=32, num_columns=num_columns, num_inputs=num_inputs) is not None
    model = save_random_model(tmp_path / "model", config, dtype=torch.bfloat16)
    chance = random.Random(0)
    prompts = [[chance.randrange(4096) for _ in range(length)] for length in (14, 3, 30, 7, 20, 50, 5, 17)]
    ranks = on_two_gpus(tmp_path / "model", tmp_path, dtype="bfloat16", prompts=prompts, runs=[run(stagger=1)], logits_of=prompts[2])
    assert ranks[0] == ranks[1]
    exact = model.float()

    def exact_logits(token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = exact(torch.tensor([token_ids], device="cuda")).logits[0].cpu()
        return logits

    expected = exact_logits(prompts[2])[-1]
    assert float((torch.tensor(ranks[0]["logits"]) - expected).abs().max() / expected.abs().max()) < MAX_BF16_ERROR
    for prompt, drawn in zip(prompts, ranks[0]["drawn"][0], strict=True):
        logits = exact_logits(prompt + drawn[:-1])[len(prompt) - 1 :]
        lower = logits.amax(1) - logits.gather(1, torch.tensor(drawn)[:, None])[:, 0]
        assert float((lower / logits.abs().amax(1)).max()) < 2 * MAX_BF16_ERROR


def test_bfloat16_logits_are_those_of_transformers_up_to_rounding(tmp_path: Path) -> None:
    family, config = NATIVE_MODELS["qwen3"]
    path = save_tiny_model(tmp_path / "model", family, **config)
    (prompt,) = [prompt for prompt in make_prompts(read_model_folder(path)) if len(prompt) == 64]
    ranks = on_two_gpus(path, tmp_path, dtype="bfloat16", logits_of=prompt)
    assert ranks[0] == ranks[1]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).cuda()
    with torch.inference_mode():
        expected = model(torch.tensor([prompt], device="cuda")).logits[0, -1].float().cpu()
    assert float((torch.tensor(ranks[0]["logits"]) - expected).abs().max() / expected.abs().max()) < MAX_BF16_ERROR
