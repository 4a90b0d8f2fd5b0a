"""The synchronous client against a real gRPC server."""

import socket
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_inference_server import Failure, FakeServer, Reply

import quire.client
from quire.client import (
    Cancelled,
    Client,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    NotSupported,
    Overloaded,
    QuireError,
    Unavailable,
    retries,
)
from quire.v1 import inference_pb2

THREE = Reply(sequences=(("a ", "b ", "c"), ("d ", "e"), ("f ", "g ", "h")), finish_reason=inference_pb2.FINISH_REASON_STOP)

# For tests alone, valid until 2126. Made, on 2026-11-21, by: openssl req -x509 -nodes -days 36500 -subj /CN=localhost
# -addext "subjectAltName=DNS:localhost,IP:127.0.0.1" -newkey ec -pkeyopt ec_paramgen_curve:prime256v1
# -keyout localhost_key.pem -out localhost_certificate.pem
SUPPORT = Path(__file__).parents[1] / "support"
LOCALHOST_KEY, LOCALHOST_CERTIFICATE = SUPPORT / "localhost_key.pem", SUPPORT / "localhost_certificate.pem"


def test_generate_gives_text_ids_usage_timings_and_seed(server: FakeServer, client: Client) -> None:
    answer = client.generate("Once", max_tokens=4)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("Once upon a time.", (0, 1, 2, 3), "length")
    assert (answer.request_id, answer.model, answer.seed) == ("r1", "fake", 7)
    assert (answer.usage.num_prompt_tokens, answer.usage.num_cached_tokens, answer.usage.num_completion_tokens) == (3, 1, 4)
    assert (answer.timings.queue_s, answer.timings.total_s, answer.timings.num_preemptions) == (0.001, 1.5, 2)
    assert server.requests[0] == inference_pb2.GenerateRequest(text="Once", stopping=inference_pb2.StoppingParams(max_tokens=4))


def test_generate_takes_token_ids_and_gives_all_choices(server: FakeServer, client: Client) -> None:
    server.script = [THREE]
    answer = client.generate([5, 6], n=3)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
        (0, "a b c", "stop"),
        (1, "d e", "stop"),
        (2, "f g h", "stop"),
    ]
    assert list(server.requests[0].token_ids.ids) == [5, 6]


def test_stream_gives_deltas_of_interleaved_sequences_and_usage_with_the_last(server: FakeServer, client: Client) -> None:
    server.script = [THREE]
    deltas = list(client.stream("x", n=3))
    assert [delta.index for delta in deltas] == [0, 1, 2, 0, 1, 2, 0, 2]
    texts = ["".join(delta.text for delta in deltas if delta.index == index) for index in range(3)]
    assert texts == ["a b c", "d e", "f g h"]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, None, "stop", None, "stop", "stop"]
    assert all(delta.usage is None and delta.timings is None and delta.seed is None for delta in deltas[:-1])
    last = deltas[-1]
    assert last.usage is not None
    assert (last.usage.num_completion_tokens, last.seed) == (8, 7)


def test_chat_sends_the_conversation(server: FakeServer, client: Client) -> None:
    assert client.chat([("user", "Hello"), {"role": "assistant", "content": "Hi"}], temperature=0).text == "Once upon a time."
    assert "".join(delta.text for delta in client.chat_stream([("user", "Hello")])) == "Once upon a time."
    first, second = server.requests
    assert [(message.role, message.content) for message in first.chat.messages] == [("user", "Hello"), ("assistant", "Hi")]
    assert second.WhichOneof("prompt") == "chat"


def test_the_other_calls(server: FakeServer, client: Client) -> None:
    assert client.tokenize("x") == quire.client.TokenizedPrompt(token_ids=(1, 2), rendered=None)
    assert client.tokenize([("user", "x")]).rendered == "rendered"
    assert client.detokenize((4, 5)) == "4 5"
    assert [(model.name, model.is_default) for model in client.models()] == [("fake", True)]
    assert client.health() == "SERVING"
    with pytest.raises(NotFound, match="unknown service nothing"):
        client.health("nothing")


def test_the_cluster_calls(server: FakeServer, client: Client) -> None:
    (group,) = client.cluster.groups()
    assert (group.group_id, group.state, group.gpu_blocks.num_held, group.ranks[0].device) == ("group-0", "READY", 3, "cpu")
    assert client.cluster.queue().num_waiting_requests == 2
    assert client.cluster.blocks("group-0")[0].gpu_ref_counts == b"\x01\x00"
    assert client.cluster.blocks("other") == ()
    assert client.cluster.drain("group-0").state == "DRAINING"
    with pytest.raises(NotFound) as caught:
        client.cluster.drain("other")
    assert caught.value.reason == "GROUP_NOT_FOUND"
    assert [group.group_id for group in client.cluster.scale(group.model, 1)] == ["group-0"]
    with pytest.raises(ConfigError, match="no place"):
        client.cluster.scale(group.model, 99)
    assert client.cluster.restart(group_id="group-0") == client.cluster.restart(model=group.model)
    with pytest.raises(InvalidRequest, match="one of the two"):
        client.cluster.restart(group_id="group-0", model=group.model)


def test_cancel_reaches_the_server_and_ends_the_iteration(server: FakeServer, client: Client) -> None:
    server.script = [Reply(hang=True)]
    received = []
    stream = client.stream("x")
    for delta in stream:
        received.append(delta.text)
        if len(received) == 2:
            stream.cancel()
    assert received == ["Once ", "upon "]
    assert server.cancelled.wait(5)


def test_cancel_from_another_thread_ends_a_waiting_iteration(server: FakeServer, client: Client) -> None:
    server.script = [Reply(hang=True)]
    stream = client.stream("x")
    timer = threading.Timer(0.1, stream.cancel)
    timer.start()
    assert len(list(stream)) == 3
    timer.join()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_leaving_the_block_of_a_stream_cancels_it(server: FakeServer, client: Client, error: type[BaseException]) -> None:
    server.script = [Reply(hang=True)]

    def read_one_and_raise() -> None:
        with client.stream("x") as stream:
            next(stream)
            raise error

    with pytest.raises(error):
        read_one_and_raise()
    assert server.cancelled.wait(5)


def test_closing_the_client_ends_a_running_call(server: FakeServer) -> None:
    server.script = [Reply(hang=True)]
    client = Client(server.address)
    timer = threading.Timer(0.1, client.close)
    timer.start()
    with pytest.raises(Cancelled):
        client.generate("x")
    timer.join()
    assert server.cancelled.wait(5)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (
            Failure(grpc.StatusCode.INVALID_ARGUMENT, "too long", reason="PROMPT_TOO_LONG", metadata={"max": "64"}, field="text"),
            InvalidRequest,
        ),
        (Failure(grpc.StatusCode.UNIMPLEMENTED, "not yet", field="beam_search"), NotSupported),
        (Failure(grpc.StatusCode.NOT_FOUND), NotFound),
        (Failure(grpc.StatusCode.DEADLINE_EXCEEDED), DeadlineExceeded),
        (Failure(grpc.StatusCode.CANCELLED), Cancelled),
        (Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, metadata={"waiting": "4096"}), Overloaded),
        (Failure(grpc.StatusCode.INTERNAL), InternalError),
        (Failure(grpc.StatusCode.DATA_LOSS), InternalError),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_rich_error_is_raised_as_its_class_with_all_it_says(
    server: FakeServer, client: Client, failure: Failure, kind: type[QuireError]
) -> None:
    server.script = [failure]
    for call in (lambda: client.generate("x"), lambda: list(client.stream("x"))):
        with pytest.raises(kind) as caught:
            call()
        error = caught.value
        assert type(error) is kind
        assert (error.message, error.reason, error.metadata) == (failure.message, failure.reason, failure.metadata)
        assert (error.field, error.retry_after_s) == (failure.field, failure.retry_after_s)


def test_an_error_in_the_middle_of_a_stream_comes_after_what_was_received(server: FakeServer, client: Client) -> None:
    server.script = [Reply(fail=Failure(grpc.StatusCode.UNAVAILABLE, retry_after_s=0.001)), Reply()]
    stream = client.stream("x")
    assert [next(stream).text for _ in range(4)] == ["Once ", "upon ", "a ", "time."]
    with pytest.raises(Unavailable):
        next(stream)
    assert list(stream) == []
    assert len(server.requests) == 1


def test_a_plain_error_is_mapped_by_its_code(server: FakeServer, client: Client) -> None:
    server.script = [Failure(grpc.StatusCode.INVALID_ARGUMENT, "plain words", plain=True)]
    with pytest.raises(InvalidRequest, match="plain words") as caught:
        client.generate("x")
    assert caught.value.reason == "INVALID_REQUEST"
    server.script = [Failure(grpc.StatusCode.UNIMPLEMENTED, "Method not found!", plain=True)]
    with pytest.raises(NotSupported, match="does not have this call"):
        client.generate("x")


def test_the_timeout_ends_a_call_with_its_number(server: FakeServer, client: Client) -> None:
    server.script = [Reply(hang=True)]
    with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
        client.generate("x", timeout_s=0.2)
    with pytest.raises(DeadlineExceeded, match=r"within 0\.1 s"):
        list(client.with_options(timeout_s=0.1).stream("x"))
    with pytest.raises(InvalidRequest, match="timeout_s is 0"):
        client.generate("x", timeout_s=0)


def test_overload_is_tried_again_after_the_delay_that_the_server_names(server: FakeServer, client: Client) -> None:
    busy = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=0.05)
    for streams in (False, True):
        server.script = [busy, busy, Reply()]
        start_s = time.monotonic()
        text = "".join(delta.text for delta in client.stream("x")) if streams else client.generate("x").text
        assert text == "Once upon a time."
        assert 0.1 <= time.monotonic() - start_s < 1.0
    assert len(server.requests) == 6


def test_tries_end_with_the_last_error(server: FakeServer, client: Client) -> None:
    server.script = [Failure(grpc.StatusCode.UNAVAILABLE, "restarting", retry_after_s=0.001)]
    with pytest.raises(Unavailable, match="restarting") as caught:
        client.generate("x")
    assert caught.value.retry_after_s == pytest.approx(0.001)
    assert len(server.requests) == 3
    with pytest.raises(Unavailable):
        list(client.with_options(max_retries=0).stream("x"))
    assert len(server.requests) == 4


def test_a_delay_past_the_timeout_is_not_waited_for(server: FakeServer, client: Client) -> None:
    server.script = [Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=60)]
    start_s = time.monotonic()
    with pytest.raises(Overloaded):
        client.generate("x", timeout_s=5)
    assert time.monotonic() - start_s < 1


def test_other_errors_are_not_tried_again(server: FakeServer, client: Client) -> None:
    server.script = [Failure(grpc.StatusCode.INTERNAL, retry_after_s=0.001), Reply()]
    with pytest.raises(InternalError):
        client.generate("x")
    assert len(server.requests) == 1


def test_cancel_ends_the_wait_for_the_next_try(server: FakeServer, client: Client) -> None:
    server.script = [Failure(grpc.StatusCode.UNAVAILABLE, retry_after_s=30), Reply()]
    stream = client.stream("x")
    timer = threading.Timer(0.1, stream.cancel)
    timer.start()
    assert list(stream) == []
    timer.join()


def test_nothing_at_the_address_says_so_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.01)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with Client(address) as client, pytest.raises(Unavailable) as caught:
            client.generate("x")
    assert caught.value.message == f"nothing answers at {address}; start a server with `quire serve`"
    assert caught.value.reason == "NOTHING_ANSWERS"


def test_the_api_key_is_sent_as_a_bearer_token(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(server.address, api_key="k1") as client:
        client.generate("x")
        list(client.stream("x"))
    monkeypatch.setenv("QUIRE_API_KEY", "k2")
    monkeypatch.setenv("QUIRE_ADDRESS", server.address)
    with Client() as client:
        client.cluster.groups()
    monkeypatch.delenv("QUIRE_API_KEY")
    with Client() as client:
        client.cluster.groups()
    assert [metadata.get("authorization") for metadata in server.metadata] == ["Bearer k1", "Bearer k1", "Bearer k2", None]


def test_an_api_key_never_travels_unencrypted_to_another_machine() -> None:
    for address in ("10.0.0.1:50051", "example.org", "[2001:db8::1]:50051"):
        with pytest.raises(ConfigError, match="would travel unencrypted"):
            Client(address, api_key="secret")
        Client(address, api_key="secret", secure=True).close()
        Client(address).close()
    for address in ("localhost", "127.0.0.2:1", "[::1]:50051", "unix:/tmp/quire.sock"):
        Client(address, api_key="secret").close()


def test_an_api_key_does_not_show() -> None:
    with Client(api_key="secret") as client:
        assert "secret" not in repr(client._settings)


@pytest.mark.parametrize(
    ("given", "address"),
    [("host:1", "host:1"), ("host", "host:50051"), ("[::1]", "[::1]:50051"), ("unix:/run/q", "unix:/run/q"), (None, "127.0.0.1:50051")],
)
def test_an_address_without_a_port_gets_ours(given: str | None, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUIRE_ADDRESS", raising=False)
    with Client(given) as client:
        assert client.address == address


def test_settings_that_cannot_work_are_refused(tmp_path: Any) -> None:
    for options, says in (
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"max_retries": -1}, "max_retries is -1"),
        ({"tls_ca": tmp_path / "no.pem"}, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=says):
            Client("127.0.0.1:1", **options)


def test_a_request_larger_than_the_limit_is_refused_here(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="too large") as caught:
        client.generate("x" * (65 * 2**20))
    assert caught.value.reason == "MESSAGE_TOO_LARGE"


def test_tls_trusts_the_given_authority_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.01)
    credentials = grpc.ssl_server_credentials([(LOCALHOST_KEY.read_bytes(), LOCALHOST_CERTIFICATE.read_bytes())])
    with FakeServer(credentials) as server:
        with Client(server.address, tls_ca=LOCALHOST_CERTIFICATE, api_key="k") as client:
            assert client.generate("x").text == "Once upon a time."
        with Client(server.address, secure=True, max_retries=0) as client, pytest.raises(Unavailable) as caught:
            client.generate("x")
    assert caught.value.reason == "TLS_HANDSHAKE_FAILED"
    assert server.metadata[0]["authorization"] == "Bearer k"
