"""Attention of fresh prompts, each step of them in several ways that take turns: by ragged plans of cuDNN's own front end, which take the
lengths from the GPU; by torch's cuDNN, prompt by prompt, as they are and padded; by Quire's paged kernel, whose keys a cache may hold.

pip install nvidia-cudnn-frontend==1.18.0
python -P tools/gpu/ragged_attention.py --out ragged_attention.json

Half a minute on an NVIDIA H200. Heads of llama-8b and of qwen3-0.6b, bfloat16. Quire itself does without the front end;
docs/kernel_notes.md says why.
"""

import argparse
import functools
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cudnn
import torch
from torch import Tensor

from quire.bench.attention_cases import PrefillCase, make_pool
from quire.bench.gpu_timing import relative_error
from quire.kernels.attention_tiles import prefill_tile
from quire.kernels.dense_attention import MIN_TOKENS, dense_attention, padded_size
from quire.kernels.paged_prefill import PrefillChunk

HEADS = {"llama-8b": (32, 8), "qwen3-0.6b": (16, 8)}
HEAD_DIM = 128
MAX_TOKENS = 8192  # of a step
BATCHES = (1, 8, 64)  # most prompts of a plan
NUM_ROUNDS = 7
_SCALE = HEAD_DIM**-0.5
_CALLS = 8  # in a graph
_MAX_PLANNED_BY_TORCH = 8  # prompts of a step: one by one, more of them would only take longer
_MAX_ERROR = 0.01  # relative to torch's, in bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    arguments = parser.parse_args()
    versions = {"torch": torch.__version__, "cudnn": cudnn.backend_version(), "front end": cudnn.__version__}
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), "versions": versions, "models": {}}
    for model, heads in HEADS.items():
        rows = report["models"][model] = {}
        for name, times_us in times_of_cases(*heads):
            rows[name] = times_us
            print(model, name, json.dumps(times_us), flush=True)
            arguments.out.write_text(json.dumps(report, indent=1))


def cases() -> dict[str, list[int]]:
    """Lengths of the prompts of a step."""
    draw = random.Random(0)
    mixed: list[int] = []
    while sum(mixed) <= MAX_TOKENS - 1024:
        mixed.append(draw.randint(100, 1024))
    singles = {str(length): [length] for length in (8192, 8000, 4096, 2048, 1024, 512, 128)}
    return {
        **singles,
        "2 x 4096": [4096] * 2,
        "8 x 1024": [1024] * 8,
        "64 x 128": [128] * 64,
        "3000, 2000, 1000, 500": [3000, 2000, 1000, 500],
        f"{len(mixed)} of 100-1024": mixed,
    }


def times_of_cases(num_heads: int, num_kv_heads: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Of each step of prompts the microseconds of each way: medians over rounds, in which all ways take turns."""
    product = torch.randn((MAX_TOKENS, num_heads + 2 * num_kv_heads, HEAD_DIM), dtype=torch.bfloat16, device="cuda")
    parts = product.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    plans = [RaggedPlan(batch, num_heads, num_kv_heads) for batch in BATCHES]
    layers = make_pool(2 * 10**9).layers(num_layers=2, num_kv_heads=num_kv_heads, block_size=16, head_dim=HEAD_DIM)
    tile = prefill_tile(head_dim=HEAD_DIM, num_bytes=2, block_size=16)
    for name, lengths in cases().items():
        spans = list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))
        ways: dict[str, Callable[[], object]] = {}
        for plan in plans:
            if len(lengths) <= plan.batch:
                ways[f"ragged, at most {plan.batch}"] = call = plan.call(parts, lengths)
                plan.output.fill_(float("nan"))
                call()
                expected = torch.cat(_each(parts, spans))
                error = relative_error(plan.output[: len(expected)], expected)
                assert error <= _MAX_ERROR, f"{name}: the plan for {plan.batch} prompts differs from torch by {error:.3g}"
        if len(lengths) <= _MAX_PLANNED_BY_TORCH:
            ways["torch, each"] = functools.partial(_each, parts, spans)
        if MIN_TOKENS <= max(lengths) == sum(lengths) < padded_size(lengths[0]):
            ways["torch, padded"] = functools.partial(_each, parts, [(0, padded_size(lengths[0]))])
        paged = PrefillCase(layers, [PrefillChunk(row, 0, length) for row, length in enumerate(lengths)], num_heads=num_heads)
        ways["paged"] = functools.partial(paged.launch, tile, layers[1], paged.pieces(tile))
        graphs = {way: _graph(call) for way, call in ways.items()}
        times_us: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(NUM_ROUNDS + 1):
            for way, graph in graphs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                if turn:  # the first warms up
                    times_us[way].append(1e3 * start.elapsed_time(end) / _CALLS)
        yield name, {way: round(statistics.median(times), 1) for way, times in times_us.items()}


class RaggedPlan:
    """Causal attention of at most `batch` prompts of together at most MAX_TOKENS tokens, planned once."""

    def __init__(self, batch: int, num_heads: int, num_kv_heads: int) -> None:
        self.batch = batch
        self.output = torch.empty((MAX_TOKENS, num_heads, HEAD_DIM), dtype=torch.bfloat16, device="cuda")
        self._widths = ((num_heads + 2 * num_kv_heads) * HEAD_DIM, num_heads * HEAD_DIM)  # numbers per token, of what it reads and writes
        self._handle = cudnn.create_handle()
        graph = cudnn.pygraph(
            io_data_type=cudnn.data_type.BFLOAT16,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=self._handle,
        )

        def integers(name: str, count: int) -> Any:
            return graph.tensor(name=name, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=cudnn.data_type.INT32)

        def strides(width: int) -> list[int]:
            return [MAX_TOKENS * width, HEAD_DIM, width, 1]

        starts, output_starts, counts = integers("starts", batch + 1), integers("output starts", batch + 1), integers("counts", batch)
        query, key, value = (
            graph.tensor(name=name, dim=[batch, heads, MAX_TOKENS, HEAD_DIM], stride=strides(self._widths[0]))
            for name, heads in (("query", num_heads), ("key", num_kv_heads), ("value", num_kv_heads))
        )
        for part in (query, key, value):
            part.set_ragged_offset(starts)
        output, _ = graph.sdpa(
            q=query, k=key, v=value, attn_scale=_SCALE, use_causal_mask=True, use_padding_mask=True,
            seq_len_q=counts, seq_len_kv=counts, generate_stats=False,
        )  # fmt: skip
        output.set_output(True).set_dim([batch, num_heads, MAX_TOKENS, HEAD_DIM]).set_stride(strides(self._widths[1]))
        output.set_ragged_offset(output_starts)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        self._graph, self._tensors = graph, (query, key, value, output, counts, starts, output_starts)
        self._workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device="cuda")

    def call(self, parts: tuple[Tensor, ...], lengths: list[int]) -> Callable[[], None]:
        """A launch on the current stream, into `output`.

        parts:   queries, keys and values, [MAX_TOKENS, heads, HEAD_DIM] each: views of one product, prompt behind prompt
        lengths: of the prompts, in tokens; at most `batch`
        """
        counts = torch.tensor([*lengths, *[0] * (self.batch - len(lengths))])
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        numbers = (counts, *(width * starts for width in self._widths))
        data = (*parts, self.output, *(each.to("cuda", torch.int32) for each in numbers))
        pack = dict(zip(self._tensors, data, strict=True))

        def launch() -> None:
            cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
            self._graph.execute(pack, self._workspace, handle=self._handle)

        return launch


def _each(parts: tuple[Tensor, ...], spans: list[tuple[int, int]]) -> list[Tensor]:
    return [dense_attention(*(part[start:end] for part in parts), scale=_SCALE) for start, end in spans]


def _graph(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(_CALLS):
                call()
    torch.cuda.synchronize()
    return graph


if __name__ == "__main__":
    main()
