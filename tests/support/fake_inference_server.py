"""A gRPC server with Quire's services whose answers a test writes down: the other side of the SDK's edge.

with FakeServer() as server:
    server.script = [fail(...), Reply(...)]        # one entry per request; the last one repeats
    Client(server.address).generate("x")
    assert server.requests[0].text == "x"
"""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from google.rpc import error_details_pb2, status_pb2

from quire.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc


@dataclass(frozen=True)
class Reply:
    """The words of each sequence; a token per word, its id the word's place. A stream sends them interleaved by index.

    pause_s:  between two messages of a stream
    hang:     the stream stays open after its words until the client goes
    fail:     the stream ends with this error after its words
    """

    sequences: Sequence[Sequence[str]] = (("Once ", "upon ", "a ", "time."),)
    finish_reason: "inference_pb2.FinishReason.ValueType" = inference_pb2.FINISH_REASON_LENGTH
    pause_s: float = 0.0
    hang: bool = False
    fail: "Failure | None" = None


@dataclass(frozen=True)
class Failure:
    """An error as the gateway sends it; `plain` leaves out every detail, as gRPC itself does."""

    code: grpc.StatusCode
    message: str = "no"
    reason: str = "TEST"
    metadata: dict[str, str] = field(default_factory=dict)
    field: str | None = None
    retry_after_s: float | None = None
    plain: bool = False

    def abort(self, context: grpc.ServicerContext) -> None:
        if self.plain:
            context.abort(self.code, self.message)
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain="quire.dev", metadata=self.metadata)
        details: list[Any] = [info]
        if self.field is not None:
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after_s is not None:
            delay = Duration()
            delay.FromNanoseconds(int(self.retry_after_s * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(self.code, self.message)


USAGE = inference_pb2.Usage(prompt_token_count=3, cached_token_count=1)
TIMINGS = inference_pb2.Timings(queue=Duration(nanos=1_000_000), total=Duration(seconds=1, nanos=500_000_000), preemption_count=2)


class FakeServer(inference_pb2_grpc.InferenceServiceServicer, cluster_pb2_grpc.ClusterServiceServicer):
    """Everything that it was asked is kept, in order, in `requests` and `metadata`."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.script: list[Reply | Failure] = [Reply()]
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.asked = threading.Event()  # the first request has come
        self.cancelled = threading.Event()  # a client went away in the middle of a stream
        self.groups = [fake_group("group-0")]
        self.queue = cluster_pb2.GetQueueResponse(
            waiting_request_count=2, waiting_token_count=30, max_waiting_request_count=4096, max_waiting_token_count=8_000_000
        )
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=16))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(self, self._server)
        health = grpc.unary_unary_rpc_method_handler(
            self._check_health, request_deserializer=StringValue.FromString, response_serializer=Int32Value.SerializeToString
        )
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": health})])
        where = "127.0.0.1:0"
        port = self._server.add_secure_port(where, credentials) if credentials else self._server.add_insecure_port(where)
        self.address = f"127.0.0.1:{port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop(grace=None).wait()

    def Generate(self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext) -> inference_pb2.GenerateResponse:
        reply = self._next(request, context)
        if reply.hang:
            self._watch(context).wait(10)
        completions = [
            inference_pb2.Completion(index=index, text="".join(words), token_ids=range(len(words)), finish_reason=reply.finish_reason)
            for index, words in enumerate(reply.sequences)
        ]
        return inference_pb2.GenerateResponse(
            request_id=request.request_id or "r1", model="fake", completions=completions, usage=_usage(reply), timings=TIMINGS, seed=7
        )

    def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateStreamResponse]:
        reply = self._next(request, context)
        gone = self._watch(context) if reply.hang else threading.Event()
        messages = list(_stream_messages(reply, request_id=request.request_id or "r1"))
        for message in messages[: -1 if reply.hang else None]:
            yield message
            time.sleep(reply.pause_s)
        if reply.fail is not None:
            reply.fail.abort(context)
        if reply.hang:
            gone.wait(10)

    def ListModels(self, request: inference_pb2.ListModelsRequest, context: grpc.ServicerContext) -> inference_pb2.ListModelsResponse:
        self._record(request, context)
        return inference_pb2.ListModelsResponse(models=[inference_pb2.Model(name="fake", default=True, max_model_len=64, vocab_size=4096)])

    def Tokenize(self, request: inference_pb2.TokenizeRequest, context: grpc.ServicerContext) -> inference_pb2.TokenizeResponse:
        self._record(request, context)
        rendered = "rendered" if request.HasField("chat") else None
        return inference_pb2.TokenizeResponse(token_ids=[1, 2], rendered=rendered)

    def Detokenize(self, request: inference_pb2.DetokenizeRequest, context: grpc.ServicerContext) -> inference_pb2.DetokenizeResponse:
        self._record(request, context)
        return inference_pb2.DetokenizeResponse(text=" ".join(map(str, request.token_ids)))

    def ListGroups(self, request: cluster_pb2.ListGroupsRequest, context: grpc.ServicerContext) -> cluster_pb2.ListGroupsResponse:
        self._record(request, context)
        return cluster_pb2.ListGroupsResponse(groups=self.groups)

    def GetQueue(self, request: cluster_pb2.GetQueueRequest, context: grpc.ServicerContext) -> cluster_pb2.GetQueueResponse:
        self._record(request, context)
        return self.queue

    def GetBlocks(self, request: cluster_pb2.GetBlocksRequest, context: grpc.ServicerContext) -> cluster_pb2.GetBlocksResponse:
        self._record(request, context)
        found = [group for group in self.groups if not request.HasField("group_id") or group.group_id == request.group_id]
        blocks = [
            cluster_pb2.GroupBlocks(group_id=group.group_id, gpu_blocks=group.gpu_blocks, gpu_ref_counts=b"\x01\x00") for group in found
        ]
        return cluster_pb2.GetBlocksResponse(groups=blocks)

    def DrainGroup(self, request: cluster_pb2.DrainGroupRequest, context: grpc.ServicerContext) -> cluster_pb2.DrainGroupResponse:
        self._record(request, context)
        for group in self.groups:
            if group.group_id == request.group_id:
                group.state = cluster_pb2.GROUP_STATE_DRAINING
                return cluster_pb2.DrainGroupResponse(group=group)
        Failure(grpc.StatusCode.NOT_FOUND, f"there is no group {request.group_id}", reason="GROUP_NOT_FOUND").abort(context)
        raise AssertionError("abort raises")

    def ScaleModel(self, request: cluster_pb2.ScaleModelRequest, context: grpc.ServicerContext) -> cluster_pb2.ScaleModelResponse:
        self._record(request, context)
        if request.group_count > len(self.groups):
            Failure(grpc.StatusCode.FAILED_PRECONDITION, "there is no place for so many", reason="NO_PLACE").abort(context)
        return cluster_pb2.ScaleModelResponse(groups=self.groups[: request.group_count])

    def RestartGroups(self, request: cluster_pb2.RestartGroupsRequest, context: grpc.ServicerContext) -> cluster_pb2.RestartGroupsResponse:
        self._record(request, context)
        found = [group for group in self.groups if request.group_id == group.group_id or request.model == group.model]
        if not found:
            Failure(grpc.StatusCode.NOT_FOUND, f"there is no {request.group_id or request.model}", reason="NOT_FOUND").abort(context)
        return cluster_pb2.RestartGroupsResponse(groups=found)

    def _check_health(self, request: StringValue, context: grpc.ServicerContext) -> Int32Value:
        if request.value not in ("", "quire.v1.InferenceService"):
            context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.value}")
        return Int32Value(value=1)

    def _next(self, request: Any, context: grpc.ServicerContext) -> Reply:
        entry = self._record(request, context)
        if isinstance(entry, Failure):
            entry.abort(context)
        assert isinstance(entry, Reply)
        return entry

    def _record(self, request: Any, context: grpc.ServicerContext) -> Reply | Failure:
        with self._lock:
            self.requests.append(request)
            self.asked.set()
            self.metadata.append({str(key): str(value) for key, value in context.invocation_metadata()})
            generates = isinstance(request, inference_pb2.GenerateRequest)
            return self.script.pop(0) if generates and len(self.script) > 1 else self.script[0]

    def _watch(self, context: grpc.ServicerContext) -> threading.Event:
        """Set when the client goes away, from now on or before."""
        gone = threading.Event()

        def went() -> None:
            gone.set()
            self.cancelled.set()

        if not context.add_callback(went):
            went()
        return gone


def fake_group(group_id: str, *, num_held: int = 3) -> cluster_pb2.Group:
    return cluster_pb2.Group(
        group_id=group_id,
        model="fake",
        state=cluster_pb2.GROUP_STATE_READY,
        term=1,
        tensor_parallel_size=1,
        ranks=[cluster_pb2.Rank(rank=0, device="cpu", pid=4711, host="here")],
        running_sequence_count=2,
        gpu_blocks=cluster_pb2.BlockPoolState(total=128, free=123 - num_held, cached=5, held=num_held, block_size=16, block_bytes=65536),
        cpu_blocks=cluster_pb2.BlockPoolState(block_size=16, block_bytes=65536),
        step_count=99,
    )


def _usage(reply: Reply) -> inference_pb2.Usage:
    usage = inference_pb2.Usage()
    usage.CopyFrom(USAGE)
    usage.completion_token_count = sum(map(len, reply.sequences))
    return usage


def _stream_messages(reply: Reply, *, request_id: str) -> Iterator[inference_pb2.GenerateStreamResponse]:
    """One word of each sequence in turn; the last message of all carries usage, timings and seed."""
    longest = max(map(len, reply.sequences))
    places = [(place, index) for place in range(longest) for index, words in enumerate(reply.sequences) if place < len(words)]
    for place, index in places:
        words = reply.sequences[index]
        message = inference_pb2.GenerateStreamResponse(
            request_id=request_id, model="fake", index=index, text_delta=words[place], token_ids=[place]
        )
        if place == len(words) - 1 and reply.fail is None:
            message.finish_reason = reply.finish_reason
        if (place, index) == places[-1] and reply.fail is None:
            message.usage.CopyFrom(_usage(reply))
            message.timings.CopyFrom(TIMINGS)
            message.seed = 7
        yield message
