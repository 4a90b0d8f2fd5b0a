"""A cluster on a bare machine of two GPUs, or for `load` of one: controller on Ray, gateway, SDK. One JSON.

    python -P tools/gpu/two_gpus.py --out two_gpus.json [--parts groups,split,load] [--device cuda]

groups: two groups of one GPU; the built-in model in float32, 64 streams; a rank is killed under them, and each stream must end with
        the tokens of a run in which nothing happens (or the exit code is 1)
split:  the same with one group of two GPUs, whose tokens must be those of one GPU
load:   Llama 3 8B's shape with random weights on a group of --tensor-parallel-size GPUs: closed loops of 64 and 256 callers and
        arrivals at 70 % of what the engine alone carries, through gRPC from client processes, beside the engine alone: under the
        same load, and with each request arriving when it did at the edge

`--device cpu --model-config DIR` tries it out where there is no GPU.
"""

import argparse
import importlib.resources
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serving import ServeProcess, wait_for
from streams import TIMEOUT_S, Streams

from quire.bench.engine import model_config_folder

NUM_STREAMS = 64
NUM_TOKENS = 600
# A gateway carries about 40,000 tokens/s and a client process less: neither may be what is measured.
NUM_GATEWAYS = 8
NUM_CLIENTS = 16
RANK = "quire.worker.rank_process"
_BENCH_TIMEOUT_S = 200
_COMMAND = [sys.executable, "-P", "-m", "quire.cli.main"]
_TIMES = ("ttft_p50_ms", "tpot_p50_ms", "itl_p50_ms", "itl_p99_ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--parts", default="groups,split,load", help="by comma")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model-config", default="llama-8b", help="the shape for `load`")
    parser.add_argument("--tensor-parallel-size", type=int, default=2, help="GPUs of the group for `load`")
    parser.add_argument("--load-cases", default="64x128x256,256x128x256", help="callers x prompt tokens x tokens to generate")
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, help="of each stream under which a rank is killed")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "device": arguments.device}
    expected: list[list[int]] | None = None
    all_right = True
    for part in arguments.parts.split(","):
        started_s = time.monotonic()
        if part == "load":
            report[part] = load(arguments)
        else:
            flags = ("--groups", "2") if part == "groups" else ("--tensor-parallel-size", "2")
            report[part], expected = survive(arguments, flags, expected)
            all_right &= all(report[part][name] in (None, NUM_STREAMS) for name in ("exact", "as_other_group"))
        report[part]["took_s"] = time.monotonic() - started_s
        print(part, json.dumps(report[part]), flush=True)
        arguments.out.write_text(json.dumps(report, indent=1))
    sys.exit(not all_right)


def survive(
    arguments: argparse.Namespace, flags: tuple[str, ...], expected: list[list[int]] | None
) -> tuple[dict[str, Any], list[list[int]]]:
    """What became of streams under which a rank was killed, and the tokens of undisturbed ones.

    expected: what these must be, by another group
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        ServeProcess(Path(folder), "--device", arguments.device, "--dtype", "float32", *flags) as serve,
    ):
        started_s = time.monotonic()
        address = serve.wait_ready()
        ready_s = time.monotonic() - started_s
        quiet = Streams(address, num_streams=NUM_STREAMS, num_tokens=arguments.tokens)
        tokens = quiet.wait()
        streams = Streams(address, num_streams=NUM_STREAMS, num_tokens=arguments.tokens)
        wait_for(lambda: streams.num_tokens >= streams.num_wanted // 5, timeout_s=TIMEOUT_S)
        killed = min(pid for pid, command in serve.processes().items() if f"-m {RANK} " in command)
        os.kill(killed, signal.SIGKILL)
        disturbed = streams.wait()
        return {
            "ready_s": ready_s,
            "streams": NUM_STREAMS,
            "exact": sum(ids == wanted for ids, wanted in zip(disturbed, tokens, strict=True)),
            "as_other_group": None if expected is None else sum(ids == wanted for ids, wanted in zip(tokens, expected, strict=True)),
            "longest_pause_s": streams.longest_pause_s,
            "undisturbed_longest_pause_s": quiet.longest_pause_s,
        }, tokens


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine alone and through the edge, a row per load."""
    shape = ["--tensor-parallel-size", str(arguments.tensor_parallel_size), "--device", arguments.device]
    shape += ["--dummy-weights", "--max-model-len", "2048"]
    how = ["--model-config", arguments.model_config, *shape, "--workload", "load", "--load-cases", arguments.load_cases, "--json"]
    engine = _json_of([*_COMMAND, "bench", "engine", *how])
    rows = engine["workloads"]["load"]
    with tempfile.TemporaryDirectory() as folder:
        # The gateway wants a tokenizer, whichever: prompts are token ids here.
        model = Path(folder) / "model"
        model.mkdir()
        shutil.copyfile(model_config_folder(arguments.model_config) / "config.json", model / "config.json")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((importlib.resources.files("quire.demo_model") / name).read_bytes())
        # As users run it: what the tests compare after every step (checks_ranks) waits for the step's end.
        environ = {"QUIRE_CHECKS_RANKS": "false"}
        with ServeProcess(Path(folder), str(model), *shape, "--gateways", str(NUM_GATEWAYS), environ=environ) as serve:
            result = {
                "tensor_parallel_size": arguments.tensor_parallel_size,
                "engine_startup_s": engine["startup_s"],
                **through_the_edge(serve, rows),
            }
        print("load", json.dumps({**result, "rows": [{**row, "arrivals": None} for row in result["rows"]]}), flush=True)
        arguments.out.write_text(json.dumps({"load": result}, indent=1))
        arrivals = Path(folder) / "arrivals.json"
        arrivals.write_text(json.dumps([row.pop("arrivals") for row in result["rows"]]))
        how = ["--model-config", arguments.model_config, *shape, "--workload", "load", "--arrivals", str(arrivals), "--json"]
        again = _json_of([*_COMMAND, "bench", "engine", *how])["workloads"]["load"]
        for row, engine_row in zip(result["rows"], again, strict=True):
            row |= {"same_arrivals": engine_row, "ratio_at_same_arrivals": _ratios(row["edge"], engine_row)}
        return result


def through_the_edge(serve: ServeProcess, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same loads, and how many times the engine's numbers theirs are."""
    started_s = time.monotonic()
    address = serve.wait_ready()
    result: dict[str, Any] = {"ready_s": time.monotonic() - started_s, "rows": []}
    for row in rows:
        how = ["--rate", str(row["rate_per_s"])] if row["callers"] is None else ["--concurrency", str(row["callers"])]
        how += ["--requests", str(row["requests"]), "--prompt-tokens", str(row["prompt_tokens"]), "--max-tokens", str(row["tokens"])]
        served = _json_of(
            [*_COMMAND, "bench", "serve", "--address", address, "--processes", str(NUM_CLIENTS), *how, "--temperature", "0", "--json"]
        )
        edge = {
            "ttft_p50_ms": 1e3 * served["ttft_s"]["p50"],
            "tpot_p50_ms": 1e3 * served["tpot_s"]["p50"],
            "itl_p50_ms": 1e3 * served["itl_s"]["p50"],
            "itl_p99_ms": 1e3 * served["itl_s"]["p99"],
            "output_tokens_per_s": served["output_tokens_per_s"],
            "num_cached_tokens": served["num_cached_tokens"],
        }
        arrivals = {"prompt_tokens": row["prompt_tokens"], "tokens": row["tokens"], "arrivals_s": served["arrivals_s"]}
        result["rows"].append({"engine": row, "edge": edge, "ratio": _ratios(edge, row), "arrivals": arrivals})
    return result


def _ratios(edge: dict[str, float], engine: dict[str, Any]) -> dict[str, float]:
    return {name: edge[name] / engine[name] for name in _TIMES}


def _json_of(command: list[str]) -> dict[str, Any]:
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=_BENCH_TIMEOUT_S).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
