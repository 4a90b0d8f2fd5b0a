"""Run a rank's tests on a GPU, and time a decode step of an 8B model of random weights: one JSON.

python -P tools/gpu/rank.py --out rank.json [--skip-tests] [--skip-times]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from transformers import AutoModelForCausalLM, LlamaConfig

from quire.common.messages import Chunk, RowAdd, SamplingState, StepPlan
from quire.common.model_folder import ModelFolder
from quire.worker.kv_cache import KvCache
from quire.worker.models.transformers_model import TransformersModel
from quire.worker.runner import Runner
from quire.worker.warm_up import measure_prefill, measure_step_bytes, touch_decodes

_CHECKOUT = Path(__file__).resolve().parents[2]
_MODELS = ("llama", "gemma2", "gpt_oss", "qwen3")
# What runs beside each other, since compiling is what takes long; then what needs the GPU for itself.
_CUDA = "tests/worker/test_cuda.py"
_PARTS: dict[str, list[str]] = {
    **{name: [_CUDA, "-k", f"{name} and not families"] for name in _MODELS},
    "float32": [_CUDA, "-k", "families and float32"],
    "bfloat16": [_CUDA, "-k", "families and bfloat16"],
    "float16": [_CUDA, "-k", "families and float16 and not bfloat16"],
    "others": [_CUDA, "-k", "not families and not a_rank_t and " + " and ".join(f"not {name}" for name in _MODELS)],
    "kernels": [
        "tests/worker/test_kernel_attention.py",
        "tests/kernels/test_decode_plan.py",
        "tests/kernels/test_copy_blocks.py",
        "tests/kernels/test_prepare_inputs.py",
    ],
    "sampling": ["tests/kernels/test_sample.py"],
    "stories": ["tests/worker/test_stories.py", "-m", "gpu"],
}
_ALONE = {"memory": [_CUDA, "-k", "a_rank_t"]}
_TEST_TIMEOUT_S = 240

BATCHES = (1, 32, 128)
CONTEXT = 1024
NUM_STEPS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-times", action="store_true")
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }
    print(report, flush=True)
    for name, skip, part in (("tests", arguments.skip_tests, run_tests), ("times", arguments.skip_times, time_decodes)):
        if skip:
            continue
        started_s = time.perf_counter()
        try:
            report[name] = part()
        except Exception as error:  # what was found before is worth keeping
            report[name] = {"error": f"{type(error).__name__}: {error}"}
        report[f"{name}_took_s"] = round(time.perf_counter() - started_s, 1)
        arguments.out.write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


# -- tests ------------------------------------------------------------------------------------------------------------


def run_tests() -> dict[str, Any]:
    """How the tests ended, and what the failed ones said."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The project's own settings name plugins that such a machine may lack.
        (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\nmarkers =\n  gpu\n  kernel\n  slow\n  chaos\n")
        results = _run(_PARTS, folder) | _run(_ALONE, folder)
    counts = {key: sum(result[key] for result in results.values()) for key in ("passed", "failed", "skipped")}
    is_ok = counts["failed"] == 0 and all(result["exit_code"] == 0 for result in results.values())
    return {"pass": is_ok, **counts, "parts": results}


def _run(parts: dict[str, list[str]], folder: Path) -> dict[str, dict[str, Any]]:
    paths = [str(_CHECKOUT / "src"), str(_CHECKOUT / "tests/support"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": ":".join(paths)}
    started = {}
    for name, arguments in parts.items():
        report, log = folder / f"{name}.xml", folder / f"{name}.log"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(folder / "pytest.ini")]
        command += ["--rootdir", str(_CHECKOUT), f"--junitxml={report}", *arguments]
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=_CHECKOUT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        started[name] = process, report, log
    deadline_s = time.monotonic() + _TEST_TIMEOUT_S
    results = {}
    for name, (process, report, log) in started.items():
        try:
            process.wait(max(1.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        results[name] = _result(process.returncode, report, log)
        print(name, {key: value for key, value in results[name].items() if key != "failures"}, flush=True)
        for failure in results[name].get("failures", [])[:4]:
            print("  FAILED", failure["test"], failure["why"][-1200:], flush=True)
    return results


def _result(exit_code: int, report: Path, log: Path) -> dict[str, Any]:
    if not report.exists():
        return {"exit_code": exit_code, "passed": 0, "failed": 1, "skipped": 0, "failures": [{"test": "", "why": log.read_text()[-3000:]}]}
    suite = ElementTree.parse(report).getroot()[0].attrib
    failures = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        for outcome in (*case.findall("failure"), *case.findall("error")):
            failures.append({"test": case.attrib["name"], "why": (outcome.text or "")[-2000:]})  # noqa: PERF401
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    passed = int(suite["tests"]) - failed - skipped
    result = {"exit_code": exit_code, "passed": passed, "failed": failed, "skipped": skipped, "took_s": float(suite["time"])}
    return {**result, "failures": failures} if failures else result


# -- times ------------------------------------------------------------------------------------------------------------


def time_decodes() -> dict[str, Any]:
    """Seconds of a decode step by batch, with 1024 tokens of context each; and what a rank measures of itself."""
    model = eight_billion()
    device, dtype = "cuda", torch.bfloat16
    step_bytes = measure_step_bytes(model, block_size=16, max_rows=256, max_tokens=8192, max_model_len=8192, dtype=dtype, device=device)
    torch.cuda.empty_cache()
    folder = model.folder
    num_blocks = max(BATCHES) * (CONTEXT + NUM_STEPS + 32) // 16 + 64
    kv_cache = KvCache(
        num_blocks=num_blocks, num_layers=folder.num_layers, num_kv_heads=8, block_size=16, head_dim=128, dtype=dtype, device=device
    )
    kv_cache.blocks.normal_()
    runner = Runner(model, kv_cache, rank=0, max_rows=max(BATCHES), max_model_len=8192, device=device, num_cpu_blocks=512)
    h2d, d2h = runner.swap_pool.measure()
    started_s = time.perf_counter()
    touch_decodes(runner, max_rows=max(BATCHES))
    touched_s = time.perf_counter() - started_s
    speeds = measure_prefill(runner, max_tokens=8191)
    return {
        "step_bytes": step_bytes,
        "h2d_bytes_per_s": h2d,
        "d2h_bytes_per_s": d2h,
        "touch_decodes_s": touched_s,
        "prefill_tokens_per_s": speeds,
        "decode": [time_decode(runner, batch, state) for batch in BATCHES for state in (GREEDY, SAMPLED)],
    }


GREEDY = SamplingState(temperature=0.0)
SAMPLED = SamplingState(temperature=0.8, top_p=0.95, seed=1)


def time_decode(runner: Runner, batch: int, sampling: SamplingState) -> dict[str, Any]:
    """A step of `batch` sequences, without a scheduler; medians. The rows' contexts are random numbers in the cache."""
    per_row = (CONTEXT + NUM_STEPS + 16) // 16 + 1
    adds = tuple(
        RowAdd(row, (7,) * CONTEXT, CONTEXT, CONTEXT - 1, tuple(range(row * per_row, (row + 1) * per_row)), 0, sampling)
        for row in range(batch)
    )
    chunks = tuple(Chunk(row, CONTEXT - 1, 1, True) for row in range(batch))
    runner.execute(StepPlan(0, 0, add_rows=adds, chunks=chunks, samples=tuple((row, row) for row in range(batch))))
    walls, devices = [], []
    for step in range(1, NUM_STEPS):
        started_s = time.perf_counter()
        result, _ = runner.execute(StepPlan(0, step))
        walls.append(time.perf_counter() - started_s)
        devices.append(result.device_s)
    busy_s = _gpu_busy_s(runner)
    runner.batch.clear()
    skip = NUM_STEPS // 4
    return {
        "batch": batch,
        "context": CONTEXT,
        "temperature": sampling.temperature,
        "step_ms": 1e3 * statistics.median(walls[skip:]),
        "forward_and_draw_ms": 1e3 * statistics.median(devices[skip:]),
        "gpu_busy_ms": 1e3 * busy_s,
        "tokens_per_s": batch / statistics.median(walls[skip:]),
    }


def _gpu_busy_s(runner: Runner) -> float:
    """How long kernels ran in one step, gaps left out."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        runner.execute(StepPlan(0, NUM_STEPS))
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def eight_billion() -> TransformersModel:
    """Llama 3 8B's shape in bfloat16, with random weights."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attn_implementation="eager",
    )
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        module = AutoModelForCausalLM.from_config(config).eval()
    torch.set_default_dtype(torch.float32)
    module = module.to(torch.bfloat16)
    folder = ModelFolder(
        path=Path(), model_type="llama", num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, hidden_size=4096, vocab_size=128256,
        max_positions=8192, dtype="bfloat16", eos_token_ids=(), generation={}, has_chat_template=False, fingerprint="", weight_files=(),
    )  # fmt: skip
    return TransformersModel(module, folder)


if __name__ == "__main__":
    main()
