"""The rows of docs/performance.md on a bare machine of one GPU: `quire bench engine` for two models, one JSON.

python -P tools/gpu/table.py --out table.json [--models llama-8b,qwen3-0.6b]

About five minutes, the start of two engines with nothing compiled included. Beside each number stands what the memory of this GPU
allows at best, by the bandwidth that the same run measures.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from quire.bench.gpu_timing import ceilings

# Bytes that a step reads: weights, and keys and values per token of context. bfloat16.
SHAPES = {"llama-8b": (15.0e9, 131_072), "qwen3-0.6b": (1.19e9, 114_688)}
WORKLOADS = "decode,prefill,mixed256,azure_conv400,ttft"
_TIMEOUT_S = 280


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--models", default=",".join(SHAPES), help="shapes, comma separated")
    arguments = parser.parse_args()
    machine = ceilings()
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), "machine": machine, "models": {}}
    torch.cuda.empty_cache()  # the engine's rank is a process of its own
    for model in arguments.models.split(","):
        report["models"][model] = engine(model)
        report["models"][model]["decode_floors"] = decode_floors(model, report["models"][model], machine["read_bytes_per_s"])
        arguments.out.write_text(json.dumps(report, indent=1))


def engine(model: str) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "quire.cli.main", "bench", "engine", "--model-config", model, "--dummy-weights"]
    command += ["--device", "cuda", "--max-model-len", "16384", "--workload", WORKLOADS, "--json"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=_TIMEOUT_S).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def decode_floors(model: str, result: dict[str, Any], read_bytes_per_s: float) -> list[dict[str, float]]:
    """Of each decode case: the milliseconds that reading takes, and their share of the steady step."""
    weight_bytes, token_bytes = SHAPES[model]
    floors = []
    for row in result["workloads"]["decode"]:
        floor_ms = 1e3 * (weight_bytes + row["batch"] * row["context"] * token_bytes) / read_bytes_per_s
        floors.append(
            {"batch": row["batch"], "context": row["context"], "floor_ms": floor_ms, "share": floor_ms / row["median_steady_step_ms"]}
        )
    return floors


if __name__ == "__main__":
    main()
