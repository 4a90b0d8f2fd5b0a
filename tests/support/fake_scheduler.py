"""A scheduler and a controller as a gateway sees them: real sockets, scripted answers."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import zmq
import zmq.asyncio

from quire.cluster.rich_status import status_of
from quire.common.errors import ConfigError, NotFound, StatusCode
from quire.common.messages import (
    PROTOCOL_VERSION,
    Accepted,
    Cancel,
    EndReason,
    Failed,
    Finish,
    Finished,
    Hello,
    Logprobs,
    ModelLimits,
    PromptLogprobs,
    Rejected,
    SessionDown,
    SessionUp,
    Spans,
    Submit,
    Tokens,
    UsageCounts,
    Welcome,
    decode_session_down,
    encode,
)
from quire.internal.v1 import discovery_pb2
from quire.internal.v1.discovery_pb2_grpc import DiscoveryServiceServicer, add_DiscoveryServiceServicer_to_server
from quire.v1 import cluster_pb2, inference_pb2
from quire.v1.cluster_pb2_grpc import ClusterServiceServicer, add_ClusterServiceServicer_to_server

DEMO_MODEL = Path(__file__).parents[2] / "src" / "quire" / "demo_model"
CHUNK_BYTES = 64 * 1024
NO_GROUP = NotFound("no group of that name", reason="GROUP_NOT_FOUND", metadata={"group": "g9"}, field="group_id")


@dataclass
class Script:
    """What a request's answer is. Token ids that end before max_tokens end with STOP, at the last one if it is a stop id."""

    token_ids: Sequence[int] = ()
    group_sizes: Sequence[int] = ()  # tokens per message; 1 each when not given
    delay_s: float = 0.0  # before each message
    ends: bool = True  # False: after its tokens it goes on for ever
    others: Sequence[Sequence[int]] = ()  # token ids of the request's further sequences; those of the first when not given
    logprob: Callable[[int, int], float] = lambda sequence, offset: -1.0  # of each token, for requests that ask


@dataclass
class Answer:
    """What a request was told so far."""

    submit: Submit
    open: list[int]  # sequences that have not ended
    num_tokens: int = 0  # of those that have
    task: asyncio.Task[None] | None = None


@dataclass
class FakeScheduler:
    """Accepts everything and answers each Submit by `script`, unless `on_submit` takes it over."""

    script: Callable[[Submit], Script] = lambda submit: Script()
    on_submit: Callable[["FakeScheduler", Submit, int], None] | None = None
    welcomes: bool = True
    version: int = PROTOCOL_VERSION
    scheduler_id: str = "scheduler-1"
    session: int = 0  # raised with each Hello
    limits: tuple[ModelLimits, ...] = ()
    cumulative_logprob: float | None = None  # of each finished sequence
    received: list[SessionDown] = field(default_factory=list)
    address: str = "tcp://127.0.0.1:0"

    async def __aenter__(self) -> Self:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.bind(self.address)
        endpoint = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        self.address = endpoint.decode()
        self._handles: dict[tuple[str, int], int] = {}
        self._answers: dict[int, Answer] = {}
        self._changed = asyncio.Event()
        self.gateway = b""
        self._loop_task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [self._loop_task, *(answer.task for answer in self._answers.values() if answer.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._socket.close(linger=0)
        self._context.destroy(linger=0)

    async def wait_for(self, kind: type, *, count: int = 1, timeout_s: float = 5.0) -> Any:
        """The count-th message of a kind."""
        async with asyncio.timeout(timeout_s):
            while len(found := [message for message in self.received if isinstance(message, kind)]) < count:
                self._changed.clear()
                await self._changed.wait()
        return found[count - 1]

    def of_kind(self, kind: type) -> list[Any]:
        return [message for message in self.received if isinstance(message, kind)]

    async def send(self, message: SessionUp) -> None:
        await self._socket.send_multipart([self.gateway, encode(message)])

    async def send_raw(self, frame: bytes) -> None:
        await self._socket.send_multipart([self.gateway, frame])

    async def welcome(self) -> None:
        await self.send(Welcome(self.version, self.scheduler_id, self.limits, self.session))

    async def send_tokens(
        self, handle: int, *, offset: int, token_ids: Sequence[int], sequence: int = 0, logprobs: Logprobs | None = None
    ) -> None:
        columns = ((0, logprobs),) if logprobs is not None else ()
        await self.send(Tokens((handle,), (sequence,), (offset,), (len(token_ids),), tuple(token_ids), columns))

    async def send_finished(
        self,
        handle: int,
        submit: Submit,
        *,
        num_tokens: int,
        reason: EndReason = EndReason.STOP,
        stop_id: int | None = None,
        sequence: int = 0,
        is_last: bool = True,
    ) -> None:
        """num_tokens: of all sequences that ended so far"""
        usage = UsageCounts(len(submit.prompt_ids), len(submit.prompt_ids) // 2, num_tokens)
        spans = Spans(0.25, 0.5, 1.0, 0.125)
        await self.send(Finished(handle, sequence, reason, stop_id, is_last, usage, spans, 3, self.cumulative_logprob))

    async def reject(self, submit: Submit, code: StatusCode, reason: str, message: str, *, retry_after_s: float | None = None) -> None:
        numbers = {"waiting_requests": "4096"}
        await self.send(Rejected(submit.request_id, submit.attempt, code, reason, message, numbers, retry_after_s))

    async def fail(self, handle: int, code: StatusCode, reason: str, message: str) -> None:
        await self.send(Failed(handle, code, reason, message, True, {"group": "g0"}, 1.5))

    async def _run(self) -> None:
        while True:
            self.gateway, frame = await self._socket.recv_multipart()
            message = decode_session_down(frame)
            self.received.append(message)
            self._changed.set()
            match message:
                case Hello() if self.welcomes:
                    self.session += 1
                    await self.welcome()
                case Submit():
                    handle = len(self._handles)
                    self._handles[message.request_id, message.attempt] = handle
                    if self.on_submit is not None:
                        self.on_submit(self, message, handle)
                    else:
                        await self.send(Accepted(message.request_id, message.attempt, handle))
                        beams = range(message.n) if message.beam is not None else ()
                        answer = self._answers[handle] = Answer(message, [*beams] or [start.index for start in message.sequences])
                        answer.task = asyncio.create_task(self._answer(answer, handle))
                case Finish() | Cancel():
                    known = self._handles.get((message.request_id, message.attempt))
                    told = self._answers.get(known) if known is not None else None
                    if known is None or told is None or told.task is None:
                        continue
                    if isinstance(message, Finish):
                        if message.sequence in told.open:
                            await self._end(told, known, message.sequence, num_tokens=message.kept_tokens)
                    else:
                        told.open.clear()
                    if not told.open:
                        told.task.cancel()

    async def _answer(self, answer: Answer, handle: int) -> None:
        """All its sequences in turns, a message each."""
        submit = answer.submit
        script = self.script(submit)
        others = [*script.others] or [script.token_ids] * max(answer.open, default=0)
        texts = {index: list([script.token_ids, *others][index])[: submit.max_tokens] for index in answer.open}
        if submit.sampling.num_prompt_logprobs is not None:
            await self.send(PromptLogprobs(handle, 1, self._logprobs(submit.prompt_ids[1:], [-2.0] * (len(submit.prompt_ids) - 1))))
        offsets = dict.fromkeys(answer.open, 0) | {start.index: len(start.resumed_ids) for start in submit.sequences}
        sizes = iter(script.group_sizes)
        while any(offsets[index] < len(texts[index]) for index in answer.open):
            await asyncio.sleep(script.delay_s)
            size = next(sizes, 1)
            for index in list(answer.open):
                offset, token_ids = offsets[index], texts[index]
                news = token_ids[offset : offset + size]
                values = [script.logprob(index, offset + place) for place in range(len(news))]
                asks = submit.sampling.num_logprobs is not None
                columns = self._logprobs(news, values) if asks else None
                await self.send_tokens(handle, offset=offset, token_ids=news, sequence=index, logprobs=columns)
                offsets[index] += len(news)
                if script.ends and news and offsets[index] == len(token_ids):
                    await self._end_by_script(answer, handle, index, token_ids)
        if not script.ends:
            await asyncio.Event().wait()
        for index in list(answer.open):  # those without tokens
            await self._end_by_script(answer, handle, index, texts[index])

    async def _end_by_script(self, answer: Answer, handle: int, index: int, token_ids: Sequence[int]) -> None:
        submit = answer.submit
        stop_id = token_ids[-1] if token_ids and token_ids[-1] in submit.sampling.stop_ids else None
        reason = EndReason.LENGTH if len(token_ids) == submit.max_tokens and stop_id is None else EndReason.STOP
        await self._end(answer, handle, index, num_tokens=len(token_ids), reason=reason, stop_id=stop_id)

    async def _end(self, answer: Answer, handle: int, index: int, *, num_tokens: int, **how: Any) -> None:
        answer.open.remove(index)
        answer.num_tokens += num_tokens
        await self.send_finished(handle, answer.submit, num_tokens=answer.num_tokens, sequence=index, is_last=not answer.open, **how)

    def _logprobs(self, token_ids: Sequence[int], values: Sequence[float]) -> Logprobs:
        """Each token is the most likely one, and id 7 the only other."""
        return Logprobs(
            tuple(values),
            (1,) * len(token_ids),
            tuple((token_id, 7) for token_id in token_ids),
            tuple((value, value - 1.0) for value in values),
        )


def model_entry(
    files: dict[str, bytes],
    *,
    name: str = "quire-tales",
    vocab_size: int = 4096,
    logits_size: int = 4096,
    max_model_len: int = 2048,
    max_request_tokens: int = 2048,
    eos_token_ids: Sequence[int] = (0,),
    default_sampling: inference_pb2.SamplingParams | None = None,
    is_default: bool = False,
) -> discovery_pb2.ServedModel:
    """A model's entry in the routing table."""
    return discovery_pb2.ServedModel(
        model=inference_pb2.Model(
            name=name,
            default=is_default,
            model_type="llama",
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            chat=True,
            default_sampling=default_sampling or inference_pb2.SamplingParams(temperature=0.8, top_p=0.95),
            eos_token_ids=eos_token_ids,
            block_size=16,
        ),
        files=[
            discovery_pb2.ModelFile(name=file, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
            for file, content in files.items()
        ],
        logits_size=logits_size,
        max_request_tokens=max_request_tokens,
    )


def demo_files() -> dict[str, bytes]:
    """The tokenizer files of the built-in model."""
    return {name: (DEMO_MODEL / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}


class FakeController(DiscoveryServiceServicer, ClusterServiceServicer):
    """Discovery and the cluster service of a controller, with a routing table that tests change."""

    def __init__(self, scheduler_address: str = "") -> None:
        self.files: dict[str, bytes] = {}
        self.scheduler_address = scheduler_address
        self.models: list[discovery_pb2.ServedModel] = []
        self.group_state = cluster_pb2.GROUP_STATE_READY
        self.version = 0
        self.num_fetches = 0
        self.corrupts_files = False
        self.drained: list[str] = []
        self._changed = asyncio.Condition()
        self.address = "127.0.0.1:0"

    def serve(self, files: dict[str, bytes], **settings: Any) -> None:
        """Add a model to the table."""
        self.models.append(model_entry(files, **settings))
        self.files |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server()
        add_DiscoveryServiceServicer_to_server(self, self._server)
        add_ClusterServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(self.address)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)

    async def change(self) -> None:
        """Send the table, as it now is, to all watchers."""
        async with self._changed:
            self.version += 1
            self._changed.notify_all()

    async def Watch(self, request: discovery_pb2.WatchRequest, context: Any) -> AsyncIterator[discovery_pb2.WatchResponse]:
        seen = -1
        while True:
            async with self._changed:
                while self.version == seen:
                    await self._changed.wait()
                seen = self.version
                yield discovery_pb2.WatchResponse(
                    version=self.version,
                    scheduler_address=self.scheduler_address,
                    models=self.models,
                    groups=[
                        cluster_pb2.Group(group_id=f"{entry.model.name}/0", model=entry.model.name, state=self.group_state)
                        for entry in self.models
                    ],
                )

    async def FetchFile(self, request: discovery_pb2.FetchFileRequest, context: Any) -> AsyncIterator[discovery_pb2.FetchFileResponse]:
        self.num_fetches += 1
        content = self.files[request.sha256]
        if self.corrupts_files:
            content = bytes(reversed(content))
        for start in range(0, len(content), CHUNK_BYTES):
            yield discovery_pb2.FetchFileResponse(chunk=content[start : start + CHUNK_BYTES])

    async def ListGroups(self, request: cluster_pb2.ListGroupsRequest, context: Any) -> cluster_pb2.ListGroupsResponse:
        return cluster_pb2.ListGroupsResponse(groups=[cluster_pb2.Group(group_id="g0", state=self.group_state)])

    async def GetQueue(self, request: cluster_pb2.GetQueueRequest, context: Any) -> cluster_pb2.GetQueueResponse:
        await asyncio.Event().wait()  # for deadlines
        raise AssertionError("nobody waits so long")

    async def GetBlocks(self, request: cluster_pb2.GetBlocksRequest, context: Any) -> cluster_pb2.GetBlocksResponse:
        if request.group_id == "broken":
            raise FileNotFoundError("/home/someone/secret")
        return cluster_pb2.GetBlocksResponse(groups=[cluster_pb2.GroupBlocks(group_id=request.group_id)])

    async def DrainGroup(self, request: cluster_pb2.DrainGroupRequest, context: Any) -> cluster_pb2.DrainGroupResponse:
        if request.group_id != "g0":
            await context.abort(*status_of(NO_GROUP))
        self.drained.append(request.group_id)
        return cluster_pb2.DrainGroupResponse(group=cluster_pb2.Group(group_id="g0", state=cluster_pb2.GROUP_STATE_DRAINING))

    async def ScaleModel(self, request: cluster_pb2.ScaleModelRequest, context: Any) -> cluster_pb2.ScaleModelResponse:
        if request.group_count > 2:
            await context.abort(*status_of(ConfigError("there is no place for so many", reason="NO_PLACE")))
        groups = [cluster_pb2.Group(group_id=f"g{index}", model=request.model) for index in range(request.group_count)]
        return cluster_pb2.ScaleModelResponse(groups=groups)

    async def RestartGroups(self, request: cluster_pb2.RestartGroupsRequest, context: Any) -> cluster_pb2.RestartGroupsResponse:
        if request.group_id != "g0":
            await context.abort(*status_of(NO_GROUP))
        return cluster_pb2.RestartGroupsResponse(groups=[cluster_pb2.Group(group_id="g0", state=cluster_pb2.GROUP_STATE_DRAINING)])


def tokenizer_files(tokenizer_json: str, config: dict[str, Any], chat_template: str | None = None) -> dict[str, bytes]:
    """The files of a model whose tokenizer a test made."""
    files = {"tokenizer.json": tokenizer_json.encode(), "tokenizer_config.json": json.dumps(config).encode()}
    if chat_template is not None:
        files["chat_template.jinja"] = chat_template.encode()
    return files
