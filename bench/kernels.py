"""`quire bench kernels`: each of our kernels on this machine's GPU, beside what its bytes or operations must take, and torch's own way.

Tiles are those that serving takes; `tools/gpu/kernels.py` compares tiles.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from quire.bench.table import format_table
from quire.common.errors import ConfigError

# torch takes seconds to import, and `quire bench --help` needs none of it.
if TYPE_CHECKING:
    from quire.bench.attention_cases import Pool

PARTS: Final = ("small", "decode", "prefill")
# Of the pool that attention reads: large enough that launches find nothing in the cache, small enough for any GPU that serves.
DEFAULT_POOL_GB: Final = 20.0
# An 8B Llama's heads.
NUM_HEADS: Final = 32
NUM_KV_HEADS: Final = 8
HEAD_DIM: Final = 128
BLOCK_SIZE: Final = 16
# Layers of the pool, which launches take in turn.
NUM_LAYERS: Final = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", type=_parts, default=PARTS, help=f"parts by comma, of {', '.join(PARTS)}; all when not given")
    parser.add_argument(
        "--pool-gb", type=float, default=DEFAULT_POOL_GB, help=f"KV pool for attention, in 1e9 bytes (default {DEFAULT_POOL_GB:g})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """1 if a kernel's result is not that of its reference."""
    if not args.pool_gb > 0:
        raise ConfigError(f"--pool-gb is {args.pool_gb:g}; it must be above 0, such as {DEFAULT_POOL_GB:g}")
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"`quire bench kernels` measures kernels on an NVIDIA GPU, and torch {torch.__version__} sees none here; run it where there is "
            "one, with a torch built for CUDA (`quire bench cpu` measures a processor)",
            reason="NO_GPU",
        )
    report = measure_kernels(args.only, pool_gb=args.pool_gb)
    print(json.dumps(report) if args.json else report_as_text(report))
    return 0 if all(row["ok"] for row in report["kernels"]) else 1


def measure_kernels(parts: Sequence[str], *, pool_gb: float) -> dict[str, Any]:
    """Microseconds per launch, of launches that find their data in memory, not in the cache."""
    import torch
    import triton

    from quire.bench.attention_cases import make_pool
    from quire.bench.gpu_timing import ceilings
    from quire.bench.kernel_ops import SmallOps

    torch.backends.cuda.matmul.allow_tf32 = False
    machine = ceilings()
    rows: list[dict[str, Any]] = []
    if "small" in parts:
        rows += SmallOps(machine["read_bytes_per_s"], on_row=_say).run_all()
    torch.cuda.empty_cache()
    if "decode" in parts or "prefill" in parts:
        pool = make_pool(int(pool_gb * 1e9))
        rows += _decode(pool, machine["read_bytes_per_s"]) if "decode" in parts else []
        rows += _prefill(pool, machine["bf16_operations_per_s"]) if "prefill" in parts else []
    for row in rows:
        row["share_of_floor"] = row["floor_us"] / row["us"] if row["floor_us"] else None
        row["times_torch"] = row["torch_us"] / row["us"] if row["torch_us"] else None
    return {
        "device_name": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "ceilings": machine,
        "kernels": rows,
    }


def _decode(pool: "Pool", read_bytes_per_s: float) -> list[dict[str, Any]]:
    """Batches of decodes; torch's attention has their keys and values in one piece, and equal lengths alone."""
    from quire.bench.attention_cases import DecodeCase, decode_batches, sdpa_decode_seconds

    layers = pool.layers(num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, block_size=BLOCK_SIZE, head_dim=HEAD_DIM)
    rows = []
    for name, lengths in decode_batches().items():
        case = DecodeCase(layers, lengths, num_heads=NUM_HEADS)
        error = case.error()
        torch_s = sdpa_decode_seconds(len(lengths), lengths[0]) if len(set(lengths)) == 1 else None
        floor_s = case.num_bytes / read_bytes_per_s
        rows.append(_attention_row("paged_decode", name, error, case.seconds(), floor_s, torch_s))
    return rows


def _prefill(pool: "Pool", operations_per_s: float) -> list[dict[str, Any]]:
    """Chunks of prompts; torch's attention, by cuDNN, has whole prompts alone."""
    from quire.bench.attention_cases import PrefillCase, cudnn_seconds, prefill_batches
    from quire.bench.gpu_timing import seconds_per_launch
    from quire.kernels.attention_tiles import prefill_tile

    layers = pool.layers(num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, block_size=BLOCK_SIZE, head_dim=HEAD_DIM)
    tile = prefill_tile(head_dim=HEAD_DIM, num_bytes=2, block_size=BLOCK_SIZE)
    rows = []
    for name, chunks in prefill_batches().items():
        case = PrefillCase(layers, chunks, num_heads=NUM_HEADS)
        error = case.error(tile)
        pieces = case.pieces(tile)
        seconds = seconds_per_launch([partial(case.launch, tile, layer, pieces) for layer in layers[:4]], num_replays=7)
        torch_s = cudnn_seconds(len(chunks), chunks[0].num_tokens) if all(chunk.start == 0 for chunk in chunks) else None
        rows.append(_attention_row("paged_prefill", name, error, seconds, case.num_operations / operations_per_s, torch_s))
    return rows


def _attention_row(op: str, batch: str, error: float, seconds: float, floor_s: float, torch_s: float | None) -> dict[str, Any]:
    # bf16 against float32: as the kernels' own tests have it
    row = {"op": op, "size": batch, "error": error, "ok": error < 1e-2, "us": 1e6 * seconds, "floor_us": 1e6 * floor_s}
    row["torch_us"] = None if torch_s is None else 1e6 * torch_s
    _say(row)
    return row


def report_as_text(report: dict[str, Any]) -> str:
    """A row per kernel and size. The floor is the time that its bytes take to be read, for prefill that of its operations."""
    rows = [
        (
            row["op"],
            str(row["size"]),
            f"{row['us']:.1f}",
            f"{row['floor_us']:.1f}" if row["floor_us"] else "-",
            f"{100 * row['share_of_floor']:.0f}%" if row["share_of_floor"] else "-",
            f"{row['torch_us']:.1f}" if row["torch_us"] else "-",
            f"{row['times_torch']:.1f}" if row["times_torch"] else "-",
            "right" if row["ok"] else "WRONG",
        )
        for row in report["kernels"]
    ]
    machine = report["ceilings"]
    heading = (
        f"{report['device_name']}, {report['date']}: reads {machine['read_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"{machine['bf16_operations_per_s'] / 1e12:.0f} TFLOP/s in bf16"
    )
    headers = ("kernel", "size", "µs", "floor µs", "of floor", "torch µs", "times faster", "result")
    return f"{heading}\n{format_table(headers, rows)}"


def _say(row: dict[str, Any]) -> None:
    verdict = "" if row["ok"] else f", WRONG by {row['error']:.1e}"
    print(f"{row['op']} {row['size']}: {row['us']:.1f} us{verdict}", file=sys.stderr, flush=True)


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"{name!r} is no part; there are {', '.join(PARTS)}")
    return names
