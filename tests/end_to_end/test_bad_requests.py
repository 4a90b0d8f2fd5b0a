"""Bad requests at every entry point of a real cluster: each is refused in the same words, and nothing else changes."""

import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import grpc
import pytest
from bad_requests import CASES, MARKER, MAX_REQUEST_TOKENS, PROMPT, BadRequest, user
from quire_command import quire
from serving import ServeProcess, wait_for

from quire.client import AsyncClient, Client
from quire.client.rpc_errors import error_from_rpc
from quire.common.errors import InvalidRequest, QuireError
from quire.v1 import inference_pb2_grpc
from quire.v1.inference_pb2 import GenerateRequest, SamplingParams, StoppingParams

CALL_TIMEOUT_S: Final = 30.0
FREE_TIMEOUT_S: Final = 10.0
CANARY: Final = (5, 6, 7)
# What no error may hold: a client's words, our folders, our code.
SECRETS: Final = (MARKER, "/tmp", "/usr", "/work", "/home", ".py", "Traceback", "quire.cluster", "0x")
MODULES: Final = ("quire.cluster.scheduler.process", "quire.cluster.gateway.main", "quire.worker.rank_process")


@dataclass
class Cluster:
    """A cluster with what must not change."""

    serve: ServeProcess
    address: str
    client: Client
    stub: inference_pb2_grpc.InferenceServiceStub
    channel: grpc.Channel
    born: dict[int, str]  # its processes: when each started, by pid
    canary: tuple[int, ...]

    def check(self) -> None:
        """The processes are the same, no block is held, and a good request gives the same tokens."""
        assert {pid: birth(pid) for pid in self.born} == self.born, "a process is another one"
        wait_for(self._is_idle, timeout_s=FREE_TIMEOUT_S)
        assert self.ask_canary() == self.canary

    def ask_canary(self) -> tuple[int, ...]:
        return self.client.generate(CANARY, temperature=0, max_tokens=4, ignore_eos=True).token_ids

    def _is_idle(self) -> bool:
        (group,) = self.client.cluster.groups()
        (blocks,) = self.client.cluster.blocks()
        assert (group.state, group.num_restarts) == ("READY", 0)
        pool = blocks.gpu_blocks
        assert pool.num_free + pool.num_cached + pool.num_held == pool.num_blocks == MAX_REQUEST_TOKENS // 4
        return pool.num_held == 0 and set(blocks.gpu_ref_counts) == {0} and self.client.cluster.queue().num_waiting_requests == 0


def birth(pid: int) -> str:
    """When a process started, in ticks; "" if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Cluster]:
    settings = ["--block-size", "4", "--gpu-blocks", str(MAX_REQUEST_TOKENS // 4), "--max-batched-tokens", "64", "--max-sequences", "8"]
    with ServeProcess(tmp_path_factory.mktemp("bad-requests"), str(tiny_llama), *settings) as serve:
        address = serve.wait_ready()
        with Client(address, max_retries=0, timeout_s=CALL_TIMEOUT_S) as client, grpc.insecure_channel(address) as channel:
            born = {pid: birth(pid) for pid in map(serve.process_of, MODULES)}
            cluster = Cluster(serve, address, client, inference_pb2_grpc.InferenceServiceStub(channel), channel, born, ())
            cluster.canary = cluster.ask_canary()
            yield cluster
            logs = [path for path in serve.temporary.rglob("*.log") if path.is_file()]
            assert logs, "logs were to be searched"
            assert [path.name for path in logs if MARKER in path.read_text(errors="replace")] == []
            assert MARKER not in serve.output


def refused(call: Callable[[], Any]) -> QuireError:
    """The error that a call ends with."""
    with pytest.raises((QuireError, grpc.RpcError)) as caught:
        call()
    error = caught.value
    return error_from_rpc(error, address="", timeout_s=CALL_TIMEOUT_S) if isinstance(error, grpc.RpcError) else cast(QuireError, error)


async def refused_async(address: str, case: BadRequest) -> QuireError:
    async with AsyncClient(address, max_retries=0, timeout_s=CALL_TIMEOUT_S) as client:
        start: Any = client.chat_stream if case.is_chat else client.stream
        with pytest.raises(QuireError) as caught:
            await read_all(start(case.prompt, **case.options))
    return caught.value


async def read_all(deltas: AsyncIterator[Any]) -> None:
    async for _ in deltas:
        pass


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
async def test_it_is_refused_alike_everywhere_and_nothing_changes(cluster: Cluster, case: BadRequest) -> None:
    request = case.request()
    errors = {
        "Generate": refused(lambda: cluster.stub.Generate(request, timeout=CALL_TIMEOUT_S)),
        "GenerateStream": refused(lambda: list(cluster.stub.GenerateStream(request, timeout=CALL_TIMEOUT_S))),
    }
    if case.is_sayable:
        call: Any = cluster.client.chat if case.is_chat else cluster.client.generate
        errors["Client"] = refused(lambda: call(case.prompt, **case.options))
        errors["AsyncClient"] = await refused_async(cluster.address, case)
    if case.is_for_tokenize:
        errors["Tokenize"] = refused(lambda: cluster.client.tokenize(case.prompt, **case.options))
    for entry_point, error in errors.items():
        assert_says(error, case, entry_point)
    assert len({error.message for error in errors.values()}) == 1, errors
    cluster.check()


def assert_says(error: QuireError, case: BadRequest, entry_point: str) -> None:
    assert (type(error), error.reason) == (case.error, case.reason), f"{entry_point}: {error.message}"
    with pytest.raises(QuireError, match=case.words):
        raise error
    assert_tells_nothing(error)


def assert_tells_nothing(error: QuireError) -> None:
    told = " ".join([error.message, error.field or "", *error.metadata, *error.metadata.values()])
    assert not [secret for secret in SECRETS if secret in told], told
    assert len(error.message) < 500


def test_there_are_enough_of_them_and_each_has_its_own_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 120


BAD_DETOKENIZE = [
    ([4096], "token id 4096; this model's ids are below 4096", "UNKNOWN_TOKEN_ID"),
    ([2**32 - 1], "token id 4294967295", "UNKNOWN_TOKEN_ID"),
    ([5] * 257, "token_ids has 257 entries; this model takes 256", "INVALID_REQUEST"),
    ([5] * 10**5, "has more than 256 token ids, in 100000 bytes", "INVALID_REQUEST"),
]


@pytest.mark.parametrize(("token_ids", "words", "reason"), BAD_DETOKENIZE, ids=["4096", "max", "257", "100000"])
def test_detokenize_refuses_what_the_model_has_not(cluster: Cluster, token_ids: list[int], words: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        cluster.client.detokenize(token_ids)
    assert caught.value.reason == reason
    assert_tells_nothing(caught.value)
    cluster.check()


BAD_TOKENIZE = [("", "text is empty", "EMPTY_PROMPT"), (MARKER * 300, "text has 2700 characters; this model takes 2048", "PROMPT_TOO_LONG")]


@pytest.mark.parametrize(("text", "words", "reason"), BAD_TOKENIZE, ids=["empty", "long"])
def test_tokenize_refuses_such_texts_too(cluster: Cluster, text: str, words: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        cluster.client.tokenize(text)
    assert caught.value.reason == reason
    assert_tells_nothing(caught.value)
    cluster.check()


COMMANDS = [
    (("--temperature", "nan"), "temperature is nan; it takes 0 to 100"),
    (("--n", "9"), "n is 9; it takes 1 to 8"),
    (("--max-tokens", "0"), "max_tokens is 0"),
    (("--logit-bias", "4096=1"), "token id 4096"),
    (("--min-tokens", "300"), "min_tokens is 300 and max_tokens is"),
]


@pytest.mark.parametrize(("flags", "words"), COMMANDS, ids=lambda value: value[0].strip("-") if isinstance(value, tuple) else "")
def test_the_command_refuses_them_in_the_same_words(cluster: Cluster, flags: tuple[str, ...], words: str) -> None:
    done = quire("generate", PROMPT, *flags, address=cluster.address)
    assert done.returncode != 0
    assert words in done.stderr
    assert not [secret for secret in SECRETS if secret in done.stderr]
    cluster.check()


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("method", ["Generate", "Tokenize", "Detokenize"])
def test_bytes_that_are_no_message_or_an_odd_one_break_nothing(cluster: Cluster, method: str, seed: int) -> None:
    """Half of them are a good request with some bytes changed."""
    rng = random.Random(seed)
    body = bytearray(
        GenerateRequest(text=PROMPT, stopping=StoppingParams(max_tokens=2), sampling=SamplingParams(temperature=0.5)).SerializeToString()
    )
    if seed % 2:
        for _ in range(rng.randint(1, 6)):
            body[rng.randrange(len(body))] = rng.randrange(256)
    else:
        body = bytearray(rng.randbytes(rng.choice((1, 7, 100, 5000))))
    call: Any = cluster.channel.unary_unary(f"/quire.v1.InferenceService/{method}")
    with contextlib.suppress(grpc.RpcError):  # a changed byte may still leave a good request
        call(bytes(body), timeout=CALL_TIMEOUT_S)
    cluster.check()


def test_messages_and_headers_beyond_the_limit_are_refused_by_the_transport(cluster: Cluster) -> None:
    request = GenerateRequest(text=MARKER * 500_000)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: cluster.stub.Generate(request, timeout=CALL_TIMEOUT_S),
        lambda: cluster.stub.Generate(GenerateRequest(text="x"), timeout=CALL_TIMEOUT_S, metadata=(("x-long", "y" * 40_000),)),
    )
    for call in calls:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        error: Any = caught.value
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert MARKER not in str(error.details())
    cluster.check()


FINE: list[tuple[str, Any, dict[str, Any]]] = [
    ("nul", f"\x00{MARKER}\x00", {}),
    ("special-token-text", f"<|endoftext|>{MARKER}<|im_start|><image>", {}),
    ("special-token-in-a-turn", [user(f"<|endoftext|>{MARKER}")], {}),
    ("private-characters", [user("\U000f1a2b\ue000\ue001" + MARKER)], {}),
    ("combining", "e" + "\u0301" * 60, {}),
    ("emoji", "👩‍👩‍👧‍👦" * 3, {}),
    ("largest-seed", PROMPT, {"seed": 2**64 - 1}),
    ("least-temperature", PROMPT, {"temperature": 5e-324}),
    ("largest-top-k", PROMPT, {"top_k": 2**32 - 1}),
    ("all-limits", PROMPT, {"n": 8, "temperature": 100.0, "top_p": 1e-300, "repetition_penalty": 100.0, "logprobs": 20}),
    ("truncated", (5,) * 100_000, {"truncate_prompt_tokens": 7}),
    ("8-beams", PROMPT, {"num_beams": 8, "n": 8}),
    ("long-deadline", PROMPT, {"timeout_s": 1e8}),
]


@pytest.mark.parametrize(("prompt", "options"), [case[1:] for case in FINE], ids=[case[0] for case in FINE])
def test_what_is_odd_but_fine_is_answered_and_breaks_nothing(cluster: Cluster, prompt: Any, options: dict[str, Any]) -> None:
    call: Any = cluster.client.chat if isinstance(prompt, list) else cluster.client.generate
    answer = call(prompt, max_tokens=3, **options)
    assert answer.usage.num_completion_tokens >= 1
    cluster.check()


def test_truncated_prompts_keep_their_last_tokens(cluster: Cluster) -> None:
    ids = cluster.client.tokenize(PROMPT).token_ids
    options: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    expected = cluster.client.generate(ids[-3:], **options)
    for prompt in (PROMPT, ids, [*([9] * 1000), *ids]):
        cut = cluster.client.generate(prompt, truncate_prompt_tokens=3, echo_prompt=True, **options)
        assert cut.token_ids == expected.token_ids
        assert cut.usage.num_prompt_tokens == 3
        assert cut.text == cluster.client.detokenize(ids[-3:]) + expected.text
    whole = cluster.client.generate(PROMPT, truncate_prompt_tokens=256, **options)
    assert whole.usage.num_prompt_tokens == len(ids)


def test_limits_that_forbid_every_token_in_the_midst_are_the_requests_own_fault(cluster: Cluster) -> None:
    """One token may be drawn, and a bad word is that token twice: the second one is forbidden."""
    twice = next(ids for ids in map(cluster.client.tokenize, (f"{letter}{letter}" for letter in "qxzjkvw#@~^")) if is_twice(ids.token_ids))
    word = cluster.client.detokenize(twice.token_ids)
    for call in (cluster.client.generate, lambda *args, **options: list(cluster.client.stream(*args, **options))):
        with pytest.raises(InvalidRequest, match="every token is forbidden by the request's own limits; widen") as caught:
            call((5, 6), allowed_token_ids=twice.token_ids[:1], bad_words=[word], max_tokens=5, ignore_eos=True)
        assert caught.value.reason == "NO_ALLOWED_TOKEN"
    cluster.check()


def is_twice(token_ids: tuple[int, ...]) -> bool:
    return len(token_ids) == 2 and token_ids[0] == token_ids[1]
