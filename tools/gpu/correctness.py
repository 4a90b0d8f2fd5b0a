"""Every test that needs a GPU, on a bare GPU machine: one JSON.

python -P tools/gpu/correctness.py --out correctness.json [--parts native,soak,...]

Parts run beside each other, since compiling is what takes long: about three minutes with 16 cores.
"""

import argparse
import json
import os
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

_CHECKOUT = Path(__file__).resolve().parents[2]
_MODELS = ("llama", "gemma2", "gpt_oss", "qwen3")
_CUDA = "tests/worker/test_cuda.py"
_PARTS: dict[str, list[str]] = {
    "native": ["tests/worker/test_llama_cuda.py"],
    "soak": ["tests/worker/test_soak_cuda.py"],
    **{name: [_CUDA, "-k", f"{name} and not families"] for name in _MODELS},
    "float32": [_CUDA, "-k", "families and float32"],
    "bfloat16": [_CUDA, "-k", "families and bfloat16"],
    "float16": [_CUDA, "-k", "families and float16 and not bfloat16"],
    "others": [_CUDA, "-k", "not families and not a_rank_t and " + " and ".join(f"not {name}" for name in _MODELS)],
    "attention": [
        "tests/worker/test_kernel_attention.py",
        *(
            f"tests/kernels/test_{name}.py"
            for name in ("paged_attention", "paged_decode", "paged_prefill", "dense_attention", "decode_plan")
        ),
    ],
    "kernels": [
        f"tests/kernels/test_{name}.py"
        for name in (
            "copy_blocks",
            "mapped_copy",
            "prepare_inputs",
            "rms_norm",
            "rotary_store",
            "silu_mul",
            "store_kv",
            "skinny_linear",
            "write_runs",
        )
    ],
    "sampling": ["tests/kernels/test_sample.py", "tests/kernels/test_penalties.py", "tests/kernels/test_logprobs.py"],
    "stories": ["tests/worker/test_stories.py", "-m", "gpu"],
}
# What counts free memory needs the GPU for itself.
_ALONE = {"memory": [_CUDA, "-k", "a_rank_t"]}
_TEST_TIMEOUT_S = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--parts", default=",".join([*_PARTS, *_ALONE]), help="by comma, of %(default)s")
    arguments = parser.parse_args()
    parts = set(arguments.parts.split(","))
    if odd := sorted(parts - {*_PARTS, *_ALONE}):
        parser.error(f"no such parts: {', '.join(odd)}; there are {', '.join([*_PARTS, *_ALONE])}")
    started_s = time.perf_counter()
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "asked": sorted(parts),
        **run_tests(parts),
    }
    report["took_s"] = round(time.perf_counter() - started_s, 1)
    arguments.out.write_text(json.dumps(report, indent=1))
    print(json.dumps({key: value for key, value in report.items() if key != "parts"}))
    sys.exit(0 if report["pass"] else 1)


def run_tests(parts: set[str]) -> dict[str, Any]:
    """How the tests ended, and what the failed ones said."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The project's own settings name plugins that such a machine may lack.
        (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\nmarkers =\n  gpu\n  kernel\n  slow\n  chaos\n")
        results: dict[str, dict[str, Any]] = {}
        for together in (_PARTS, _ALONE):
            results |= _run({name: how for name, how in together.items() if name in parts}, folder)
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


if __name__ == "__main__":
    main()
