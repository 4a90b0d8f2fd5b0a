"""quire.v1.InferenceService: the edge between gRPC and the rest of the gateway."""

import asyncio
import contextlib
import logging
import secrets
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

from quire.cluster.gateway.access import Access
from quire.cluster.gateway.answer_size import MIN_HEAD_BYTES, MIN_ID_BYTES, check_fits, check_num_bytes
from quire.cluster.gateway.call_gate import CallGate
from quire.cluster.gateway.completion import Completion
from quire.cluster.gateway.discovery import RoutingTable
from quire.cluster.gateway.field_checks import check_token_ids
from quire.cluster.gateway.generation import FINISH_TIMEOUT_S, Account, Generation, News, SequenceEnd, make_submit, start_completions
from quire.cluster.gateway.grpc_errors import Context, errors_as_status
from quire.cluster.gateway.logprob_messages import logprob_messages
from quire.cluster.gateway.metrics import GatewayMetrics, RequestRecord
from quire.cluster.gateway.quota import Quotas
from quire.cluster.gateway.request_fields import refuse_unknown, refuse_unsupported
from quire.cluster.gateway.scheduler_link import SchedulerLink, SchedulerStream
from quire.cluster.gateway.served_model import ServedModel
from quire.cluster.gateway.tenants import Caller
from quire.cluster.gateway.text_workers import TextWorkers
from quire.cluster.gateway.tracing import Tracing
from quire.cluster.gateway.validation import (
    ResolvedRequest,
    chat_prompt,
    check_fields,
    encode_prompt,
    length_limit,
    request_id_of,
    resolve,
    text_prompt,
)
from quire.cluster.gateway.writing import write
from quire.cluster.rich_status import duration_of
from quire.common.clock import Clock, monotonic
from quire.common.errors import DeadlineExceeded, InvalidRequest
from quire.common.messages import EndReason, Submit
from quire.v1 import inference_pb2
from quire.v1.inference_pb2_grpc import InferenceServiceServicer

log = logging.getLogger("quire.gateway")

# A client that takes nothing for so long is given up, and its request is cancelled. Until then its tokens wait in its stream.
WRITE_STALL_TIMEOUT_S: Final = 30.0
# Requests of up to so many bytes are prepared on the event loop: 128 token ids or a line of text take it 0.1 ms, 1,000 bytes 0.3 (x86
# machine of 2 cores, 2026-11-30). A thread must wait for the interpreter besides, up to 5 ms while the loop is busy.
MAX_BYTES_PREPARED_AT_ONCE: Final = 1024

_WHOLE_ADVICE: Final = "lower n, max_tokens or logprobs, leave out echo_prompt, or call GenerateStream"

_FINISH_REASONS: Final = {EndReason.STOP: inference_pb2.FINISH_REASON_STOP, EndReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH}


class InferenceService(InferenceServiceServicer):
    """Every entry point goes through the same gate, validator and error mapping."""

    def __init__(
        self,
        *,
        table: Callable[[], RoutingTable],
        link: SchedulerLink,
        workers: TextWorkers,
        gate: CallGate,
        access: Access,
        metrics: GatewayMetrics,
        tracing: Tracing | None = None,
        request_timeout_s: float,
        write_stall_timeout_s: float = WRITE_STALL_TIMEOUT_S,
        finish_timeout_s: float = FINISH_TIMEOUT_S,
        clock: Clock = monotonic,
    ) -> None:
        self._table = table
        self._link = link
        self._workers = workers
        self._gate = gate
        self._access = access
        self._metrics = metrics
        self._tracing = tracing
        self._quotas = Quotas()
        self._request_timeout_s = request_timeout_s
        self._write_stall_timeout_s = write_stall_timeout_s
        self._finish_timeout_s = finish_timeout_s
        self._clock = clock

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> inference_pb2.GenerateResponse:
        async with self._call(context, counted_as="Generate") as call, self._generation(request, call, is_whole=True) as running:
            collected = _Collected()
            while running.generation.account is None:
                news = await running.generation.next_news()
                if collected.is_empty:
                    collected.add_prompt(await self._prompt_logprobs(running))
                collected.add(news, running.logprobs(news))
                collected.check_fits()
                await asyncio.sleep(0)  # the best of several come all at once, and the messages of log probabilities take time
            response = running.whole_response(collected, now_s=self._clock())
            check_fits(response, advice=_WHOLE_ADVICE)
        return response

    async def GenerateStream(  # type: ignore[override]  # written piece by piece, to notice a client that does not read
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        async with self._call(context, counted_as="GenerateStream") as call, self._generation(request, call, is_whole=False) as running:
            is_first = True
            while running.generation.account is None:
                news = await running.generation.next_news()
                prompt_logprobs = await self._prompt_logprobs(running) if is_first else []
                is_first = False
                response = running.stream_response(news, prompt_logprobs, now_s=self._clock())
                check_fits(response, advice="leave out echo_prompt, lower logprobs, or shorten the prompt")
                await write(context, response, timeout_s=self._write_stall_timeout_s)

    async def ListModels(self, request: inference_pb2.ListModelsRequest, context: Context) -> inference_pb2.ListModelsResponse:
        async with self._call(context):
            refuse_unknown(request)
            models = self._table().models
        return inference_pb2.ListModelsResponse(models=[models[name].public for name in sorted(models)])

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Context) -> inference_pb2.TokenizeResponse:
        async with self._call(context):
            model = self._table().find(request.model)
            token_ids, rendered = await self._workers.run(_tokenize, request, model)
            response = inference_pb2.TokenizeResponse(token_ids=token_ids, rendered=rendered)
            check_fits(response, advice="shorten the text")
        return response

    async def Detokenize(self, request: inference_pb2.DetokenizeRequest, context: Context) -> inference_pb2.DetokenizeResponse:
        async with self._call(context):
            model = self._table().find(request.model)
            text = await self._workers.run(_detokenize, request, model)
            response = inference_pb2.DetokenizeResponse(text=text)
            check_fits(response, advice="send fewer token ids")
        return response

    # -- what the calls share -----------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _call(self, context: Context, *, counted_as: str = "") -> AsyncIterator["_Call"]:
        """Around every call: the gate, the deadline, the mapping of errors; counted_as: a request's method, for metrics and traces."""
        record = RequestRecord(self._clock())
        async with errors_as_status(context):
            with self._observed(record, context, method=counted_as) if counted_as else contextlib.nullcontext():
                caller = self._access.caller_of(context)
                call = _Call(caller, record, time_left_s=self._time_left_s(context))
                async with self._inside(call):
                    yield call

    @contextlib.contextmanager
    def _observed(self, record: RequestRecord, context: Context, *, method: str) -> Iterator[None]:
        """Count a request, and trace it if that is on."""
        with self._metrics.counted(record):
            if self._tracing is None:
                yield
                return
            sent: Any = context.invocation_metadata()
            with self._tracing.traced(record, {key: value for key, value in sent or () if isinstance(value, str)}, method=method):
                yield

    @contextlib.asynccontextmanager
    async def _inside(self, call: "_Call") -> AsyncIterator[None]:
        """Inside the gate, for as long as the call may take."""
        with self._gate.enter():
            try:
                async with asyncio.timeout(call.time_left_s):
                    yield
            except TimeoutError:
                text = f"the request took longer than its {call.time_left_s:.3g} s"
                raise DeadlineExceeded(text, metadata={"timeout_s": f"{call.time_left_s:.3g}"}) from None

    def _time_left_s(self, context: Context) -> float:
        """The client's deadline, or what a request without one gets; a longer deadline is cut to that."""
        remaining_s: float | None = context.time_remaining()
        return self._request_timeout_s if remaining_s is None else max(0.0, min(remaining_s, self._request_timeout_s))

    @contextlib.asynccontextmanager
    async def _generation(self, request: inference_pb2.GenerateRequest, call: "_Call", *, is_whole: bool) -> AsyncIterator["_Running"]:
        """Validate, tokenize, submit; on the way out cancel what has not ended, and log how it did."""
        model = self._table().find(request.model)
        call.record.model = model.name
        if request.HasField("chat"):
            call.record.operation = "chat"
        request_id = request_id_of(request)
        with (
            self._gate.hold_request_id(request_id, tenant=call.caller.tenant),
            self._quotas.hold_request(call.caller, now_s=call.arrival_s),
        ):
            if request.HasField("chat") or request.ByteSize() > MAX_BYTES_PREPARED_AT_ONCE:
                prepared = await self._workers.run(self._prepare, request, request_id, model, call, is_whole=is_whole)
            else:
                prepared = self._prepare(request, request_id, model, call, is_whole=is_whole)
            resolved, completions, submit = prepared
            self._quotas.charge_prompt(call.caller, len(submit.prompt_ids), now_s=self._clock())
            stream = self._link.submit(submit)
            with Generation(
                self._link, stream, resolved, completions, clock=self._clock, finish_timeout_s=self._finish_timeout_s
            ) as generation:
                running = _Running(call, resolved, model, generation)
                try:
                    yield running
                finally:
                    num_tokens = sum(sequence.num_received for sequence in stream.sequences)
                    self._quotas.charge(call.caller, num_tokens, now_s=self._clock())
                    _fill(call.record, resolved, stream, generation)
                    self._log_end(running, submit)

    def _prepare(
        self, request: inference_pb2.GenerateRequest, request_id: str, model: ServedModel, call: "_Call", *, is_whole: bool
    ) -> tuple[ResolvedRequest, list[Completion], Submit]:
        """Everything whose cost grows with the request. On a worker thread if it is large or a conversation, whose template may hang."""
        checked = check_fields(request, model, request_id=request_id)
        limits = self._link.limits_of(model.name)
        token_ids, _ = encode_prompt(checked.prompt, model)
        resolved = resolve(
            checked,
            token_ids,
            limit=length_limit(model, scheduler_max_request_tokens=limits.max_request_tokens if limits else 0),
            vocab_size=model.vocab_size,
            drawn_seed=secrets.randbits(64),
            is_whole=is_whole,
        )
        completions = start_completions(resolved, model)
        age_s = self._clock() - call.arrival_s
        submit = make_submit(
            resolved,
            model,
            tenant=call.caller.tenant,
            submit_id=uuid.uuid4().hex,
            block_size=limits.block_size if limits else model.public.block_size,
            time_left_s=call.time_left_s - age_s,
            age_s=age_s,
            trace=call.record.traceparent,
        )
        return resolved, completions, submit

    async def _prompt_logprobs(self, running: "_Running") -> list[inference_pb2.TokenLogprobs]:
        """Those of a request that has its first news, if it asks for them."""
        entries = running.generation.prompt_entries
        if not entries:
            return []
        text_of = running.model.tokenizer.detokenizers.text_of
        return await self._workers.run(logprob_messages, running.request.prompt_ids[1:], entries, text_of=text_of)

    def _log_end(self, running: "_Running", submit: Submit) -> None:
        account = running.generation.account
        log.info(
            "request %s (%s) model %s: %d prompt tokens, %s in %.3f s",
            running.request.request_id,
            submit.request_id,
            running.model.name,
            len(submit.prompt_ids),
            f"{account.usage.num_completion_tokens} generated" if account is not None else "not completed",
            self._clock() - running.call.arrival_s,
        )


def _tokenize(request: inference_pb2.TokenizeRequest, model: ServedModel) -> tuple[list[int], str | None]:
    """On a worker thread."""
    refuse_unsupported(request)
    kind = request.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("the request has no input; set text or chat", reason="EMPTY_PROMPT", field="input")
    for name in ("add_special_tokens", "parse_special_tokens"):
        if kind == "chat" and getattr(request, name):
            raise InvalidRequest(f"{name} is for text; this input is chat; leave it unset", field=name)
    return encode_prompt(chat_prompt(request.chat, model) if kind == "chat" else text_prompt(request, model), model)


def _detokenize(request: inference_pb2.DetokenizeRequest, model: ServedModel) -> str:
    """On a worker thread."""
    ids = request.token_ids
    if len(ids) > model.max_model_len:
        text = f"token_ids has {len(ids)} entries; this model takes {model.max_model_len} (max_model_len); send fewer"
        raise InvalidRequest(text, field="token_ids")
    refuse_unknown(request)
    check_token_ids(ids, below=max(model.vocab_size, model.logits_size), field="token_ids", what="token_ids")
    skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
    return model.tokenizer.decode(list(ids), skip_special_tokens=skip)


def _fill(record: RequestRecord, request: ResolvedRequest, stream: SchedulerStream, generation: Generation) -> None:
    """What is known of a request that was submitted, however it ended."""
    lengths = [sequence.num_received for sequence in stream.sequences]
    record.priority = request.priority
    record.num_prompt_tokens = len(request.prompt_ids)
    record.num_received = sum(lengths)
    record.num_longest = max(lengths) if request.counts.are_all_returned else 0
    record.first_token_s = generation.first_token_s
    record.account = generation.account
    record.reason = stream.finished.reason if stream.finished is not None else None


class _Call:
    """One RPC: whose it is, when it came and how long it may take."""

    def __init__(self, caller: Caller, record: RequestRecord, *, time_left_s: float) -> None:
        self.caller = caller
        self.record = record
        self.arrival_s = record.arrival_s
        self.time_left_s = time_left_s


class _Running:
    """A generation with what its answers need."""

    def __init__(self, call: _Call, request: ResolvedRequest, model: ServedModel, generation: Generation) -> None:
        self.call = call
        self.request = request
        self.model = model
        self.generation = generation

    def stream_response(
        self, news: News, prompt_logprobs: list[inference_pb2.TokenLogprobs], *, now_s: float
    ) -> inference_pb2.GenerateStreamResponse:
        """One message of a stream; the last one of a sequence has its end, the last of all the account."""
        response = inference_pb2.GenerateStreamResponse(
            request_id=self.request.request_id,
            model=self.model.name,
            index=news.index,
            text_delta=news.piece.text,
            token_ids=news.piece.token_ids,
            logprobs=self.logprobs(news),
            prompt_logprobs=prompt_logprobs,
        )
        if news.end is not None:
            _set_end(response, news.end)
        account = self.generation.account
        if account is not None:
            response.usage.CopyFrom(_usage(account))
            response.timings.CopyFrom(self._timings(account, now_s=now_s))
            response.seed = self.request.sampling.seed
        return response

    def whole_response(self, collected: "_Collected", *, now_s: float) -> inference_pb2.GenerateResponse:
        """The answer of Generate: the stream, collected."""
        account = self.generation.account
        assert account is not None, "the last news have come"
        return inference_pb2.GenerateResponse(
            request_id=self.request.request_id,
            model=self.model.name,
            completions=collected.completions(),
            usage=_usage(account),
            timings=self._timings(account, now_s=now_s),
            seed=self.request.sampling.seed,
            prompt_logprobs=collected.prompt_logprobs,
        )

    def logprobs(self, news: News) -> list[inference_pb2.TokenLogprobs]:
        """Those of the news' tokens, if the client asks for them."""
        if not self.request.shows_logprobs:
            return []
        return logprob_messages(news.piece.token_ids, news.piece.entries, text_of=self.model.tokenizer.detokenizers.text_of)

    def _timings(self, account: Account, *, now_s: float) -> inference_pb2.Timings:
        first_token_s = self.generation.first_token_s
        return inference_pb2.Timings(
            queue=duration_of(account.spans.queue_s),
            prefill=duration_of(account.spans.prefill_s),
            decode=duration_of(account.spans.decode_s),
            preempted=duration_of(account.spans.preempted_s),
            time_to_first_token=None if first_token_s is None else duration_of(first_token_s - self.call.arrival_s),
            total=duration_of(now_s - self.call.arrival_s),
            preemption_count=account.num_preemptions,
        )


class _Collected:
    """The sequences of a request, as far as they have come."""

    def __init__(self) -> None:
        self._completions: dict[int, inference_pb2.Completion] = {}
        self._texts: dict[int, list[str]] = {}
        self._num_bytes = 0  # that they take in a message at least
        self.prompt_logprobs: list[inference_pb2.TokenLogprobs] = []

    @property
    def is_empty(self) -> bool:
        return not self._completions

    def add_prompt(self, logprobs: list[inference_pb2.TokenLogprobs]) -> None:
        """The prompt's, if there are any."""
        self.prompt_logprobs = logprobs
        self._num_bytes += _num_bytes(logprobs)

    def add(self, news: News, logprobs: list[inference_pb2.TokenLogprobs]) -> None:
        """What follows of one sequence."""
        self._num_bytes += len(news.piece.text.encode()) + MIN_ID_BYTES * len(news.piece.token_ids)
        self._num_bytes += _num_bytes(logprobs)
        completion = self._completions.setdefault(news.index, inference_pb2.Completion(index=news.index))
        self._texts.setdefault(news.index, []).append(news.piece.text)
        completion.token_ids.extend(news.piece.token_ids)
        completion.logprobs.extend(logprobs)
        if news.end is not None:
            _set_end(completion, news.end)

    def check_fits(self) -> None:
        """An answer that fits no message is given up at once, not when it is complete.

        Raises:
            InvalidRequest: it is too large; the client is told to stream.
        """
        check_num_bytes(self._num_bytes, advice=_WHOLE_ADVICE)

    def completions(self) -> list[inference_pb2.Completion]:
        """All that came, by index."""
        for index, completion in self._completions.items():
            completion.text = "".join(self._texts[index])
        return [self._completions[index] for index in sorted(self._completions)]


def _num_bytes(logprobs: list[inference_pb2.TokenLogprobs]) -> int:
    return sum(entry.ByteSize() + MIN_HEAD_BYTES for entry in logprobs)


def _set_end(answer: inference_pb2.GenerateStreamResponse | inference_pb2.Completion, end: SequenceEnd) -> None:
    answer.finish_reason = _FINISH_REASONS[end.reason]
    if end.stop_string is not None:
        answer.stop_cause.string = end.stop_string
    elif end.stop_id is not None:
        answer.stop_cause.token_id = end.stop_id
    if end.cumulative_logprob is not None:
        answer.cumulative_logprob = end.cumulative_logprob


def _usage(account: Account) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_token_count=account.usage.num_prompt_tokens,
        cached_token_count=account.usage.num_cached_tokens,
        completion_token_count=account.usage.num_completion_tokens,
    )
