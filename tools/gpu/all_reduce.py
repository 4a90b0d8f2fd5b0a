"""What ranks exchange, on a bare machine of several GPUs: Quire's kernels over peer memory beside NCCL, one JSON.

python -P tools/gpu/all_reduce.py --out all_reduce.json [--ranks 2]

First each result is compared with NCCL's, then it is timed inside a CUDA graph; microseconds per call, the median of turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTHS = (4096, 8192)
NUM_TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
EXCHANGE_BYTES = (4096, 16384, 65536, 262144, 1048576)
LARGE_BYTES = (4194304, 16777216, 67108864)  # for sums only
_CALLS = 32
_TURNS = 9
_TIMEOUT_S = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--ranks", type=int, default=2, help="GPUs, a rank each (default 2)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(arguments.ranks):
            # Each rank sees its own GPU first, as Quire's ranks do.
            visible = [str((rank + step) % arguments.ranks) for step in range(arguments.ranks)]
            command = [sys.executable, "-P", __file__, "--out", str(arguments.out), "--ranks", str(arguments.ranks)]
            command += ["--rank", str(rank), "--store", f"{folder}/store"]
            ranks.append(subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(visible)}))
        codes = [rank.wait(_TIMEOUT_S) for rank in ranks]
    sys.exit(any(codes))


def measure(arguments: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from quire.kernels.all_reduce import all_reduce
    from quire.kernels.rms_norm import rms_norm
    from quire.worker.collectives_cuda import NUM_AREAS, CudaCollective

    size = arguments.ranks
    store = dist.FileStore(arguments.store, size)  # type: ignore[attr-defined]  # torch's stubs lack it
    most_bytes = max(NUM_TOKENS) * max(WIDTHS) * 2
    collective = CudaCollective(store, rank=arguments.rank, size=size, timeout_s=60.0, partial_bytes=most_bytes)
    nccl = dist.new_group(backend="nccl")
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "ranks": size, "date": time.strftime("%Y-%m-%d"), "rows": []}

    def timed(call: Callable[[int], object]) -> float:
        """Microseconds of call(turn), which alternates areas by its argument."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for turn in range(2):
                call(turn)
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            for turn in range(_CALLS):
                call(turn)
            graph.capture_end()
        torch.cuda.synchronize()
        times_us = []
        for _ in range(_TURNS):
            dist.barrier()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()  # what this rank waits for the others in the first call is not measured
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times_us.append(1e3 * begin.elapsed_time(end) / _CALLS)
        return float(statistics.median(times_us))

    def add(row: dict[str, Any]) -> None:
        report["rows"].append(row)
        if arguments.rank == 0:
            print(row, flush=True)

    def by_peers(tensor: torch.Tensor, *, in_two_shots: bool) -> None:
        all_reduce(collective.peers, tensor, area=NUM_AREAS * most_bytes, slot_bytes=most_bytes, in_two_shots=in_two_shots)

    generator = torch.Generator("cuda").manual_seed(arguments.rank)
    for num_bytes in (*EXCHANGE_BYTES, *LARGE_BYTES):
        part = torch.randn(num_bytes // 2, generator=generator, device="cuda").bfloat16()
        expected = part.float()
        dist.all_reduce(expected, group=nccl)
        for in_two_shots in (False, True):
            total = part.clone()
            by_peers(total, in_two_shots=in_two_shots)
            assert torch.equal(total, expected.bfloat16()), (num_bytes, in_two_shots, (total.float() - expected).abs().max())
        scratch = torch.zeros_like(part)
        row = {"what": "all_reduce", "bytes": num_bytes}
        row["one_shot_us"] = timed(lambda turn: by_peers(scratch, in_two_shots=False))  # noqa: B023  # called at once
        row["two_shots_us"] = timed(lambda turn: by_peers(scratch, in_two_shots=True))  # noqa: B023  # called at once
        row["nccl_us"] = timed(lambda turn: dist.all_reduce(scratch, group=nccl))  # noqa: B023  # called at once
        add(row)
        if num_bytes in LARGE_BYTES:
            continue
        parts = torch.empty((size, len(part)), dtype=part.dtype, device="cuda")
        dist.all_gather_into_tensor(parts.view(-1), part, group=nccl)
        assert torch.equal(collective.all_gather(part), parts), num_bytes
        row = {"what": "all_gather", "bytes": num_bytes}
        row["quire_us"] = timed(lambda turn: collective.all_gather(part))  # noqa: B023  # called at once
        row["nccl_us"] = timed(lambda turn: dist.all_gather_into_tensor(parts.view(-1), part, group=nccl))  # noqa: B023  # called at once
        add(row)
    for width in WIDTHS:
        weight = torch.randn(width, generator=torch.Generator("cuda").manual_seed(99), device="cuda").bfloat16()
        for num_tokens in NUM_TOKENS:
            shape = num_tokens, width
            residual = torch.randn(shape, generator=torch.Generator("cuda").manual_seed(7), device="cuda").bfloat16()
            partial = torch.randn(shape, generator=generator, device="cuda").bfloat16()
            wide = partial.float()
            dist.all_reduce(wide, group=nccl)
            expected_residual = residual.clone()
            expected = rms_norm(wide.bfloat16(), weight, eps=1e-5, residual=expected_residual)
            output = torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda")
            collective.partial(0, *shape, torch.bfloat16).copy_(partial)
            collective.sum_norm(0, weight, residual=residual, eps=1e-5, output=output)
            assert torch.equal(residual, expected_residual), (shape, (residual - expected_residual).abs().max())
            torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)
            everyone = [torch.empty_like(output) for _ in range(size)]
            dist.all_gather(everyone, output, group=nccl)
            assert all(torch.equal(everyone[0], other) for other in everyone), shape
            residual.zero_()

            def fused(turn: int) -> None:
                collective.sum_norm(turn % 2, weight, residual=residual, eps=1e-5, output=output)  # noqa: B023  # called at once

            def apart(turn: int) -> None:
                rows = collective.partial(turn % 2, *shape, torch.bfloat16)  # noqa: B023  # called at once
                dist.all_reduce(rows, group=nccl)
                rms_norm(rows, weight, eps=1e-5, residual=residual, output=output)  # noqa: B023  # called at once

            for index in range(2):
                collective.partial(index, *shape, torch.bfloat16).zero_()
            add({"what": "sum_norm", "num_tokens": num_tokens, "width": width, "quire_us": timed(fused), "nccl_us": timed(apart)})
    if arguments.rank == 0:
        arguments.out.write_text(json.dumps(report, indent=1))
    dist.barrier()
    collective.close()


if __name__ == "__main__":
    main()
