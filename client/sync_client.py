"""`Client`: the SDK for threads."""

import copy
import os
import random
import time
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack

import grpc
from google.protobuf.wrappers_pb2 import StringValue

from quire.client import wire
from quire.client.channel import health_method, open_channel, serving_status
from quire.client.options import ChatOptions, GenerateOptions, Message
from quire.client.results import Generation, Group, GroupBlocks, Model, Queue, ServingStatus, TokenizedPrompt
from quire.client.retries import Tries
from quire.client.rpc_errors import error_from_rpc
from quire.client.settings import DEFAULT_MAX_RETRIES, DEFAULT_TIMEOUT_S, call_timeout_s, changed, resolve_settings
from quire.client.stream import Stream
from quire.client.trace_context import Metadata, traced
from quire.common.errors import Cancelled, QuireError
from quire.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

Request = TypeVar("Request")
Response = TypeVar("Response")


class Client:
    """A connection to a Quire server. Safe to share among threads.

    Every call raises a QuireError of the kind that says what went wrong. Calls that met an overloaded or absent server are
    tried again up to `max_retries` times while nothing of their answer has been received.
    """

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
        """Connects at the first call.

        address:      host:port; else QUIRE_ADDRESS, else 127.0.0.1:50051
        api_key:      sent as a bearer token; else as for api_key_file
        secure:       TLS, by the system's certificate authorities
        tls_ca:       TLS, by the certificate authorities in this PEM file
        tls_cert:     TLS, with this certificate (PEM file) and tls_key for a server that asks for one
        api_key_file: file with the API key; else QUIRE_API_KEY, else the file that QUIRE_API_KEY_FILE names
        timeout_s:    of each call, retries included

        Raises:
            ConfigError: a setting that cannot work, such as an API key that would travel unencrypted.
        """
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
        self._channel = open_channel(self._settings)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)

    @property
    def address(self) -> str:
        return self._settings.address

    @property
    def cluster(self) -> "ClusterCalls":
        """Looking at the cluster and steering it."""
        return ClusterCalls(self)

    def with_options(self, *, timeout_s: float | None = None, max_retries: int | None = None) -> Self:
        """This client with other limits, on the same connection: closing either closes both."""
        client = copy.copy(self)
        client._settings = changed(self._settings, timeout_s=timeout_s, max_retries=max_retries)
        return client

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Generation:
        """Continue a text, or token ids, and return when every sequence has ended."""
        return self._generate(wire.generate_request(prompt, options), options)

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Stream:
        """Continue a text, or token ids, delta by delta."""
        return self._stream(wire.generate_request(prompt, options), options)

    def chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Generation:
        """The assistant's next turn of a conversation. Messages are {"role": ..., "content": ...} or (role, content)."""
        return self._generate(wire.chat_request(messages, options), options)

    def chat_stream(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Stream:
        """The assistant's next turn, delta by delta."""
        return self._stream(wire.chat_request(messages, options), options)

    def tokenize(
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
        return wire.tokenized_prompt(self._call(self._inference.Tokenize, request))

    def detokenize(self, token_ids: Sequence[int], *, model: str | None = None, skip_special_tokens: bool | None = None) -> str:
        """The text of token ids, with U+FFFD where they are not whole characters."""
        request = wire.detokenize_request(token_ids, model=model, skip_special_tokens=skip_special_tokens)
        return self._call(self._inference.Detokenize, request).text

    def models(self) -> tuple[Model, ...]:
        """The models that can be named in a request, by name."""
        return wire.models(self._call(self._inference.ListModels, inference_pb2.ListModelsRequest()))

    def health(self, service: str = "") -> ServingStatus:
        """Whether the server, or one gRPC service of it, takes requests.

        Raises:
            NotFound: there is no such service.
        """
        return serving_status(self._call(health_method(self._channel), StringValue(value=service)))

    def close(self) -> None:
        """End the connection and every call that runs on it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _generate(self, request: inference_pb2.GenerateRequest, options: GenerateOptions | ChatOptions) -> Generation:
        return wire.generation(self._call(self._inference.Generate, request, timeout_s=options.get("timeout_s")))

    def _stream(self, request: inference_pb2.GenerateRequest, options: GenerateOptions | ChatOptions) -> Stream:
        timeout_s = call_timeout_s(self._settings, options.get("timeout_s"))

        def open_call(time_left_s: float | None) -> Any:
            def make(metadata: Metadata) -> Any:
                return self._inference.GenerateStream(request, timeout=time_left_s, metadata=metadata)

            return traced(make, self._settings.metadata, request)

        return Stream(open_call, tries=self._tries(timeout_s), as_error=self._as_error(timeout_s))

    def _call(
        self, method: "grpc.UnaryUnaryMultiCallable[Request, Response]", request: Request, *, timeout_s: float | None = None
    ) -> Response:
        """Make one call, with its retries."""
        timeout_s = call_timeout_s(self._settings, timeout_s)
        tries = self._tries(timeout_s)
        while True:
            make = partial(method.future, request, tries.time_left_s(time.monotonic()))
            call = traced(make, self._settings.metadata, request)
            try:
                return call.result()
            except grpc.RpcError as rpc_error:
                error = self._as_error(timeout_s)(rpc_error)
                delay_s = tries.delay_after_s(error, now_s=time.monotonic())
                if delay_s is None:
                    raise error from rpc_error
                time.sleep(delay_s)
            except grpc.FutureCancelledError:
                raise Cancelled("the client was closed during the call") from None
            except BaseException:  # Ctrl-C: the server is to stop too
                call.cancel()
                raise

    def _tries(self, timeout_s: float) -> Tries:
        return Tries(max_retries=self._settings.max_retries, deadline_s=time.monotonic() + timeout_s, rng=self._rng)

    def _as_error(self, timeout_s: float) -> "partial[QuireError]":
        return partial(error_from_rpc, address=self._settings.address, timeout_s=timeout_s)


class ClusterCalls:
    """Looking at the cluster and steering it."""

    def __init__(self, client: Client) -> None:
        self._client: Final = client

    def groups(self) -> tuple[Group, ...]:
        """The worker groups, by id."""
        return wire.groups(self._client._call(self._client._cluster.ListGroups, cluster_pb2.ListGroupsRequest()).groups)

    def queue(self) -> Queue:
        """What waits for a group, and what runs."""
        return wire.queue(self._client._call(self._client._cluster.GetQueue, cluster_pb2.GetQueueRequest()))

    def blocks(self, group_id: str | None = None) -> tuple[GroupBlocks, ...]:
        """The block pools of one group, or of all.

        Raises:
            NotFound: there is no such group.
        """
        return wire.group_blocks(self._client._call(self._client._cluster.GetBlocks, cluster_pb2.GetBlocksRequest(group_id=group_id)))

    def drain(self, group_id: str) -> Group:
        """Take a group out of service: it finishes what it runs and gets nothing new. Returns at once; watch its state.

        Raises:
            NotFound: there is no such group.
        """
        return wire.group(self._client._call(self._client._cluster.DrainGroup, cluster_pb2.DrainGroupRequest(group_id=group_id)).group)

    def scale(self, model: str, num_groups: int) -> tuple[Group, ...]:
        """Give a model so many groups: new ones start, or the newest drain and are removed. Returns its groups at once; watch them.

        Raises:
            NotFound: there is no such model.
            ConfigError: there is no place for so many; the message has the arithmetic.
        """
        request = cluster_pb2.ScaleModelRequest(model=model, group_count=num_groups)
        return wire.groups(self._client._call(self._client._cluster.ScaleModel, request).groups)

    def restart(self, *, group_id: str | None = None, model: str | None = None) -> tuple[Group, ...]:
        """Restart one group, or all of a model, one after the other: each drains, and is ready again before the next begins. Returns
        at once those whose turn will come; watch them.

        Raises:
            NotFound: there is no such group or model.
            ConfigError: none of them runs.
        """
        request = wire.restart_request(group_id, model)
        return wire.groups(self._client._call(self._client._cluster.RestartGroups, request).groups)
