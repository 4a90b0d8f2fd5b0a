"""Steps of a native model: a few CUDA graphs, of padded sizes, that find all they need on the device."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from quire.common.messages import Chunk, DrawPurpose, RowErrorCode
from quire.kernels import dense_attention
from quire.kernels.attention_tiles import prefill_tile
from quire.kernels.decode_plan import plan_decode
from quire.kernels.mapped_copy import mapped_copy
from quire.kernels.paged_decode import paged_decode
from quire.kernels.paged_prefill import paged_prefill
from quire.kernels.prepare_inputs import StepTokens, append_tokens, prepare_inputs
from quire.kernels.sample import sample
from quire.worker.batch import Batch, RowIds
from quire.worker.graph_sizes import decode_sizes, launch_bound_tokens, max_chunks, mixed_sizes, warmed
from quire.worker.kernel_attention import HeadShape
from quire.worker.kv_cache import KvCache
from quire.worker.logprobs import PromptLogprobs, prompt_spans
from quire.worker.models.llama import LlamaModel
from quire.worker.sampler import Draw, Sampled
from quire.worker.static_step import StaticStep, StepLayout, lay_out

_log = logging.getLogger(__name__)

# A step of at least so many tokens for each row that there may be is narrowed behind its last attention.
_MIN_TOKENS_PER_SAMPLE: Final = 2
# Draws whose numbers are kept for the host. More than there are steps under way (rank_loop.MAX_STEPS_LAUNCHED), which are read in turn.
_NUM_DRAWS_KEPT: Final = 4
KINDS: Final = ("dense", "mixed", "decode", "logits", "draw", "fetch")


class GraphedDraw:
    """The samples of a step that draw and ask for nothing else, on their way to the host."""

    def __init__(self, drawn: Tensor, num_samples: int) -> None:
        self._drawn = drawn  # [2, max_rows] int64: token ids; whether the row was broken
        self._num_samples = num_samples
        self.is_kept = True  # until its buffer serves another

    def read(self) -> Sampled:
        """What came of it, once the step has ended."""
        assert self.is_kept, f"{_NUM_DRAWS_KEPT} steps were launched before this one was read"
        token_ids = self._drawn[0, : self._num_samples].tolist()
        broken = self._drawn[1, : self._num_samples].numpy()
        errors = {int(index): RowErrorCode.NOT_FINITE for index in broken.nonzero()[0]} if broken.any() else {}
        return Sampled(token_ids=token_ids, drawing=range(self._num_samples), errors=errors)


class GraphedSteps:
    """The forward passes and draws of one batch.

    A step is four launches, each a CUDA graph where there is one of its size: the layers, the logits of the tokens that are
    sampled, the draw with the appending of what was drawn, and its way to the host. While the same rows decode, nothing is
    sent to the device. Steps that are larger than any graph are launched kernel by kernel, over the same buffers; so are those
    of devices without graphs.
    """

    def __init__(self, model: LlamaModel, kv_cache: KvCache, batch: Batch, *, max_batched_tokens: int) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._batch = batch
        config = model.config
        device = batch.tokens.device
        dtype = model.weights.embedding.dtype
        self._tile = prefill_tile(head_dim=config.head_dim, num_bytes=dtype.itemsize, block_size=kv_cache.block_size)
        self._shape = HeadShape(model.num_heads, model.num_kv_heads, config.head_dim, dtype, config.sliding_window)
        self._has_dense = config.sliding_window is None and dense_attention.is_supported(
            head_dim=config.head_dim, dtype=dtype, device=device
        )
        max_rows = batch.max_rows
        max_tokens = max(max_batched_tokens, max_rows)
        self._step = StaticStep(
            max_rows=max_rows, max_tokens=max_tokens, tile=self._tile, group=model.num_heads // model.num_kv_heads, device=device
        )
        self._hidden = torch.zeros((max_tokens, config.hidden_size), dtype=dtype, device=device)
        # [max_rows, vocab_size]; of a group of ranks this one's part
        self._shards = model.vocab_shards(max_rows=max_rows)
        self._logits = (
            torch.zeros((max_rows, model.vocab_size), dtype=dtype, device=device) if self._shards is None else self._shards.logits
        )
        self._drawn = torch.zeros((2, max_rows), dtype=torch.int64, device=device)
        # Buffers like _drawn, pinned, that take turns. Written by a kernel and not by a copy engine: that would first do all that it
        # was asked for before, such as 100 blocks on their way out, and without them the next step would still begin 13-20 µs later
        # (NVIDIA H200, 2026-11-30).
        self._drawn_on_host = [torch.zeros_like(self._drawn, device="cpu", pin_memory=self._drawn.is_cuda) for _ in range(_NUM_DRAWS_KEPT)]
        self._kept: deque[GraphedDraw] = deque()  # whose buffers these are, the oldest first
        self._num_fetched = 0
        self._decode_sizes = decode_sizes(max_rows)
        bound = launch_bound_tokens(layer_parameters=model.layer_parameters) if batch.tokens.is_cuda else 0
        self._mixed_sizes = mixed_sizes(max_tokens, launch_bound_tokens=bound)
        self._dense_sizes = self._dense_graph_sizes(launch_bound_tokens=bound)
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self._steady: RowIds | None = None  # the rows of the step before, if it only decoded: its inputs are still in place
        self._steady_size = 0

    def compute(
        self, chunks: Sequence[Chunk], decoding: RowIds, samples: Sequence[tuple[int, int]]
    ) -> tuple[GraphedDraw | Draw | None, PromptLogprobs | None]:
        """Launch one step; see StepPlan for what it means. What was drawn is appended to its rows, here and on the device."""
        batch = self._batch
        if not chunks and not samples and decoding is self._steady:
            self._run_layers_of_decodes(self._steady_size)
            return self._sample(decoding, self._steady_size), None
        layout = lay_out(chunks, decoding, batch.sizes.length)
        last_places = {chunk.row: place + chunk.count - 1 for chunk, place in zip(chunks, layout.chunk_places, strict=True)}
        first = layout.num_tokens - len(decoding)
        sources = [last_places[source] if source in last_places else first + int(decoding.searchsorted(source)) for source, _ in samples]
        places = np.concatenate((np.array(sources, np.int64), np.arange(first, layout.num_tokens)))
        sampled = np.concatenate((np.array([row for _, row in samples], np.int64), decoding)) if samples else decoding
        spans = prompt_spans(batch, chunks, layout.chunk_places)
        self._run_layers(layout, places, sampled, needs_all=bool(spans))
        prompts = PromptLogprobs(batch, spans, self._logits_of) if spans else None
        self._steady = None
        if not len(sampled):
            return None, prompts
        size = next(size for size in self._decode_sizes if size >= len(sampled))
        if not chunks and not samples:
            self._steady, self._steady_size = decoding, size
        return self._sample(sampled, size), prompts

    def last_logits(self, num_samples: int) -> Tensor:
        """The logits of the last step's samples: [num_samples, vocab_size] in the model's dtype; until the next step.

        All ranks of a group must ask for them.
        """
        logits = self._logits[:num_samples]
        return logits if self._shards is None else self._model.gather_logits(logits)

    # -- launches ---------------------------------------------------------------------------------------------------

    def _run_layers(self, layout: StepLayout, places: RowIds, sampled: RowIds, *, needs_all: bool) -> None:
        """needs_all: whether the hidden states of all tokens are asked for, which no graph of a narrowed step has."""
        num_tokens = layout.num_tokens
        if not layout.longer:
            size = next(size for size in self._decode_sizes if size >= num_tokens)
            self._step.fill(layout, num_padded=size, places=places, sample_rows=sampled)
            self._run_layers_of_decodes(size)
            return
        dense = self._dense_chunks(layout)
        alone = next((size for size in self._dense_sizes if size >= num_tokens), None)
        if alone is not None and list(dense.values()) == [(0, num_tokens)] and not needs_all:
            narrowed = self._is_narrowed(alone)
            self._step.fill(layout, num_padded=alone, places=places, sample_rows=sampled, dense_rows=dense, is_narrowed=narrowed)
            self._launch(("dense", alone), lambda: self._dense_layers(alone))
            return
        mixed = next((size for size in self._mixed_sizes if size >= num_tokens), None)
        if mixed is not None and len(layout.longer) <= max_chunks(mixed) and not (needs_all and self._is_narrowed(mixed)):
            self._step.fill(layout, num_padded=mixed, places=places, sample_rows=sampled, is_narrowed=self._is_narrowed(mixed))
            self._launch(("mixed", mixed), lambda: self._mixed_layers(mixed))
            return
        narrowed = self._is_narrowed(num_tokens) and not needs_all
        num_pieces = self._step.fill(
            layout, num_padded=num_tokens, places=places, sample_rows=sampled, dense_rows=dense, is_narrowed=narrowed
        )
        num_decodes = self._batch.max_rows if len(layout.decodes) else 0
        whole_prompts = tuple(dense.values())
        self._layers(num_tokens, num_pieces=num_pieces, num_decodes=num_decodes, has_chunks=True, dense=whole_prompts, needs_all=needs_all)

    def _is_narrowed(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens has so few samples that its last layer goes on with their tokens alone: 1/32 of
        a prompt's time with 32 layers."""
        return num_tokens >= _MIN_TOKENS_PER_SAMPLE * self._batch.max_rows

    def _dense_chunks(self, layout: StepLayout) -> dict[int, tuple[int, int]]:
        """Long prompts that begin in this step: by row where their tokens begin, and their number."""
        if not self._has_dense:
            return {}
        dense = {}
        first = 0
        for chunk in layout.longer:
            if chunk.start == 0 and chunk.count >= dense_attention.MIN_TOKENS:
                dense[chunk.row] = (first, chunk.count)
            first += chunk.count
        return dense

    def _run_layers_of_decodes(self, size: int) -> None:
        self._launch(("decode", size), lambda: self._layers(size, num_pieces=0, num_decodes=size))

    def _mixed_layers(self, size: int) -> None:
        num_pieces = self._step.pieces_of(size, num_chunks=max_chunks(size))
        self._layers(size, num_pieces=num_pieces, num_decodes=self._batch.max_rows, has_chunks=True)

    def _dense_layers(self, size: int) -> None:
        """One prompt that begins here, and nothing else. Padding lies behind it, where none of its tokens looks."""
        self._layers(size, num_pieces=0, num_decodes=0, has_chunks=True, dense=((0, size),))

    def _layers(
        self,
        num_tokens: int,
        *,
        num_pieces: int,
        num_decodes: int,
        has_chunks: bool = False,
        dense: tuple[tuple[int, int], ...] = (),
        needs_all: bool = False,
    ) -> None:
        """Everything up to the last hidden states of `num_tokens` tokens, or of the samples' alone.

        dense:     where tokens of prompts begin that attend to nothing but themselves, and their number
        needs_all: the states of all tokens are asked for, whatever their number
        """
        batch, step, model = self._batch, self._step, self._model
        tokens = StepTokens(step.tokens.token_ids[:num_tokens], step.tokens.positions[:num_tokens], step.tokens.slot_mapping[:num_tokens])
        spans = step.spans if has_chunks else step.spans[:num_decodes]
        max_count = num_tokens if has_chunks else 1
        prepare_inputs(tokens, batch.tokens, batch.lengths, batch.block_tables, spans, block_size=batch.block_size, max_count=max_count)
        rows = step.decode_rows[:num_decodes]
        plan = batch.decode_plans.of(self._shape, num_rows=num_decodes) if num_decodes else None
        if plan is not None:
            plan_decode(plan, batch.lengths, rows)

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: Tensor) -> Tensor:
            if dense == ((0, num_tokens),) and num_tokens == dense_attention.padded_size(num_tokens):
                return dense_attention.dense_attention(query, key, value, scale=model.scale).contiguous()
            output = torch.empty((num_tokens, *query.shape[1:]), dtype=query.dtype, device=query.device)
            for first, count in dense:
                end = first + dense_attention.padded_size(count)
                attended = dense_attention.dense_attention(query[first:end], key[first:end], value[first:end], scale=model.scale)
                output[first : first + count] = attended[:count]
            query = query[:num_tokens]
            if num_pieces:
                pieces = step.pieces[:num_pieces]
                window = self._shape.sliding_window
                paged_prefill(
                    query, layer, batch.block_tables, pieces, scale=model.scale, sliding_window=window, output=output, tile=self._tile
                )
            if plan is not None:
                paged_decode(
                    query, layer, batch.block_tables, plan, lengths=batch.lengths, rows=rows, scale=model.scale, output=output,
                    first_query=step.first_decode,
                )  # fmt: skip
            return output

        num_dense = max((first + dense_attention.padded_size(count) for first, count in dense), default=None)
        narrowed = has_chunks and self._is_narrowed(num_tokens) and not needs_all
        model.hidden(
            tokens.token_ids,
            tokens.positions,
            tokens.slot_mapping,
            self._kv_cache,
            attend,
            output=self._hidden[: batch.max_rows if narrowed else num_tokens],
            num_dense=num_dense,
            wanted=step.sample_places if narrowed else None,
        )

    def _sample(self, sampled: RowIds, size: int) -> GraphedDraw | Draw:
        batch = self._batch
        self._launch(("logits", size), lambda: self._compute_logits(size))
        if batch.sampling.has_special and any(batch.sampling.is_special(row) for row in sampled.tolist()):
            draw = Draw(batch, self.last_logits(len(sampled)).float(), sampled.tolist())
            draw.append()
            return draw
        self._launch(("draw", size), lambda: self._draw(size))
        batch.lengthen_drawn(sampled)
        self._num_fetched += 1
        index = self._num_fetched % _NUM_DRAWS_KEPT
        self._launch(("fetch", index), partial(mapped_copy, self._drawn, self._drawn_on_host[index]))
        self._kept.append(GraphedDraw(self._drawn_on_host[index], len(sampled)))
        if len(self._kept) > _NUM_DRAWS_KEPT:
            self._kept.popleft().is_kept = False
        return self._kept[-1]

    def _compute_logits(self, size: int) -> None:
        hidden = self._hidden.index_select(0, self._step.logits_places[:size])
        if self._shards is None:
            self._model.logits(hidden, output=self._logits[:size])
        else:
            self._model.part_of_logits(hidden, output=self._logits[:size])

    def _draw(self, size: int) -> None:
        batch = self._batch
        rows = self._step.sample_rows[:size]
        sample(
            self._logits[:size],
            batch.sampling.inputs(rows, lengths=batch.lengths),
            purpose=DrawPurpose.TARGET,
            token_ids=self._drawn[0, :size],
            broken=self._drawn[1, :size],
            shards=self._shards,
        )
        append_tokens(batch.tokens, batch.lengths, rows, self._drawn[0, :size])

    def _logits_of(self, places: range) -> Tensor:
        return self._model.logits(self._hidden[places.start : places.stop]).float()

    # -- graphs -----------------------------------------------------------------------------------------------------

    def capture(self) -> None:
        """Compile every kernel and capture every graph. For an idle batch: its rows and the cache's contents are not touched."""
        started_s = time.perf_counter()
        self._plan_dense_attention()
        works = self._works()
        sizes = {kind: warmed([size for of_kind, size in works if of_kind == kind]) for kind in KINDS}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for key, work in works.items():
                if key[1] in sizes[key[0]]:
                    work()  # what a first launch compiles or sets up must not happen while capturing
                graph = torch.cuda.CUDAGraph()
                # Other threads, such as NCCL's, may use the device meanwhile.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                work()
                graph.capture_end()
                self._graphs[key] = graph
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        _log.info("captured %d graphs in %.2f s", len(works), time.perf_counter() - started_s)

    def touch(self, kind: str) -> None:
        """Launch every size of one kind, one of KINDS, so that what it needs is compiled. For an idle batch."""
        for (of_kind, _), work in self._works().items():
            if of_kind == kind:
                work()
        if kind == "dense" and self._has_dense and len(self._hidden) >= dense_attention.MIN_TOKENS:
            self._dense_layers(dense_attention.MIN_TOKENS)

    def _works(self) -> dict[tuple[str, int], Callable[[], None]]:
        """What graphs are made of, by kind and size; every row is padding. Largest first: the others then find their memory in
        what the largest has left."""
        self._step.fill(StepLayout((), np.zeros(0, np.int64), (), 0), num_padded=0, places=(), sample_rows=())
        works: dict[tuple[str, int], Callable[[], None]] = {}
        for size in reversed(self._dense_sizes):
            works["dense", size] = partial(self._dense_layers, size)
        for size in reversed(self._mixed_sizes):
            works["mixed", size] = partial(self._mixed_layers, size)
        for size in reversed(self._decode_sizes):
            works["decode", size] = partial(self._layers, size, num_pieces=0, num_decodes=size)
            works["logits", size] = partial(self._compute_logits, size)
            works["draw", size] = partial(self._draw, size)
        for index, host in enumerate(self._drawn_on_host):
            works["fetch", index] = partial(mapped_copy, self._drawn, host)
        return works

    def _dense_graph_sizes(self, *, launch_bound_tokens: int) -> list[int]:
        """Sizes of single prompts, ascending."""
        if not self._has_dense:
            return []
        first, step = dense_attention.padded_size(dense_attention.MIN_TOKENS), dense_attention.SIZE_STEP
        return list(range(first, min(len(self._hidden), self._batch.tokens.shape[1], launch_bound_tokens) + 1, step))

    def _plan_dense_attention(self) -> None:
        """Let cuDNN plan every size that it may be asked for."""
        if not self._has_dense:
            return
        shape = self._shape
        most = dense_attention.padded_size(min(len(self._hidden), self._batch.tokens.shape[1]))
        width = shape.num_heads + 2 * shape.num_kv_heads
        qkv = torch.zeros((most, width, shape.head_dim), dtype=shape.dtype, device=self._hidden.device)
        query, key, value = qkv.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
        for size in range(dense_attention.padded_size(dense_attention.MIN_TOKENS), most + 1, dense_attention.SIZE_STEP):
            dense_attention.dense_attention(query[:size], key[:size], value[:size], scale=self._model.scale)

    def _launch(self, key: tuple[str, int], work: Callable[[], None]) -> None:
        graph = self._graphs.get(key)
        if graph is None:
            work()
        else:
            graph.replay()
