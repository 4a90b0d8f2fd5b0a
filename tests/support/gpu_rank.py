"""One rank of a group with a GPU each, as a process: `python -P gpu_rank.py STORE RANK SIZE JOB RESULT` draws tokens by hand-written plans.

JOB and RESULT are files of JSON. A job: the model's folder, its dtype and backend, prompts, tokens to draw, and runs: of each the
block size, the chunk, after how many steps the next prompt enters, whether there are graphs, and sampling states.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from plan_driver import PlanDriver

from quire.common.messages import Chunk, SamplingState
from quire.common.model_folder import read_model_folder
from quire.worker.collectives import connect
from quire.worker.gpu_memory import draw_bytes
from quire.worker.graphed_steps import GraphedSteps
from quire.worker.kv_cache import KvCache
from quire.worker.models.load_model import DTYPES, load_model
from quire.worker.runner import Runner

_MAX_BATCHED_TOKENS = 512


def main(store: Path, rank: int, size: int, job: dict[str, Any]) -> dict[str, Any]:
    torch.set_grad_enabled(False)
    folder = read_model_folder(Path(job["folder"]))
    partial_bytes = _MAX_BATCHED_TOKENS * folder.hidden_size * 4
    num_bytes = draw_bytes(folder, dtype=job["dtype"], num_ranks=size, max_rows=16)
    collective = connect(rendezvous_path=store, rank=rank, size=size, gpu_partial_bytes=partial_bytes, gpu_draw_bytes=num_bytes)
    model = load_model(folder, dtype=job["dtype"], device="cuda", backend=job["backend"], collective=collective)

    def make_runner(*, block_size: int, has_graphs: bool) -> Runner:
        kv_cache = KvCache(
            num_blocks=2048 // block_size,
            num_layers=folder.num_layers,
            num_kv_heads=model.num_kv_heads,
            block_size=block_size,
            head_dim=folder.head_dim,
            dtype=DTYPES[job["dtype"]],
            device="cuda",
        )
        runner = Runner(model, kv_cache, rank=rank, max_rows=16, max_model_len=128, max_batched_tokens=_MAX_BATCHED_TOKENS, device="cuda")
        if has_graphs and isinstance(runner.steps, GraphedSteps):
            runner.steps.capture()
        return runner

    drawn = []
    for run in job["runs"]:
        driver = PlanDriver(make_runner(block_size=run["block_size"], has_graphs=run["has_graphs"]))
        sampling = [SamplingState(**state) for state in run["sampling"]] if run["sampling"] else None
        how = {"chunk": run["chunk"], "stagger": run["stagger"], "sampling": sampling}
        drawn.append(driver.generate(job["prompts"], num_tokens=job["num_tokens"], **how))
    result: dict[str, Any] = {"drawn": drawn}
    if job["logits_of"]:
        runner = make_runner(block_size=16, has_graphs=False)
        driver = PlanDriver(runner)
        assert isinstance(runner.steps, GraphedSteps)
        prompt = job["logits_of"]
        driver.step(add_rows=(driver.add(0, prompt),), chunks=(Chunk(0, 0, len(prompt), True),), samples=((0, 0),))
        result["logits"] = runner.steps.last_logits(1)[0].float().tolist()
    collective.close()
    return result


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(Path(sys.argv[4]).read_text()))
    Path(sys.argv[5]).write_text(json.dumps(found))
