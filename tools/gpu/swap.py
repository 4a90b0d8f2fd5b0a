"""What preemption costs on a bare machine of one GPU: `quire bench engine --workload swap` for two models, one JSON.

python -P tools/gpu/swap.py --out swap.json [--models llama-13b,qwen3-0.6b] [--repetitions 1] [--logs DIR]

Each model starts four engines: 1000 blocks with swap, recompute, and the scheduler's own choice, and a large pool with as few sequences
at once. DIR/MODEL keeps their logs and journals.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

MODELS = ("llama-13b", "qwen3-0.6b")
_TIMEOUT_S = 420


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--models", default=",".join(MODELS), help="shapes, comma separated")
    parser.add_argument("--repetitions", default="1", help="runs of each engine")
    parser.add_argument("--logs", type=Path, help="a folder for each model's logs and journals")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), "models": {}}
    for model in arguments.models.split(","):
        command = [sys.executable, "-P", "-m", "quire.cli.main", "bench", "engine", "--model-config", model, "--dummy-weights"]
        command += ["--device", "cuda", "--max-model-len", "2048", "--workload", "swap", "--repetitions", arguments.repetitions, "--json"]
        if arguments.logs is not None:
            command += ["--log-folder", str(arguments.logs / model)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=_TIMEOUT_S).stdout
        report["models"][model] = json.loads(output)
        arguments.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
