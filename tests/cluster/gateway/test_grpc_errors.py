"""What a call ends with when it fails: everything of our own errors, nothing of others."""

import logging
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from quire.cluster.gateway.grpc_errors import errors_as_status
from quire.cluster.rich_status import DETAILS_KEY, MAX_METADATA_CHARS, MAX_METADATA_ENTRIES, duration_of, status_of
from quire.common.errors import InternalError, InvalidRequest, Overloaded, QuireError


class FakeContext:
    """A call that remembers what it was ended with."""

    def __init__(self) -> None:
        self.aborted: Any = None

    async def abort(self, *status: object) -> None:
        self.aborted = status
        raise grpc.aio.AbortError


async def end_with(error: Exception) -> Any:
    context: Any = FakeContext()
    with pytest.raises(grpc.aio.AbortError):
        async with errors_as_status(context):
            raise error
    return context.aborted


async def test_an_unexpected_error_says_nothing_of_what_was_inside(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        code, message, metadata = await end_with(KeyError("another secret", "/some/path"))
    assert code is grpc.StatusCode.INTERNAL
    for word in ("secret", "/"):
        assert word not in message + caplog.messages[0]
        assert word.encode() not in metadata[0][1].partition(b"type.googleapis.com/")[0]
    assert b"secret" not in metadata[0][1]
    assert "KeyError in" in caplog.text
    assert "end_with" in caplog.text


@pytest.mark.parametrize("error", [InvalidRequest("no", field="n"), Overloaded("full", retry_after_s=0.5), InternalError("odd")])
async def test_our_errors_go_out_as_they_are(error: QuireError) -> None:
    assert await end_with(error) == status_of(error)


def test_a_status_has_the_reason_the_field_and_the_delay() -> None:
    error = Overloaded("full", reason="QUEUE_FULL", metadata={"waiting": "9"}, field="text", retry_after_s=1.25)
    code, message, ((key, value),) = status_of(error)
    assert (code, message, key) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full", DETAILS_KEY)
    status = status_pb2.Status.FromString(value)
    assert (status.code, status.message, len(status.details)) == (8, "full", 3)
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail, packed in zip((info, bad, retry), status.details, strict=True):
        assert packed.Unpack(detail)
    assert (info.reason, info.domain, dict(info.metadata)) == ("QUEUE_FULL", "quire.dev", {"waiting": "9"})
    assert [(violation.field, violation.description) for violation in bad.field_violations] == [("text", "full")]
    assert retry.retry_delay.ToMilliseconds() == 1250


def test_the_largest_status_fits_into_a_clients_metadata() -> None:
    error = InvalidRequest("x" * 10_000, metadata={f"{number:03}": "y" * 1000 for number in range(100)}, field="prompt", retry_after_s=1)
    _, message, ((_, value),) = status_of(error)
    assert len(message) + len(value) * 4 / 3 < 8192
    info = error_details_pb2.ErrorInfo()
    status_pb2.Status.FromString(value).details[0].Unpack(info)
    assert {len(text) for text in info.metadata.values()} == {MAX_METADATA_CHARS}
    assert len(info.metadata) == MAX_METADATA_ENTRIES


def test_a_negative_span_is_zero() -> None:
    assert duration_of(-1e-9).ToNanoseconds() == 0
    assert duration_of(1.5).ToMilliseconds() == 1500
