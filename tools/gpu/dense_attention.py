"""Attention of a fresh prompt by cuDNN: what a size costs to plan, what padding costs, and whether it matters how q, k and v lie.

python -P tools/gpu/dense_attention.py --out dense_attention.json

Half a minute on an NVIDIA H200. Heads of llama-8b and of qwen3-0.6b, bfloat16.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.kernels.dense_attention import MIN_TOKENS, dense_attention

HEADS = {"llama-8b": (32, 8), "qwen3-0.6b": (16, 8)}
HEAD_DIM = 128
SIZES = (4096, 7936, 8000, 8064, 8128, 8192)
PLANNED = range(MIN_TOKENS, 8193, 512)
NUM_ROUNDS = 3
_SCALE = HEAD_DIM**-0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), "models": {}}
    for model, heads in HEADS.items():
        rows = report["models"][model] = {"plan_ms": plan_times_ms(*heads), "attention_us": attention_times_us(*heads)}
        print(model, json.dumps(rows), flush=True)
    arguments.out.write_text(json.dumps(report, indent=1))


def parts_of(size: int, num_heads: int, num_kv_heads: int) -> list[Tensor]:
    """Queries, keys and values as one product leaves them: views of it, [size, heads, HEAD_DIM]."""
    product = torch.randn((size, num_heads + 2 * num_kv_heads, HEAD_DIM), dtype=torch.bfloat16, device="cuda")
    return list(product.split((num_heads, num_kv_heads, num_kv_heads), dim=1))


def plan_times_ms(num_heads: int, num_kv_heads: int) -> dict[int, float]:
    """Of each size what its first call takes; what loads the library is called before."""
    query, key, value = parts_of(PLANNED[-1], num_heads, num_kv_heads)
    dense_attention(query[:1024], key[:1024], value[:1024], scale=_SCALE)
    times_ms = {}
    for size in PLANNED:
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        dense_attention(query[:size], key[:size], value[:size], scale=_SCALE)
        torch.cuda.synchronize()
        times_ms[size] = 1e3 * (time.perf_counter() - started_s)
    return times_ms


def attention_times_us(num_heads: int, num_kv_heads: int) -> dict[str, dict[int, float]]:
    """Of each layout and size the median over rounds, in which all of them take turns: the card's power is shared by all."""
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    for size in SIZES:
        split = parts_of(size, num_heads, num_kv_heads)
        dense = [part.contiguous() for part in split]
        head_first = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in split]
        layouts = {
            "views of one product": split,
            "dense": dense,
            "queries dense": [dense[0], *split[1:]],
            "keys and values dense": [split[0], *dense[1:]],
            "keys and values head by head": [split[0], *head_first[1:]],
            "queries dense, the others head by head": [dense[0], *head_first[1:]],
            "all head by head": head_first,
        }
        for name, parts in layouts.items():
            calls[name, size] = functools.partial(dense_attention, *parts, scale=_SCALE)
    for call in calls.values():
        call()
    rounds: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for _ in range(NUM_ROUNDS):
        for key, call in calls.items():
            rounds[key].append(_microseconds(call))
    times_us: dict[str, dict[int, float]] = {}
    for (name, size), times in rounds.items():
        times_us.setdefault(name, {})[size] = statistics.median(times)
    return times_us


def _microseconds(call: Callable[[], object], *, num_calls: int = 10) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(num_calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * float(start.elapsed_time(end)) / num_calls


if __name__ == "__main__":
    main()
