"""Steps of models without graphs: each operation launched by the host, in the sizes that the step has."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from quire.common.messages import Chunk
from quire.worker.batch import Batch, RowIds
from quire.worker.device_tensor import device_tensor
from quire.worker.kv_cache import KvCache
from quire.worker.logprobs import PromptLogprobs, prompt_spans
from quire.worker.sampler import Draw
from quire.worker.step_inputs import StepInputs, build_step_inputs

# transformers takes seconds to import, and the native family needs none of it.
if TYPE_CHECKING:
    from quire.worker.models.llama import LlamaModel
    from quire.worker.models.transformers_model import TransformersModel


class EagerSteps:
    """The forward passes and draws of one batch."""

    def __init__(self, model: "LlamaModel | TransformersModel", kv_cache: KvCache, batch: Batch) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._batch = batch

    def compute(
        self, chunks: Sequence[Chunk], decoding: RowIds, samples: Sequence[tuple[int, int]]
    ) -> tuple[Draw | None, PromptLogprobs | None]:
        """Launch one step; see StepPlan for what it means. What was drawn is appended to its rows, here and on the device."""
        batch = self._batch
        decodes = decoding.tolist()
        sources = [source for source, _ in samples] + decodes
        sampled = [row for _, row in samples] + decodes
        inputs = build_step_inputs(batch, chunks, decodes)
        spans = prompt_spans(batch, chunks, inputs.chunk_places)
        last_places = _last_places(inputs, chunks, decodes)
        logits_rows = {source: index for index, source in enumerate(dict.fromkeys(sources))}
        prompt_places = [place for span in spans for place in span.places]
        wanted = [last_places[source] for source in logits_rows] + prompt_places
        # A step of chunks that end no prompt needs no logits; one row of them keeps every model's head happy.
        logits = self._model.forward(inputs, self._kv_cache, logits_index=device_tensor(wanted or [0], device=batch.device))
        logits, prompt_logits = logits[: len(logits_rows)], logits[len(logits_rows) : len(wanted)]
        index_of = {place: index for index, place in enumerate(prompt_places)}

        def logits_of(places: range) -> Tensor:
            return prompt_logits[index_of[places.start] : index_of[places.start] + len(places)]

        prompts = PromptLogprobs(batch, spans, logits_of) if spans else None
        if not sampled:
            return None, prompts
        if len(logits_rows) < len(sources):
            logits = logits[device_tensor([logits_rows[source] for source in sources], device=batch.device)]
        draw = Draw(batch, logits, sampled)
        draw.append()
        return draw, prompts


def _last_places(inputs: StepInputs, chunks: Sequence[Chunk], decoding: Sequence[int]) -> dict[int, int]:
    """Where in the step each computed row's last token lies."""
    places = {chunk.row: place + chunk.count - 1 for chunk, place in zip(chunks, inputs.chunk_places, strict=True)}
    return {**places, **dict(zip(decoding, inputs.decode_places, strict=True))}
