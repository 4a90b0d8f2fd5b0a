"""Linear layers of few rows on a bare GPU machine: each tile beside torch's product, then whole layers.

    python -P tools/gpu/linear.py --out FILE [--models llama-8b,qwen3-0.6b] [--rows 1,2,4,8,16,32,64] [--tiles 64x128x4x6]

Shares are of the bandwidth at which the same run reads memory. Every product is first compared with a float32 reference.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from quire.kernels.linear_tiles import LinearTile
from quire.kernels.rms_norm import rms_norm
from quire.kernels.silu_mul import silu_mul
from quire.kernels.skinny_linear import skinny_linear, skinny_linear_reference

# Products of a layer: name, what is done beside them, columns, inputs.
SHAPES = {
    "llama-8b": [
        ("qkv", "norm", 6144, 4096), ("output", "residual", 4096, 4096), ("gate_up", "gated", 14336, 4096),
        ("down", "residual", 4096, 14336), ("head", "plain", 128256, 4096),
    ],
    "qwen3-0.6b": [
        ("qkv", "norm", 4096, 1024), ("output", "residual", 1024, 2048), ("gate_up", "gated", 3072, 1024),
        ("down", "residual", 1024, 3072), ("head", "plain", 151936, 1024),
    ],
    # As products alone, of several rows: norms are launches of their own there.
    "llama-8b products": [
        ("qkv", "plain", 6144, 4096), ("output", "residual", 4096, 4096), ("gate_up", "gate", 14336, 4096),
        ("down", "residual", 4096, 14336),
    ],
    # A rank's part of two.
    "llama-70b half": [
        ("qkv", "plain", 5120, 8192), ("output", "plain", 8192, 4096), ("gate_up", "gate", 14336, 8192), ("down", "plain", 8192, 14336),
    ],
}  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 32, 64)
MODELS = ("llama-8b", "qwen3-0.6b")
TILES = [
    LinearTile(16, 256, 2, 4),
    LinearTile(16, 256, 2, 6),
    LinearTile(16, 512, 4, 3),
    LinearTile(32, 128, 4, 5),
    LinearTile(32, 256, 4, 3),
    LinearTile(32, 256, 4, 4),
    LinearTile(32, 128, 4, 8),
    LinearTile(64, 128, 4, 6),
    LinearTile(64, 128, 8, 5),
    LinearTile(64, 64, 4, 6),
    LinearTile(64, 128, 4, 4),
    LinearTile(128, 64, 4, 5),
    *(
        LinearTile(columns, inputs, warps, stages, has_weights_left=True)
        for columns, inputs, warps, stages in (
            (64, 128, 4, 4),
            (64, 128, 4, 5),
            (64, 128, 4, 6),
            (64, 256, 4, 3),
            (64, 64, 4, 8),
            (128, 64, 4, 4),
            (128, 64, 4, 6),
            (128, 128, 8, 4),
        )
    ),
    LinearTile(4, 512, 4, 2, uses_tensor_cores=False),
    LinearTile(4, 1024, 4, 2, uses_tensor_cores=False),
    LinearTile(8, 512, 4, 2, uses_tensor_cores=False),
    LinearTile(4, 1024, 2, 2, uses_tensor_cores=False),
    LinearTile(2, 1024, 2, 2, uses_tensor_cores=False),
    LinearTile(2, 1024, 1, 2, uses_tensor_cores=False),
    LinearTile(2, 512, 1, 2, uses_tensor_cores=False),
    LinearTile(1, 4096, 1, 2, uses_tensor_cores=False),
    LinearTile(1, 1024, 1, 2, uses_tensor_cores=False),
]
# More than any cache: launches take turns over so many bytes of weights.
BYTES_IN_TURN = 400e6
NUM_COMPILERS = 14


Job: TypeAlias = tuple[str, int, int, LinearTile]  # kind, inputs, rows


class Work:
    """One product with weights enough that no cache helps."""

    def __init__(self, kind: str, num_columns: int, num_inputs: int, num_rows: int, *, num_weights: int | None = None) -> None:
        self.kind = kind
        self.is_gated = kind in ("gated", "gate")  # gated: with a norm before it
        stacked = num_columns * (2 if self.is_gated else 1)
        count = num_weights or max(2, min(64, int(BYTES_IN_TURN / (stacked * num_inputs * 2)) + 1))
        self.weights = [torch.randn(stacked, num_inputs, device="cuda", dtype=torch.bfloat16) * num_inputs**-0.5 for _ in range(count)]
        self.inputs = torch.randn(num_rows, num_inputs, device="cuda", dtype=torch.bfloat16)
        self.norm = torch.rand(num_inputs, device="cuda", dtype=torch.bfloat16) if kind in ("norm", "gated") else None
        self.residual = torch.randn(num_rows, num_columns, device="cuda", dtype=torch.bfloat16) if kind == "residual" else None
        self.output = torch.empty(num_rows, num_columns, device="cuda", dtype=torch.bfloat16)

    def launch(self, index: int, tile: LinearTile, *, overlaps: bool = False) -> Tensor:
        return skinny_linear(
            self.inputs, self.weights[index], tile=tile, norm=self.norm, eps=1e-5, residual=self.residual, is_gated=self.is_gated,
            output=self.output, overlaps=overlaps,
        )  # fmt: skip

    def error(self, tile: LinearTile, *, overlaps: bool = False) -> float:
        before = None if self.residual is None else self.residual.clone()
        exact = {name: None if part is None else part.float() for name, part in (("norm", self.norm), ("residual", before))}
        expected = skinny_linear_reference(self.inputs.float(), self.weights[0].float(), eps=1e-5, is_gated=self.is_gated, **exact)
        self.output.fill_(float("nan"))
        actual = self.launch(0, tile, overlaps=overlaps).float()
        if before is not None and self.residual is not None:
            self.residual.copy_(before)
        return float(((actual - expected).abs() / (1 + expected.abs())).max())


def graph_us(launch: Callable[[int], Any], count: int) -> float:
    """Microseconds of a launch, among `count` different ones in a graph; the best of several replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for index in range(min(2, count)):
            launch(index)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for index in range(count):
            launch(index)
        graph.capture_end()
    torch.cuda.synchronize()
    times = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / count)
    return sorted(times)[1]


def suits(tile: LinearTile, num_rows: int, num_inputs: int, num_columns: int) -> bool:
    if num_inputs % tile.num_inputs:
        return False
    if not tile.uses_tensor_cores:
        return num_rows == 1
    if num_columns > 100_000 and tile.num_columns < 32:
        return False
    return not (num_rows > 32 and tile.num_inputs * tile.num_stages > 768)


def compile_some(jobs: Sequence[Job]) -> int:
    """Launch each once, in a process of its own: what it compiles lies in the cache on disk then."""
    for kind, num_inputs, num_rows, tile in jobs:
        try:
            Work(kind, 128, num_inputs, num_rows, num_weights=1).launch(0, tile)
        except Exception as error:
            print("cannot compile", kind, num_rows, tile, str(error)[:200], flush=True)
    return len(jobs)


def read_bandwidth() -> float:
    """Bytes per second at which a large tensor is read."""
    source = torch.zeros(2**30, dtype=torch.float32, device="cuda")
    source.sum()
    times = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        source.sum()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return source.nbytes / min(times)


def whole_layer(model: str, num_rows: int, tiles: dict[str, LinearTile | None], *, fused: bool, overlaps: bool) -> float:
    """Microseconds of one layer's products and what lies between them but attention."""
    works = {name: Work(kind, columns, inputs, num_rows) for name, kind, columns, inputs in SHAPES[model] if name != "head"}
    count = min(len(work.weights) for work in works.values())
    hidden = works["qkv"].inputs
    residual = torch.randn_like(hidden)
    norm = works["qkv"].norm
    assert norm is not None

    def product(name: str, index: int, inputs: Tensor) -> Tensor:
        work, tile = works[name], tiles[name]
        if tile is None or not fused:
            if work.kind in ("norm", "gated"):
                inputs = rms_norm(inputs, norm, eps=1e-5, residual=residual)
            result = F.linear(inputs, work.weights[index])
            return silu_mul(result) if work.kind == "gated" else result
        return skinny_linear(
            residual if work.kind in ("norm", "gated") else inputs, work.weights[index], tile=tile,
            norm=norm if work.kind in ("norm", "gated") else None, eps=1e-5, residual=residual if work.kind == "residual" else None,
            is_gated=work.kind == "gated", overlaps=overlaps,
        )  # fmt: skip

    def layer(index: int) -> None:
        attended = product("qkv", index, hidden)[:, : works["output"].inputs.shape[1]]
        hidden_after = product("output", index, attended)
        product("down", index, product("gate_up", index, hidden_after))

    return graph_us(layer, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--models", default=",".join(MODELS), help=f"by comma, of {', '.join(SHAPES)}")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="by comma")
    parser.add_argument("--tiles", default="", help="columns x inputs x warps x stages, by comma, with weights left; else all")
    arguments = parser.parse_args()
    left = [LinearTile(*map(int, tile.split("x")), has_weights_left=True) for tile in arguments.tiles.split(",") if tile]
    tiles = left or TILES
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), "triton": triton.__version__}
    report["read_bytes_per_s"] = bandwidth = read_bandwidth()
    print(report, flush=True)
    models, all_rows = arguments.models.split(","), [int(count) for count in arguments.rows.split(",")]
    cases = [(model, shape, num_rows) for model in models for shape in SHAPES[model] for num_rows in all_rows]
    jobs: dict[tuple[Any, ...], Job] = {}
    for (_, (_, kind, columns, inputs), num_rows), tile in product(cases, tiles):
        if suits(tile, num_rows, inputs, columns):
            padded_rows = max(16, num_rows) if tile.uses_tensor_cores else 1
            jobs[kind, inputs, padded_rows, tile] = kind, inputs, num_rows, tile
    started_s = time.perf_counter()
    work = list(jobs.values())
    with ProcessPoolExecutor(NUM_COMPILERS, mp_context=get_context("spawn")) as compilers:
        list(compilers.map(compile_some, [work[first::NUM_COMPILERS] for first in range(NUM_COMPILERS)]))
    report["compile_s"] = time.perf_counter() - started_s
    print(len(work), "kernels in", report["compile_s"], flush=True)
    rows: list[dict[str, Any]] = []
    best: dict[tuple[str, str, int], LinearTile | None] = {}
    for model, (name, kind, columns, inputs), num_rows in cases:
        case = Work(kind, columns, inputs, num_rows)
        floor_us = case.weights[0].nbytes / bandwidth * 1e6
        torch_us = graph_us(lambda index: F.linear(case.inputs, case.weights[index]), len(case.weights))  # noqa: B023
        found: list[tuple[float, LinearTile]] = []
        for tile in tiles:
            if not suits(tile, num_rows, inputs, columns):
                continue
            try:
                error = case.error(tile)
                took_us = graph_us(lambda index: case.launch(index, tile), len(case.weights))  # noqa: B023
            except Exception as failure:
                print("failed", name, num_rows, tile, str(failure)[:160], flush=True)
                continue
            if not error < 0.05:
                print("WRONG", name, kind, num_rows, tile, error, flush=True)
                continue
            found.append((took_us, tile))
        found.sort(key=lambda pair: pair[0])
        best[model, name, num_rows] = found[0][1] if found else None
        row = {"model": model, "name": name, "rows": num_rows, "floor_us": floor_us, "torch_us": torch_us,
               "best": [(round(us, 2), str(tile)[10:]) for us, tile in found]}  # fmt: skip
        rows.append(row)
        print(f"{model:10} {name:8} {num_rows:3} floor {floor_us:6.1f} torch {torch_us:7.1f} {floor_us / torch_us:.2f}", end=" ")
        print(f"ours {found[0][0]:7.1f} {floor_us / found[0][0]:.2f} {found[0][1]}" if found else "", flush=True)
    report["products"] = rows
    arguments.out.write_text(json.dumps(report, indent=1))
    layers = []
    for model, num_rows in product([model for model in models if model in MODELS], [count for count in all_rows if count <= 32]):
        tiles = {name: best[model, name, num_rows] for name, *_ in SHAPES[model]}
        layer = {"model": model, "rows": num_rows, "torch": whole_layer(model, num_rows, tiles, fused=False, overlaps=False)}
        for overlaps in (False, True):
            layer["overlapping" if overlaps else "fused"] = whole_layer(model, num_rows, tiles, fused=True, overlaps=overlaps)
        layers.append(layer)
        print(layer, flush=True)
    report["layers"] = layers
    arguments.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
