"""The client SDK of Quire.

    from quire.client import Client

    with Client("127.0.0.1:50051") as client:
        print(client.generate("Once upon a time", max_tokens=64).text)
        for delta in client.stream("Once upon a time", max_tokens=64):
            print(delta.text, end="", flush=True)

`AsyncClient` has the same methods for asyncio. Whatever goes wrong is raised as one of the errors below, each with
`reason`, `field`, `metadata` and `retry_after_s`.
"""

from quire.client.async_client import AsyncClient
from quire.client.async_stream import AsyncStream
from quire.client.options import ChatOptions, GenerateOptions, Message
from quire.client.results import (
    BlockPool,
    Choice,
    Delta,
    Generation,
    Group,
    GroupBlocks,
    Model,
    Queue,
    Rank,
    Timings,
    TokenizedPrompt,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from quire.client.stream import Stream
from quire.client.sync_client import Client
from quire.common.errors import (
    AlreadyExists,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    NotSupported,
    Overloaded,
    PermissionDenied,
    QuireError,
    Unauthenticated,
    Unavailable,
)

__all__ = [
    "AlreadyExists",
    "AsyncClient",
    "AsyncStream",
    "BlockPool",
    "Cancelled",
    "ChatOptions",
    "Choice",
    "Client",
    "ConfigError",
    "DeadlineExceeded",
    "Delta",
    "GenerateOptions",
    "Generation",
    "Group",
    "GroupBlocks",
    "InternalError",
    "InvalidRequest",
    "Message",
    "Model",
    "NotFound",
    "NotSupported",
    "Overloaded",
    "PermissionDenied",
    "Queue",
    "QuireError",
    "Rank",
    "Stream",
    "Timings",
    "TokenLogprob",
    "TokenLogprobs",
    "TokenizedPrompt",
    "Unauthenticated",
    "Unavailable",
    "Usage",
]
