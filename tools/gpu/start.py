"""How long `quire serve` takes until it is ready, on a bare GPU machine: Llama 3 8B's shape, random weights. One JSON.

    python -P tools/gpu/start.py --out start.json [--turns 3] [--model-config llama-8b] [--device cuda]

Ray's start is counted. The first turn on a machine that has run nothing finds no kernels, and no libraries in the page cache.
"""

import argparse
import importlib.resources
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from serving import ServeProcess

from quire.bench.engine import model_config_folder

MAX_MODEL_LEN = "8192"
_SAID = ("ready in", "began to load", "compiled")  # what is kept of a rank's log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--model-config", default="llama-8b")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "model": arguments.model_config, "turns": []}
    for _ in range(arguments.turns):
        report["turns"].append(turn(arguments.model_config, arguments.device))
        print(json.dumps(report["turns"][-1]), flush=True)
        arguments.out.write_text(json.dumps(report, indent=1))


def turn(name: str, device: str) -> dict[str, Any]:
    """One start: seconds until ready, and what the rank's log says of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        shutil.copyfile(model_config_folder(name) / "config.json", model / "config.json")
        for file in ("tokenizer.json", "tokenizer_config.json"):  # whichever: nobody asks for text here
            (model / file).write_bytes((importlib.resources.files("quire.demo_model") / file).read_bytes())
        started_s = time.monotonic()
        flags = ["--dummy-weights", "--device", device, "--max-model-len", MAX_MODEL_LEN]
        with ServeProcess(Path(folder), str(model), *flags) as serve:
            serve.wait_ready()
            ready_s = time.monotonic() - started_s
            (log,) = serve.temporary.glob("quire-*/logs/model-0-0.log")
            said = [line for line in log.read_text().splitlines() if any(part in line for part in _SAID)]
        return {"ready_s": round(ready_s, 2), "rank": said}


if __name__ == "__main__":
    main()
