"""The ways of generating that `quire bench cpu` compares, each on a model of its own in this process."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

from quire.bench.cpu_workload import OUTPUT_TOKENS, PROMPT_TOKENS, Requests
from quire.bench.plan_loop import run_requests
from quire.common.model_folder import read_model_folder
from quire.worker.kv_cache import KvCache
from quire.worker.models.load_model import DTYPES, load_model
from quire.worker.runner import Runner

BATCH: Final = 32
MAX_BATCHED_TOKENS: Final = 512
BLOCK_SIZE: Final = 16
# transformers' pages: its default of 256 tokens wastes most of a page on requests as short as ours.
PAGE_SIZE: Final = 32
# Longest that transformers' continuous batching may be silent.
ANSWER_TIMEOUT_S: Final = 120.0


class Contestant(Protocol):
    """Generates greedily, exactly as many tokens as are asked for."""

    name: str

    def generate(self, requests: Requests) -> list[list[int]]: ...

    def ready(self) -> AbstractContextManager[None]:
        """What it must be inside of to generate; what this costs is not measured."""


class Quire:
    """The worker's runner, driven by plans in this process."""

    name = "quire"

    def __init__(self, folder: Path, *, dtype: str) -> None:
        model_folder = read_model_folder(folder)
        model = load_model(model_folder, dtype=dtype, device="cpu", backend="auto")
        longest = PROMPT_TOKENS[1] + OUTPUT_TOKENS[1]
        kv_cache = KvCache(
            num_blocks=BATCH * -(-longest // BLOCK_SIZE),
            num_layers=model_folder.num_layers,
            num_kv_heads=model.num_kv_heads,
            block_size=BLOCK_SIZE,
            head_dim=model_folder.head_dim,
            dtype=DTYPES[dtype],
            device="cpu",
        )
        self._runner = Runner(model, kv_cache, rank=0, max_rows=BATCH, max_model_len=longest, device="cpu")

    def generate(self, requests: Requests) -> list[list[int]]:
        return run_requests(self._runner, requests, max_rows=BATCH, max_batched_tokens=MAX_BATCHED_TOKENS)

    @contextmanager
    def ready(self) -> Iterator[None]:
        yield


class StaticBatches:
    """transformers' generate on padded batches: each runs until its longest request ends."""

    def __init__(self, folder: Path, *, dtype: str, batch_size: int) -> None:
        self.name = f"static batches of {batch_size}" if batch_size > 1 else "generate one by one"
        self._batch_size = batch_size
        self._model = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()

    @torch.no_grad()
    def generate(self, requests: Requests) -> list[list[int]]:
        completions: list[list[int]] = []
        for start in range(0, len(requests), self._batch_size):
            batch = requests[start : start + self._batch_size]
            width = max(len(prompt) for prompt, _ in batch)
            token_ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(token_ids)
            for row, (prompt, _) in enumerate(batch):
                token_ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            num_tokens = max(count for _, count in batch)
            output = self._model.generate(token_ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
            completions += [row[:count] for row, (_, count) in zip(output[:, width:].tolist(), batch, strict=True)]
        return completions

    @contextmanager
    def ready(self) -> Iterator[None]:
        yield


class ContinuousBatching:
    """transformers' own continuous batching over a paged cache."""

    name = "transformers continuous batching"

    def __init__(self, folder: Path, *, dtype: str) -> None:
        self._model = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation="sdpa").eval()
        self._manager: Any = None

    def generate(self, requests: Requests) -> list[list[int]]:
        for index, (prompt, num_tokens) in enumerate(requests):
            self._manager.add_request(list(prompt), request_id=str(index), max_new_tokens=num_tokens)
        completions: dict[int, list[int]] = {}
        while len(completions) < len(requests):
            answer = self._manager.get_result(timeout=ANSWER_TIMEOUT_S)
            assert answer is not None, f"silent for {ANSWER_TIMEOUT_S:g} s"
            assert answer.error is None, answer.error
            if answer.is_finished():
                completions[int(answer.request_id)] = list(answer.generated_tokens)
        return [completions[index] for index in range(len(requests))]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Its thread runs inside alone: it must not take the processor from the others."""
        longest = PROMPT_TOKENS[1] + OUTPUT_TOKENS[1]
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # without psutil it complains of that
        self._manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(max_new_tokens=OUTPUT_TOKENS[1], do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_SIZE,
                num_blocks=BATCH * -(-longest // PAGE_SIZE) + BATCH,
                max_batch_tokens=MAX_BATCHED_TOKENS,
                max_requests_per_batch=BATCH,
                use_cuda_graph=False,
                use_async_batching=False,
            ),
        )
        self._manager.start()
        try:
            yield
        finally:
            self._manager.stop(block=True)
