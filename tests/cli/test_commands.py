"""generate, chat, status and bench as a user runs them, against a server of the tests."""

import json
import os
import pty
import signal
import typing
from pathlib import Path

import grpc
import pytest
from fake_inference_server import Failure, FakeServer, Reply, fake_group
from quire_command import QUIRE, environment, quire, start_quire

from quire.cli.request_flags import FLAGS
from quire.client import ChatOptions, GenerateOptions
from quire.v1 import cluster_pb2, inference_pb2


def test_every_option_of_generate_has_a_flag() -> None:
    assert {flag.option for flag in FLAGS} == set(typing.get_type_hints(GenerateOptions))


def test_generate_streams_the_text_of_a_prompt(server: FakeServer) -> None:
    done = quire("generate", "Once", "--max-tokens", "8", address=server.address)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Once upon a time.\n", "")
    assert server.requests[0].text == "Once"
    assert server.requests[0].stopping.max_tokens == 8


def test_generate_shows_text_while_it_comes(server: FakeServer) -> None:
    server.script = [Reply(hang=True)]
    with start_quire("generate", "x", address=server.address) as process:
        assert process.stdout is not None
        assert process.stdout.read(len("Once upon a ")) == "Once upon a "
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert server.cancelled.wait(5)


@pytest.mark.parametrize("flags", [["--json"], ["--n", "2"]])
def test_an_interrupt_ends_the_request_at_the_server(server: FakeServer, flags: list[str]) -> None:
    server.script = [Reply(hang=True)]
    with start_quire("generate", "x", *flags, address=server.address) as process:
        assert server.asked.wait(10)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert server.cancelled.wait(5)


def test_generate_reads_the_prompt_from_standard_input(server: FakeServer) -> None:
    for arguments in ((), ("-",)):
        assert quire("generate", *arguments, address=server.address, stdin="two\nlines\n").returncode == 0
    assert [request.text for request in server.requests] == ["two\nlines", "two\nlines"]


def test_generate_maps_its_flags(server: FakeServer, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    flags = "--temperature 0 --seed 5 --stop a --stop b --stop-token-ids 1,2 --logit-bias 7=-1.5 --ignore-eos --no-skip-special-tokens"
    more = f"--priority high --json-schema @{schema} --early-stopping never --cache-salt s --beams 4"
    last = "--repetition-penalty 1.5 --presence-penalty -1 --frequency-penalty 0.5 --logprobs 3"
    done = quire("generate", "x", *flags.split(), *more.split(), *last.split(), address=server.address)
    assert done.returncode == 0
    request = server.requests[0]
    assert request.sampling.HasField("temperature")
    assert (request.sampling.temperature, request.sampling.seed, dict(request.sampling.logit_bias)) == (0, 5, {7: -1.5})
    assert (list(request.stopping.stop_strings), list(request.stopping.stop_token_ids)) == (["a", "b"], [1, 2])
    assert request.stopping.ignore_eos
    assert not request.output.skip_special_tokens
    assert request.output.HasField("skip_special_tokens")
    assert (request.priority, request.beam_search.early_stopping, request.beam_search.beam_count) == (3, 3, 4)
    sampling = request.sampling
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -1, 0.5)
    assert request.output.logprobs == 3
    assert request.structured_output.json_schema == '{"type": "object"}'
    assert not request.HasField("n")


def test_generate_as_json_is_one_object(server: FakeServer) -> None:
    done = quire("generate", "x", "--json", address=server.address)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["text"] == "Once upon a time."
    assert (answer["usage"]["num_completion_tokens"], answer["seed"]) == (4, 7)


def test_generate_shows_several_completions_apart(server: FakeServer) -> None:
    server.script = [Reply(sequences=(("a ", "b"), ("c ", "d")))]
    done = quire("generate", "x", "--n", "2", address=server.address)
    assert done.stdout == "--- 1 of 2 (length) ---\na b\n--- 2 of 2 (length) ---\nc d\n"


def test_a_refusal_of_the_server_is_one_line(server: FakeServer) -> None:
    server.script = [Failure(grpc.StatusCode.UNIMPLEMENTED, "num_beams is not supported yet; leave it out", field="beam_search.num_beams")]
    done = quire("generate", "x", "--num-beams", "4", address=server.address)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "quire: num_beams is not supported yet; leave it out\n"


def test_a_reader_that_leaves_early_is_no_error(server: FakeServer) -> None:
    server.script = [Reply(sequences=(["word "] * 200,), pause_s=0.01)]
    with start_quire("generate", "x", address=server.address) as process:
        assert process.stdout is not None
        process.stdout.read(5)
        process.stdout.close()
        assert process.wait(10) == 141
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_chat_keeps_the_conversation_and_obeys_its_commands(server: FakeServer) -> None:
    done = quire(
        "chat", "--temperature", "0", address=server.address, stdin="Hello\nAgain\n/reset\nNew\n/system Be brief.\nMore\n/exit\nnever\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Once upon a time.\n" * 4, "")
    talks = [[(message.role, message.content) for message in request.chat.messages] for request in server.requests]
    assert talks == [
        [("user", "Hello")],
        [("user", "Hello"), ("assistant", "Once upon a time."), ("user", "Again")],
        [("user", "New")],
        [("system", "Be brief."), ("user", "More")],
    ]
    assert server.requests[0].sampling.HasField("temperature")


def test_chat_from_a_pipe_ends_at_an_error(server: FakeServer) -> None:
    server.script = [Failure(grpc.StatusCode.INVALID_ARGUMENT, "too long")]
    done = quire("chat", address=server.address, stdin="Hello\nAgain\n")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "quire: too long\n")
    assert len(server.requests) == 1


def test_chat_at_a_terminal_shows_an_error_and_goes_on(server: FakeServer) -> None:
    server.script = [Failure(grpc.StatusCode.INVALID_ARGUMENT, "too long"), Reply()]
    child_pid, terminal = pty.fork()
    if child_pid == 0:
        os.execve(QUIRE[0], [*QUIRE, "chat"], environment(server.address))
    seen = read_until(terminal, b"> ")
    os.write(terminal, b"Hello\n")
    seen += read_until(terminal, b"too long\r\n> ")
    os.write(terminal, b"Again\n")
    seen += read_until(terminal, b"time.\r\n> ")
    os.write(terminal, b"\x04")
    _, status = os.waitpid(child_pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0, seen
    assert [message.content for message in server.requests[1].chat.messages] == ["Again"]


def read_until(terminal: int, end: bytes) -> bytes:
    seen = b""
    while not seen.endswith(end):
        seen += os.read(terminal, 1024)
    return seen


def test_no_flag_of_chat_names_what_the_sdk_does_not_take() -> None:
    from quire.cli.chat import _LEFT_OUT

    assert {flag.option for flag in FLAGS} - set(_LEFT_OUT) <= set(typing.get_type_hints(ChatOptions))


def test_status_shows_groups_blocks_and_queue(server: FakeServer) -> None:
    server.groups[0].detail = "its rank was restarted"
    server.groups.append(cluster_pb2.Group(group_id="group-1", state=cluster_pb2.GROUP_STATE_STARTING))
    done = quire("status", address=server.address)
    assert done.returncode == 0
    for words in ("group-0", "READY", "cpu (here pid 4711)", "3/128 held (2%), 5 cached", "group-0: its rank was restarted", "STARTING"):
        assert words in done.stdout
    assert "queue: 2 of 4096 requests wait (30 of 8000000 tokens; the oldest for 0.0 s); 0 run\n" in done.stdout


def test_status_as_json(server: FakeServer) -> None:
    status = json.loads(quire("status", "--json", address=server.address).stdout)
    assert status["groups"][0]["gpu_blocks"]["num_held"] == 3
    assert status["queue"]["max_waiting_requests"] == 4096


def test_status_watches_until_interrupted(server: FakeServer) -> None:
    with start_quire("status", "--json", "--watch", "0.05", address=server.address) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert len(lines) == 3


def test_drain_says_what_the_group_still_runs_and_waits_no_longer_than_told(server: FakeServer) -> None:
    done = quire("drain", "group-0", address=server.address)
    assert (done.returncode, done.stdout) == (0, "group-0: DRAINING, 2 sequences run\n")
    done = quire("drain", "group-0", "--wait", "0.1", address=server.address)
    assert (done.returncode, done.stdout.count("DRAINING")) == (1, 2)
    done = quire("drain", "nobody", address=server.address)
    assert (done.returncode, done.stderr) == (1, "quire: there is no group nobody\n")


def test_scale_says_what_there_is_and_waits_no_longer_than_told(server: FakeServer) -> None:
    model = server.groups[0].model
    done = quire("scale", f"{model}=1", "--wait", "5", address=server.address)
    assert (done.returncode, done.stdout) == (0, "group-0: READY, term 1\n" * 2)
    done = quire("scale", f"{model}=0", "--wait", "0.1", address=server.address)
    assert (done.returncode, done.stdout) == (1, f"{model} has no groups\ngroup-0: READY, term 1\n")
    done = quire("scale", f"{model}=9", address=server.address)
    assert (done.returncode, done.stderr) == (1, "quire: there is no place for so many\n")
    done = quire("scale", "9", address=server.address)
    assert (done.returncode, done.stderr.count("'9' is not MODEL=N")) == (2, 1)


def test_scale_waits_for_room_that_is_on_its_way(server: FakeServer) -> None:
    model = server.groups[0].model
    no_room = "quire: there is no place for so many\n"
    done = quire("scale", f"{model}=2", "--wait", "1", address=server.address)
    waiting = "quire: waiting up to 1 s for hosts that are on their way\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", no_room + waiting + no_room)
    with start_quire("scale", f"{model}=2", "--wait", "30", address=server.address) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == no_room
        server.groups.append(fake_group("group-1"))
        output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "group-0: READY, term 1\ngroup-1: READY, term 1\n" * 2)


def test_restart_waits_until_the_group_was_restarted(server: FakeServer) -> None:
    done = quire("restart", "group-0", address=server.address)
    assert (done.returncode, done.stdout) == (0, "group-0: READY, term 1\n")
    done = quire("restart", server.groups[0].model, "--wait", "0.1", address=server.address)
    assert (done.returncode, done.stdout) == (1, "group-0: READY, term 1\n")
    done = quire("restart", "nobody", address=server.address)
    assert (done.returncode, done.stderr) == (1, "quire: there is no nobody\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_bench_serve_reports_the_load(server: FakeServer, tmp_path: Path, as_json: bool) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\n")
    arguments = ["--requests", "5", "--concurrency", "2", "--max-tokens", "9", "--prompt-file", str(prompts)]
    done = quire("bench", "serve", *arguments, *(["--json"] if as_json else []), address=server.address)
    assert (done.returncode, done.stderr) == (0, "")
    if as_json:
        report = json.loads(done.stdout)
        assert (report["num_requests"], report["num_failed"], len(report["requests"])) == (5, 0, 5)
        assert set(report["ttft_s"]) == {"mean", "p50", "p90", "p99"}
    else:
        assert "5 requests, 2 at a time: 20 tokens" in done.stdout
    load = [request for request in server.requests if isinstance(request, inference_pb2.GenerateRequest)][1:]  # the first one connects
    assert sorted(request.text for request in load) == ["one", "one", "one", "two", "two"]
    assert sorted(request.sampling.seed for request in load) == [0, 1, 2, 3, 4]
    assert {request.stopping.max_tokens for request in load} == {9}
