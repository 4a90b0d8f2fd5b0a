"""Check and time the kernels on a GPU: one JSON, and a short table on the way.

python tools/gpu/kernels.py --out kernels.json [--pool-gb 100] [--only check,small,prefill,decode,heads,layout]
"""

import argparse
import json
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from attention import (
    DECODE_TILES,
    LAYOUT_TILES,
    NUM_DECODE_CUTS,
    OTHER_DECODE_TILES,
    OTHER_HEADS,
    OTHER_PREFILL_HEADS,
    OTHER_PREFILL_TILES,
    PREFILL_TILES,
    attention_checks,
    run_attention_check,
    time_decode_heads,
    time_decode_tiles,
    time_layouts,
    time_prefill,
    time_prefill_heads,
    warm_up,
)

from quire.bench.attention_cases import make_pool
from quire.bench.gpu_timing import ceilings
from quire.bench.kernel_ops import SmallOps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--pool-gb", type=float, help="bytes of KV pool / 1e9; by default 100, or 60 on a GPU of 80 GB")
    parser.add_argument("--only", default="check,small,prefill,decode,heads,layout", help="parts, comma separated")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    torch.backends.cuda.matmul.allow_tf32 = False
    properties = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "gpu": properties.name,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ceilings": ceilings(),
    }
    print(report, flush=True)
    started_s = time.perf_counter()

    def done(part: str) -> None:
        arguments.out.write_text(json.dumps(report, indent=1))
        print(f"-- {part}: {time.perf_counter() - started_s:.0f} s", flush=True)

    # Compiling is what takes long: processes share it out, and leave what they compiled on disk.
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        if "check" in parts:
            checks = [pool.submit(run_attention_check, check) for check in attention_checks()]
            report["checks"] = [_result_or_error(check) for check in checks]
            for row in report["checks"]:
                if not row["ok"]:
                    print("WRONG", row, flush=True)
            print(f"{len(report['checks'])} checks, {sum(not row['ok'] for row in report['checks'])} wrong", flush=True)
            done("check")
        warm_ups: list[tuple[Any, ...]] = []
        if "prefill" in parts:
            warm_ups += [(tile, block_size) for tile in PREFILL_TILES for block_size in (16, 64)]
            heads = [OTHER_HEADS[name] for name in OTHER_PREFILL_HEADS]
            warm_ups += [(tile, block_size, head) for tile in OTHER_PREFILL_TILES for block_size in (16, 64) for head in heads]
        if "decode" in parts:
            warm_ups += [(tile, 16) for tile in DECODE_TILES[::NUM_DECODE_CUTS]]
        if "heads" in parts:
            warm_ups += [(tile, 16, head) for tile in OTHER_DECODE_TILES for head in OTHER_HEADS.values()]
        if "layout" in parts:
            warm_ups += [(tile, block_size) for tile in LAYOUT_TILES for block_size in (32, 64)]
        futures = [pool.submit(warm_up, *arguments_of) for arguments_of in warm_ups]
        for future in futures:
            future.result()
        done("warm up")
    read_bytes_per_s = report["ceilings"]["read_bytes_per_s"]
    if "small" in parts:
        report["small"] = SmallOps(read_bytes_per_s, on_row=_print_op).run_all()
        done("small")
    torch.cuda.empty_cache()
    pool_gb = arguments.pool_gb or (100 if properties.total_memory > 120e9 else 60)
    kv_pool = make_pool(int(pool_gb * 1e9))
    if "prefill" in parts:
        report["prefill"] = time_prefill(kv_pool) + time_prefill_heads(kv_pool)
        done("prefill")
    if "decode" in parts:
        report["decode"] = time_decode_tiles(kv_pool, read_bytes_per_s)
        done("decode")
    if "heads" in parts:
        report["heads"] = time_decode_heads(kv_pool, read_bytes_per_s)
        done("heads")
    if "layout" in parts:
        report["layout"] = time_layouts(kv_pool, read_bytes_per_s, LAYOUT_TILES)
        done("layout")


def _print_op(row: dict[str, Any]) -> None:
    verdict = "ok   " if row["ok"] else "WRONG"
    times = f"{row['us']:7.1f} us, floor {row['floor_us']:6.1f}"
    print(f"{verdict} {row['op']:32s} {row['size']:5d} {times}, error {row['error']:.1e}", flush=True)


def _result_or_error(future: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return future.result()
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}


if __name__ == "__main__":
    main()
