"""`AsyncClient`: the SDK for asyncio."""

import asyncio
import copy
import os
import random
import time
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack

import grpc
import grpc.aio
from google.protobuf.wrappers_pb2 import StringValue

from quire.client import wire
from quire.client.async_stream import CLOSED, AsyncStream, task_is_cancelled
from quire.client.channel import aio_health_method, open_aio_channel, serving_status
from quire.client.options import ChatOptions, GenerateOptions, Message
from quire.client.results import Generation, Group, GroupBlocks, Model, Queue, ServingStatus, TokenizedPrompt
from quire.client.retries import Tries
from quire.client.rpc_errors import error_from_rpc
from quire.client.settings import (
    DEFAULT_MAX_RETRIES,
    DEFAULT_TIMEOUT_S,
    ClientSettings,
    call_timeout_s,
    changed,
    resolve_settings,
)
from quire.client.trace_context import Call, Metadata, traced
from quire.common.errors import Cancelled, QuireError
from quire.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

Request = TypeVar("Request")
Response = TypeVar("Response")


class AsyncClient:
    """A connection to a Quire server, for one event loop. The methods are those of `Client`, which tells more of each."""

    def __init__(
        self,
        address: str | None = None,
        *,
        api_key: str | None = None,
        secure: bool = False,
        tls_ca: str | os.PathLike[str] | None = None,
        tls_cert: str | os.PathLike[str] | None = None,
        tls_key: str | os.PathLike[str] | None = None,
        api_key_file: str | os.PathLike[str] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
    ) -> None:
        """As `Client`. May be made outside the event loop; it belongs to the loop of its first call."""
        self._settings = resolve_settings(
            address,
            api_key=api_key,
            secure=secure,
            tls_ca=tls_ca,
            tls_cert=tls_cert,
            tls_key=tls_key,
            api_key_file=api_key_file,
            timeout_s=timeout_s,
            max_retries=max_retries,
        )
        self._rng = random.Random()
        self._connection = _Connection(self._settings)

    @property
    def address(self) -> str:
        return self._settings.address

    @property
    def cluster(self) -> "AsyncClusterCalls":
        """Looking at the cluster and steering it."""
        return AsyncClusterCalls(self)

    def with_options(self, *, timeout_s: float | None = None, max_retries: int | None = None) -> Self:
        """This client with other limits, on the same connection: closing either closes both."""
        client = copy.copy(self)
        client._settings = changed(self._settings, timeout_s=timeout_s, max_retries=max_retries)
        return client

    async def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Generation:
        """Continue a text, or token ids, and return when every sequence has ended."""
        return await self._generate(wire.generate_request(prompt, options), options)

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Continue a text, or token ids, delta by delta."""
        return self._stream(wire.generate_request(prompt, options), options)

    async def chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Generation:
        """The assistant's next turn of a conversation. Messages are {"role": ..., "content": ...} or (role, content)."""
        return await self._generate(wire.chat_request(messages, options), options)

    def chat_stream(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> AsyncStream:
        """The assistant's next turn, delta by delta."""
        return self._stream(wire.chat_request(messages, options), options)

    async def tokenize(
        self,
        prompt: str | Sequence[Message],
        *,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        parse_special_tokens: bool | None = None,
        tools: Sequence[str | Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
    ) -> TokenizedPrompt:
        """The token ids that `generate` would compute for a text, or `chat` for a conversation."""
        request = wire.tokenize_request(
            prompt,
            model=model,
            add_special_tokens=add_special_tokens,
            parse_special_tokens=parse_special_tokens,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
        )
        return wire.tokenized_prompt(await self._call(self._connection.inference.Tokenize, request))

    async def detokenize(self, token_ids: Sequence[int], *, model: str | None = None, skip_special_tokens: bool | None = None) -> str:
        """The text of token ids, with U+FFFD where they are not whole characters."""
        request = wire.detokenize_request(token_ids, model=model, skip_special_tokens=skip_special_tokens)
        return (await self._call(self._connection.inference.Detokenize, request)).text

    async def models(self) -> tuple[Model, ...]:
        """The models that can be named in a request, by name."""
        return wire.models(await self._call(self._connection.inference.ListModels, inference_pb2.ListModelsRequest()))

    async def health(self, service: str = "") -> ServingStatus:
        """Whether the server, or one gRPC service of it, takes requests.

        Raises:
            NotFound: there is no such service.
        """
        return serving_status(await self._call(aio_health_method(self._connection.channel), StringValue(value=service)))

    async def close(self) -> None:
        """End the connection and every call that runs on it."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.close()

    async def _generate(self, request: inference_pb2.GenerateRequest, options: GenerateOptions | ChatOptions) -> Generation:
        response = await self._call(self._connection.inference.Generate, request, timeout_s=options.get("timeout_s"))
        return wire.generation(response)

    def _stream(self, request: inference_pb2.GenerateRequest, options: GenerateOptions | ChatOptions) -> AsyncStream:
        timeout_s = call_timeout_s(self._settings, options.get("timeout_s"))

        def open_call(time_left_s: float | None) -> "grpc.aio.UnaryStreamCall[Any, inference_pb2.GenerateStreamResponse]":
            def make(metadata: Metadata) -> "grpc.aio.UnaryStreamCall[Any, inference_pb2.GenerateStreamResponse]":
                return self._connection.inference.GenerateStream(request, timeout=time_left_s, metadata=metadata)

            return self._connection.watch(traced(make, self._settings.metadata, request))

        return AsyncStream(open_call, tries=self._tries(timeout_s), as_error=self._as_error(timeout_s))

    async def _call(
        self, method: "grpc.aio.UnaryUnaryMultiCallable[Request, Response]", request: Request, *, timeout_s: float | None = None
    ) -> Response:
        """Make one call, with its retries."""
        timeout_s = call_timeout_s(self._settings, timeout_s)
        tries = self._tries(timeout_s)
        while True:
            time_left_s = tries.time_left_s(time.monotonic())

            def make(metadata: Metadata, time_left_s: float | None = time_left_s) -> "grpc.aio.UnaryUnaryCall[Request, Response]":
                return method(request, timeout=time_left_s, metadata=metadata)

            try:
                return await self._connection.watch(traced(make, self._settings.metadata, request))
            except grpc.RpcError as rpc_error:
                error = self._as_error(timeout_s)(rpc_error)
                delay_s = tries.delay_after_s(error, now_s=time.monotonic())
                if delay_s is None:
                    raise error from rpc_error
                await asyncio.sleep(delay_s)
            except asyncio.CancelledError:
                if task_is_cancelled():
                    raise
                raise Cancelled(CLOSED) from None

    def _tries(self, timeout_s: float) -> Tries:
        return Tries(max_retries=self._settings.max_retries, deadline_s=time.monotonic() + timeout_s, rng=self._rng)

    def _as_error(self, timeout_s: float) -> "partial[QuireError]":
        return partial(error_from_rpc, address=self._settings.address, timeout_s=timeout_s)


class AsyncClusterCalls:
    """Looking at the cluster and steering it, as `Client.cluster`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client: Final = client

    async def groups(self) -> tuple[Group, ...]:
        """The worker groups, by id."""
        return wire.groups((await self._client._call(self._stub.ListGroups, cluster_pb2.ListGroupsRequest())).groups)

    async def queue(self) -> Queue:
        """What waits for a group, and what runs."""
        return wire.queue(await self._client._call(self._stub.GetQueue, cluster_pb2.GetQueueRequest()))

    async def blocks(self, group_id: str | None = None) -> tuple[GroupBlocks, ...]:
        """The block pools of one group, or of all.

        Raises:
            NotFound: there is no such group.
        """
        return wire.group_blocks(await self._client._call(self._stub.GetBlocks, cluster_pb2.GetBlocksRequest(group_id=group_id)))

    async def drain(self, group_id: str) -> Group:
        """Take a group out of service: it finishes what it runs and gets nothing new. Returns at once; watch its state.

        Raises:
            NotFound: there is no such group.
        """
        return wire.group((await self._client._call(self._stub.DrainGroup, cluster_pb2.DrainGroupRequest(group_id=group_id))).group)

    async def scale(self, model: str, num_groups: int) -> tuple[Group, ...]:
        """Give a model so many groups: new ones start, or the newest drain and are removed. Returns its groups at once; watch them.

        Raises:
            NotFound: there is no such model.
            ConfigError: there is no place for so many; the message has the arithmetic.
        """
        request = cluster_pb2.ScaleModelRequest(model=model, group_count=num_groups)
        return wire.groups((await self._client._call(self._stub.ScaleModel, request)).groups)

    async def restart(self, *, group_id: str | None = None, model: str | None = None) -> tuple[Group, ...]:
        """Restart one group, or all of a model, one after the other: each drains, and is ready again before the next begins. Returns
        at once those whose turn will come; watch them.

        Raises:
            NotFound: there is no such group or model.
            ConfigError: none of them runs.
        """
        request = wire.restart_request(group_id, model)
        return wire.groups((await self._client._call(self._stub.RestartGroups, request)).groups)

    @property
    def _stub(self) -> "cluster_pb2_grpc.ClusterServiceAsyncStub":
        return self._client._connection.cluster


class _Connection:
    """The channel and its stubs, made at the first call: gRPC binds them to the event loop that runs then."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._calls: weakref.WeakSet[Any] = weakref.WeakSet()

    def watch(self, call: Call) -> Call:
        """The call, which closing will end. gRPC's own close looks for calls in the frames of tasks, and so misses those that a
        task has between two reads."""
        self._calls.add(call)
        return call

    @cached_property
    def channel(self) -> grpc.aio.Channel:
        return open_aio_channel(self._settings)

    @cached_property
    def inference(self) -> "inference_pb2_grpc.InferenceServiceAsyncStub":
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @cached_property
    def cluster(self) -> "cluster_pb2_grpc.ClusterServiceAsyncStub":
        return cluster_pb2_grpc.ClusterServiceStub(self.channel)

    async def close(self) -> None:
        for call in list(self._calls):
            call.cancel()
        if "channel" in self.__dict__:
            await self.channel.close()
