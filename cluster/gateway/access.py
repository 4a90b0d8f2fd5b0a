"""Who may call what. Stands before the handlers of all services and before a request is read."""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc

from quire.cluster.gateway import health_service
from quire.cluster.gateway.grpc_errors import Context, errors_as_status
from quire.cluster.gateway.tenants import LOCAL_CALLER, Caller, Role
from quire.cluster.gateway.tokens import TokenFile
from quire.common.clock import Clock, monotonic
from quire.common.errors import PermissionDenied, Unauthenticated
from quire.v1 import cluster_pb2

# Load balancers and probes have no token; Watch, which holds a place, needs one.
_OPEN_METHODS: Final = frozenset({f"/{health_service.SERVICE}/Check"})
# What shows or steers more than the caller's own requests.
_ADMIN_PREFIX: Final = f"/{cluster_pb2.DESCRIPTOR.services_by_name['ClusterService'].full_name}/"
_SCHEME: Final = "bearer "


class Access(grpc.aio.ServerInterceptor):
    """Knows each caller by its token; everyone is LOCAL_CALLER where there is no token file."""

    def __init__(self, tokens: TokenFile | None, *, clock: Clock = monotonic) -> None:
        self._tokens = tokens
        self._clock = clock

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """The handler of a call, which RequestReader gave the form of one that takes a stream."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        assert handler.request_streaming, method
        inner = handler.stream_stream if handler.response_streaming else handler.stream_unary

        async def behaviour(requests: Any, context: Context) -> Any:
            async with errors_as_status(context):
                self.check(method, context)
            return await inner(requests, context)

        make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
        return make(behaviour, request_deserializer=None, response_serializer=handler.response_serializer)

    def check(self, method: str, context: Context) -> None:
        """
        Raises:
            Unauthenticated: a token is asked for and it has none that is known.
            PermissionDenied: its role is not enough.
        """
        if method in _OPEN_METHODS:
            return
        caller = self.caller_of(context)
        if method.startswith(_ADMIN_PREFIX) and caller.role is not Role.ADMIN:
            text = f"{method} shows or steers the whole cluster and takes role admin; this token has role {caller.role.value}"
            raise PermissionDenied(text, reason="NOT_ADMIN", metadata={"role": caller.role.value})

    def caller_of(self, context: Context) -> Caller:
        """Who calls.

        Raises:
            Unauthenticated: it says so without repeating any of what was sent.
        """
        if self._tokens is None:
            return LOCAL_CALLER
        metadata: Any = context.invocation_metadata()
        sent = [value for key, value in metadata or () if key == "authorization"]
        if not sent:
            raise Unauthenticated("this server asks for a token and the call has none; set QUIRE_API_KEY or api_key", reason="NO_TOKEN")
        caller = None
        if len(sent) == 1 and isinstance(sent[0], str) and sent[0].lower().startswith(_SCHEME):
            caller = self._tokens.find(sent[0][len(_SCHEME) :].strip(), now_s=self._clock())
        if caller is None:
            text = "the token of this call is not known here; check QUIRE_API_KEY or api_key, or ask for a new one"
            raise Unauthenticated(text, reason="UNKNOWN_TOKEN")
        return caller
