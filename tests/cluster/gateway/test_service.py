"""The whole gateway over real gRPC, between a fake scheduler and a fake controller."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import small_tokenizers
from fake_scheduler import DEMO_MODEL, NO_GROUP, FakeScheduler, Script, tokenizer_files
from gateway_parts import LIMITS, Running, details_of, refusal, running_gateway, until
from google.rpc import status_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tokenizers import Tokenizer

from quire.cluster.gateway import scheduler_link
from quire.cluster.gateway.main import GatewayBounds
from quire.cluster.gateway.scheduler_link import LinkBounds
from quire.cluster.rich_status import status_of
from quire.common.errors import StatusCode
from quire.common.hashing import cache_root, hash_full_blocks
from quire.common.messages import Accepted, BeamSearch, Cancel, Finish, Hello, Logprobs, ModelLimits, PromptLogprobs, Submit, Tokens
from quire.internal.v1 import discovery_pb2
from quire.v1 import cluster_pb2, inference_pb2
from quire.v1.inference_pb2 import Chat, ChatMessage, GenerateRequest, OutputParams, SamplingParams, StoppingParams, TokenIds

TOKENIZER = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
STORY = "Once upon a time there was a small fox. 你好 😀 The end"
STORY_IDS = TOKENIZER.encode(STORY).ids


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    """A gateway whose scheduler tells the story and ends it with the end token."""
    async with running_gateway(tmp_path, scheduler=FakeScheduler(script=lambda _: Script([*STORY_IDS, 0]))) as running:
        yield running


# -- answers ----------------------------------------------------------------------------------------------------------


async def test_a_request_is_answered_with_text_ids_usage_timings_and_seed(running: Running) -> None:
    response = await running.inference.Generate(GenerateRequest(text="hello", request_id="mine", sampling=SamplingParams(seed=7)))
    assert response.request_id == "mine"
    assert response.model == "quire-tales"
    [completion] = response.completions
    assert completion.text == STORY
    assert list(completion.token_ids) == [*STORY_IDS, 0]
    assert completion.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert completion.stop_cause.token_id == 0
    num_prompt_tokens = len(TOKENIZER.encode("hello").ids)
    usage = response.usage
    assert (usage.prompt_token_count, usage.completion_token_count) == (num_prompt_tokens, len(STORY_IDS) + 1)
    assert usage.cached_token_count == num_prompt_tokens // 2
    assert response.seed == 7
    timings = response.timings
    assert (timings.queue.nanos, timings.prefill.nanos, timings.decode.seconds, timings.preemption_count) == (
        250_000_000,
        500_000_000,
        1,
        3,
    )
    assert 0 < timings.time_to_first_token.ToNanoseconds() <= timings.total.ToNanoseconds()


async def test_the_stream_carries_what_the_whole_answer_has(running: Running) -> None:
    request = GenerateRequest(text="hello", stopping=StoppingParams(max_tokens=12))
    messages = [message async for message in running.inference.GenerateStream(request)]
    assert "".join(message.text_delta for message in messages) == TOKENIZER.decode(STORY_IDS[:12])
    assert [token_id for message in messages for token_id in message.token_ids] == STORY_IDS[:12]
    *others, last = messages
    assert all(message.finish_reason == 0 and not message.HasField("usage") and not message.HasField("seed") for message in others)
    assert last.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert not last.HasField("stop_cause")
    assert last.usage.completion_token_count == 12
    assert last.HasField("timings")
    assert last.HasField("seed")
    assert not any("\ufffd" in message.text_delta for message in others)  # only max_tokens may cut a character
    [submit] = running.scheduler.of_kind(Submit)
    assert last.seed == submit.sampling.seed
    assert {message.request_id for message in messages} == {last.request_id}


async def test_the_scheduler_gets_everything_resolved(running: Running) -> None:
    prompt = list(range(10, 45))
    request = GenerateRequest(token_ids=TokenIds(ids=prompt), cache_salt="salt", sampling=SamplingParams(top_k=5))
    await running.inference.Generate(request, timeout=20)
    [submit] = running.scheduler.of_kind(Submit)
    assert submit.prompt_ids == tuple(prompt)
    root = cache_root(model="quire-tales", adapter="", tenant_scope="local", cache_salt="salt")
    assert (submit.cache_root, submit.block_hashes) == (root, tuple(hash_full_blocks(root, prompt, block_size=16)))
    assert (submit.attempt, submit.tenant, submit.priority, submit.model, submit.adapter, submit.n) == (1, "local", 2, "quire-tales", "", 1)
    assert [(start.index, start.resumed_ids) for start in submit.sequences] == [(0, ())]
    assert submit.max_tokens == 2048 - 35
    assert (submit.sampling.temperature, submit.sampling.top_p, submit.sampling.top_k, submit.sampling.stop_ids) == (0.8, 0.95, 5, (0,))
    assert 15 < submit.time_left_s <= 20.1  # gRPC rounds timeouts of this length up to tenths of a second
    assert 0 <= submit.age_s < 5
    await running.inference.Generate(GenerateRequest(text="x"), timeout=10_000)  # a longer deadline is cut
    assert 595 < running.scheduler.of_kind(Submit)[1].time_left_s <= 600


async def test_log_probabilities_that_nobody_asked_for_change_nothing_but_their_sum_is_passed_on(running: Running) -> None:
    def on_submit(scheduler: FakeScheduler, submit: Submit, handle: int) -> None:
        answers.append(asyncio.get_running_loop().create_task(answer(scheduler, submit, handle)))

    async def answer(scheduler: FakeScheduler, submit: Submit, handle: int) -> None:
        columns = Logprobs((-0.5,), (1,), ((5,),), ((-0.5,),))
        await scheduler.send(Accepted(submit.request_id, submit.attempt, handle))
        for asked in (handle, handle + 1000):
            await scheduler.send(PromptLogprobs(asked, 1, columns))
        await scheduler.send(Tokens((handle,), (0,), (0,), (1,), (5,), ((0, columns),)))
        await scheduler.send_finished(handle, submit, num_tokens=1)

    answers: list[asyncio.Task[None]] = []
    running.scheduler.on_submit = on_submit
    running.scheduler.cumulative_logprob = -0.5
    [completion] = (await running.inference.Generate(GenerateRequest(text="x"))).completions
    assert (list(completion.token_ids), list(completion.logprobs), completion.cumulative_logprob) == ([5], [], -0.5)
    *_, last = [message async for message in running.inference.GenerateStream(GenerateRequest(text="x"))]
    assert last.cumulative_logprob == -0.5
    running.scheduler.cumulative_logprob = None
    [completion] = (await running.inference.Generate(GenerateRequest(text="x"))).completions
    assert not completion.HasField("cumulative_logprob")
    assert await running.health() == "SERVING"


async def test_a_conversation_is_rendered_by_the_models_template(running: Running) -> None:
    chat = Chat(messages=[ChatMessage(role="system", content="Be kind."), ChatMessage(role="user", content="Hi <|user|>")])
    tokenized = await running.inference.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
    assert tokenized.rendered == "<|user|>Be kind.\n\nHi <|user|><|assistant|>"
    assert [token_id for token_id in tokenized.token_ids if token_id in (0, 1, 2)] == [1, 2]
    await running.inference.Generate(GenerateRequest(chat=chat))
    [submit] = running.scheduler.of_kind(Submit)
    assert list(submit.prompt_ids) == list(tokenized.token_ids)


async def test_tokenize_and_detokenize_are_each_others_inverse(running: Running) -> None:
    tokenized = await running.inference.Tokenize(inference_pb2.TokenizeRequest(text=STORY))
    assert list(tokenized.token_ids) == STORY_IDS
    assert not tokenized.HasField("rendered")
    ids = [*tokenized.token_ids, 0]
    assert (await running.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=ids))).text == STORY
    request = inference_pb2.DetokenizeRequest(token_ids=ids, skip_special_tokens=False)
    assert (await running.inference.Detokenize(request)).text == STORY + "<|endoftext|>"
    parsed = await running.inference.Tokenize(inference_pb2.TokenizeRequest(text="<|user|>", parse_special_tokens=True))
    assert list(parsed.token_ids) == [1]


async def test_models_are_listed(running: Running) -> None:
    response = await running.inference.ListModels(inference_pb2.ListModelsRequest())
    assert [(model.name, model.max_model_len, model.vocab_size, model.block_size) for model in response.models] == [
        ("quire-tales", 2048, 4096, 16)
    ]


async def test_special_tokens_show_when_asked_for_but_not_the_one_that_stopped(running: Running) -> None:
    running.scheduler.script = lambda _: Script([1, *STORY_IDS[:3], 0])
    for skip, expected in ((True, ""), (False, "<|user|>")):
        request = GenerateRequest(text="x", output=OutputParams(skip_special_tokens=skip))
        [completion] = (await running.inference.Generate(request)).completions
        assert completion.text == expected + TOKENIZER.decode(STORY_IDS[:3])


# -- several sequences, log probabilities -----------------------------------------------------------------------------

TALES = [[*STORY_IDS[:9], 0], [*STORY_IDS[3:8], 0], STORY_IDS[:12]]


async def test_sequences_come_interleaved_each_with_its_own_text_and_end(running: Running) -> None:
    running.scheduler.script = lambda _: Script(TALES[0], others=TALES[1:], delay_s=0.01)
    request = GenerateRequest(text="hello", n=3, stopping=StoppingParams(max_tokens=12), sampling=SamplingParams(seed=5))
    messages = [message async for message in running.inference.GenerateStream(request)]
    ids: dict[int, list[int]] = {index: [] for index in range(3)}
    texts = dict.fromkeys(ids, "")
    for message in messages:
        ids[message.index] += message.token_ids
        texts[message.index] += message.text_delta
    assert list(ids.values()) == TALES
    assert texts == {0: TOKENIZER.decode(TALES[0]), 1: TOKENIZER.decode(TALES[1]), 2: TOKENIZER.decode(TALES[2])}
    ends = {message.index: message for message in messages if message.finish_reason}
    stop, length = inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH
    assert {index: end.finish_reason for index, end in ends.items()} == {0: stop, 1: stop, 2: length}
    assert ends[1].stop_cause.token_id == 0
    first_end = next(place for place, message in enumerate(messages) if message.finish_reason)
    assert {message.index for message in messages[:first_end]} == {0, 1, 2}
    *others, last = messages
    assert not any(message.HasField("usage") for message in others)
    assert (last.usage.prompt_token_count, last.usage.completion_token_count) == (len(TOKENIZER.encode("hello").ids), 10 + 6 + 12)
    whole = await running.inference.Generate(request)
    assert [(c.index, c.text, list(c.token_ids)) for c in whole.completions] == [(i, texts[i], ids[i]) for i in range(3)]
    assert whole.usage == last.usage
    submit = running.scheduler.of_kind(Submit)[0]
    assert ([start.index for start in submit.sequences], submit.n, submit.beam, submit.sampling.seed) == ([0, 1, 2], 3, None, 5)
    assert running.scheduler.of_kind(Cancel) == running.scheduler.of_kind(Finish) == []


async def test_a_stop_string_ends_its_own_sequence_and_the_others_go_on(running: Running) -> None:
    running.scheduler.script = lambda _: Script(STORY_IDS, others=[STORY_IDS[1:8], STORY_IDS * 3], delay_s=0.001)
    request = GenerateRequest(text="x", n=3, stopping=StoppingParams(stop_strings=["small fox"]))
    whole = await running.inference.Generate(request)
    first, second, third = whole.completions
    assert first.text == third.text == "Once upon a time there was a "
    assert first.stop_cause.string == third.stop_cause.string == "small fox"
    assert (list(second.token_ids), second.stop_cause.WhichOneof("cause")) == (STORY_IDS[1:8], None)
    assert whole.usage.completion_token_count == sum(len(each.token_ids) for each in whole.completions)
    finishes = running.scheduler.of_kind(Finish)
    assert {finish.sequence: finish.kept_tokens for finish in finishes} == {0: len(first.token_ids), 2: len(third.token_ids)}
    assert running.scheduler.of_kind(Cancel) == []


async def test_the_best_are_chosen_by_their_log_probability_at_the_end(running: Running) -> None:
    running.scheduler.script = lambda _: Script(
        TALES[0], others=[*TALES[1:], [9] * 12], logprob=lambda sequence, _: (-0.5, -0.4, -0.1, -9.0)[sequence]
    )
    request = GenerateRequest(text="x", n=2, best_of=4, stopping=StoppingParams(max_tokens=12))
    whole = await running.inference.Generate(request)
    expected = [(0, TALES[2], pytest.approx(-1.2)), (1, TALES[1], pytest.approx(-2.4))]
    assert [(c.index, list(c.token_ids), c.cumulative_logprob) for c in whole.completions] == expected
    assert [len(completion.logprobs) for completion in whole.completions] == [0, 0]  # nobody asked for them
    assert whole.usage.completion_token_count == 18
    messages = [message async for message in running.inference.GenerateStream(request)]
    assert [(message.index, list(message.token_ids)) for message in messages] == [(0, TALES[2]), (1, TALES[1])]
    assert messages[-1].usage == whole.usage
    submit = running.scheduler.of_kind(Submit)[0]
    assert (len(submit.sequences), submit.n, submit.sampling.num_logprobs) == (4, 2, 0)


async def test_a_beam_search_gives_its_sequences_at_the_end_best_first(running: Running) -> None:
    running.scheduler.script = lambda _: Script(TALES[0], others=TALES[1:2], group_sizes=[100])
    running.scheduler.cumulative_logprob = -3.5
    beams = inference_pb2.BeamSearchParams(beam_count=4, length_penalty=0.5, early_stopping=inference_pb2.EARLY_STOPPING_NEVER)
    whole = await running.inference.Generate(GenerateRequest(text="x", n=2, beam_search=beams))
    assert [(c.index, list(c.token_ids), c.cumulative_logprob) for c in whole.completions] == [(0, TALES[0], -3.5), (1, TALES[1], -3.5)]
    [submit] = running.scheduler.of_kind(Submit)
    assert (submit.n, submit.beam, submit.sampling.num_logprobs) == (2, BeamSearch(4, 0.5, 3), None)


async def test_a_search_that_finds_less_than_asked_for_returns_what_it_found(running: Running) -> None:
    def on_submit(scheduler: FakeScheduler, submit: Submit, handle: int) -> None:
        answers.append(asyncio.get_running_loop().create_task(answer(scheduler, submit, handle)))

    async def answer(scheduler: FakeScheduler, submit: Submit, handle: int) -> None:
        await scheduler.send(Accepted(submit.request_id, submit.attempt, handle))
        await scheduler.send_tokens(handle, offset=0, token_ids=TALES[1])
        await scheduler.send_finished(handle, submit, num_tokens=6, stop_id=0)

    answers: list[asyncio.Task[None]] = []
    running.scheduler.on_submit = on_submit
    whole = await running.inference.Generate(GenerateRequest(text="x", n=3, beam_search=inference_pb2.BeamSearchParams(beam_count=3)))
    assert [list(completion.token_ids) for completion in whole.completions] == [TALES[1]]


async def test_log_probabilities_come_with_their_tokens_and_the_prompts_come_first(running: Running) -> None:
    running.scheduler.script = lambda _: Script(TALES[0], others=TALES[1:2], logprob=lambda sequence, offset: -0.5 * sequence - offset)
    output = OutputParams(logprobs=2, prompt_logprobs=2)
    prompt = STORY_IDS[:5]
    request = GenerateRequest(token_ids=TokenIds(ids=prompt), n=2, output=output)
    whole = await running.inference.Generate(request)
    for index, completion in enumerate(whole.completions):
        assert [each.token.token_id for each in completion.logprobs] == TALES[index] == list(completion.token_ids)
        assert [each.token.logprob for each in completion.logprobs] == [-0.5 * index - offset for offset in range(len(TALES[index]))]
        assert completion.cumulative_logprob == pytest.approx(sum(each.token.logprob for each in completion.logprobs))
        first = completion.logprobs[0]
        assert (first.token.rank, first.token.text) == (1, TOKENIZER.decode([TALES[index][0]], skip_special_tokens=False))
        assert [(top.token_id, top.rank) for top in first.top] == [(TALES[index][0], 1), (7, 2)]
    assert [(each.token.token_id, each.token.logprob) for each in whole.prompt_logprobs] == [(token_id, -2.0) for token_id in prompt[1:]]
    messages = [message async for message in running.inference.GenerateStream(request)]
    assert [len(message.logprobs) for message in messages] == [len(message.token_ids) for message in messages]
    assert list(messages[0].prompt_logprobs) == list(whole.prompt_logprobs)
    assert not any(message.prompt_logprobs for message in messages[1:])


@pytest.mark.parametrize("output", [OutputParams(logprobs=0), OutputParams(prompt_logprobs=0)])
async def test_log_probabilities_that_are_missing_fail_the_request(running: Running, output: OutputParams) -> None:
    async def answer(scheduler: FakeScheduler, submit: Submit, handle: int) -> None:
        await scheduler.send(Accepted(submit.request_id, submit.attempt, handle))
        await scheduler.send_tokens(handle, offset=0, token_ids=[5])

    tasks: list[asyncio.Task[None]] = []
    running.scheduler.on_submit = lambda *submitted: tasks.append(asyncio.get_running_loop().create_task(answer(*submitted)))
    error = await refusal(running.inference.Generate(GenerateRequest(token_ids=TokenIds(ids=[5, 6, 7]), output=output)))
    assert (error.code(), details_of(error)[0].reason) == (grpc.StatusCode.INTERNAL, "LOGPROBS_LOST")
    await running.scheduler.wait_for(Cancel)


async def test_an_echoed_prompt_stands_in_front_of_each_completion(running: Running) -> None:
    request = GenerateRequest(text="stop time ", n=2, output=OutputParams(echo_prompt=True), stopping=StoppingParams(stop_strings=["time"]))
    running.scheduler.script = lambda _: Script([*STORY_IDS, 0], delay_s=0.001)
    whole = await running.inference.Generate(request)
    assert [completion.text for completion in whole.completions] == ["stop time Once upon a "] * 2
    assert whole.usage.completion_token_count == sum(len(completion.token_ids) for completion in whole.completions)


async def test_an_answer_that_fits_no_message_is_refused_with_its_size(tmp_path: Path) -> None:
    """Before anything is generated, where what was asked for tells it; else as soon as it is too large."""
    longest = max(range(3, 4096), key=lambda token_id: len(TOKENIZER.decode([token_id])))
    scheduler = FakeScheduler(script=lambda _: Script([longest] * 5), limits=(ModelLimits("quire-tales", 16, 2**20),))
    model = {"max_model_len": 2**20, "max_request_tokens": 2**20}
    async with running_gateway(tmp_path, scheduler=scheduler, model=model) as running:
        asked = GenerateRequest(text="x", n=2, output=OutputParams(logprobs=20), stopping=StoppingParams(max_tokens=2000))
        error = await refusal(running.inference.Generate(asked))
        assert (error.code().name, details_of(error)[0].reason) == ("INVALID_ARGUMENT", "ANSWER_TOO_LARGE")
        assert "up to 84000 log probabilities; one answer takes 65536; lower them, or call GenerateStream" in str(error.details())
        assert scheduler.of_kind(Submit) == []
        assert [message async for message in running.inference.GenerateStream(asked)]
        ids = TokenIds(ids=[longest] * (4 * 2**20 // 7 // len(TOKENIZER.decode([longest]))))
        echoed = GenerateRequest(token_ids=ids, n=8, output=OutputParams(echo_prompt=True), stopping=StoppingParams(max_tokens=5))
        scheduler.script = lambda _: Script([longest] * 5, ends=False)
        error = await refusal(running.inference.Generate(echoed))
        assert "bytes or more; one message takes 4194304; lower n" in str(error.details())
        await scheduler.wait_for(Cancel)
        scheduler.script = lambda _: Script([longest] * 5)
        assert len([message async for message in running.inference.GenerateStream(echoed)]) >= 8
        many = inference_pb2.DetokenizeRequest(token_ids=[longest] * (5 * 2**20 // len(TOKENIZER.decode([longest]))))
        error = await refusal(running.inference.Detokenize(many))
        assert "send fewer token ids" in str(error.details())
        assert details_of(error)[0].reason == "ANSWER_TOO_LARGE"


async def test_a_template_that_runs_away_fails_its_own_conversation_alone(tmp_path: Path) -> None:
    """Also while as many run away as there are threads for text work."""
    endless = (
        "{% if messages[0].content == 'run' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}ok"
    )
    files = tokenizer_files(TOKENIZER.to_str(), {}, endless)
    async with running_gateway(tmp_path, files=files) as running:

        async def tokenize(content: str) -> Any:
            chat = Chat(messages=[ChatMessage(role="user", content=content)])
            return await running.inference.Tokenize(inference_pb2.TokenizeRequest(chat=chat))

        errors = await asyncio.gather(*(tokenize("run") for _ in range(3)), return_exceptions=True)
        for error in errors:
            assert isinstance(error, grpc.aio.AioRpcError)
            # On a machine that is busy with other things the clock may come before the processor time.
            assert details_of(error)[0].reason in {"CHAT_TEMPLATE_TIMEOUT", "TEMPLATE_TIMEOUT", "TOKENIZER_TIMEOUT"}
        assert (await tokenize("walk")).rendered == "ok"


async def test_everything_that_ranks_honour_reaches_the_scheduler(running: Running) -> None:
    sampling = SamplingParams(
        typical_p=0.5,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias={9: 2.0, 8: -100.0},
        allowed_token_ids=TokenIds(ids=[5, 6, 5]),
        bad_token_ids=TokenIds(ids=[4]),
        bad_words=["there"],
    )
    await running.inference.Generate(GenerateRequest(text="x", sampling=sampling, priority=inference_pb2.PRIORITY_HIGH))
    [submit] = running.scheduler.of_kind(Submit)
    state = submit.sampling
    assert (submit.priority, state.typical_p, state.repetition_penalty, state.presence_penalty, state.frequency_penalty) == (
        3,
        0.5,
        1.5,
        -1.0,
        0.5,
    )
    assert (state.bias, state.allowed_ids, state.bad_ids[0]) == (((8, -100.0), (9, 2.0)), (5, 6), 4)
    forms = {tuple(TOKENIZER.encode(form, add_special_tokens=False).ids) for form in ("there", " there")}
    assert {*((token_id,) for token_id in state.bad_ids[1:]), *state.bad_sequences} == forms


# -- stop strings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_ends_the_request_at_the_scheduler_too(running: Running, include: bool) -> None:
    running.scheduler.script = lambda _: Script(STORY_IDS * 20, delay_s=0.001)
    stopping = StoppingParams(stop_strings=["small fox", "nowhere"], include_stop_string=include)
    num_kept = next(n for n in range(len(STORY_IDS)) if "small fox" in TOKENIZER.decode(STORY_IDS[:n]))
    expected = "Once upon a time there was a " + ("small fox" if include else "")
    messages = [m async for m in running.inference.GenerateStream(GenerateRequest(text="x", stopping=stopping))]
    assert "".join(message.text_delta for message in messages) == expected
    assert [token_id for message in messages for token_id in message.token_ids] == STORY_IDS[:num_kept]
    last = messages[-1]
    assert (last.finish_reason, last.stop_cause.string) == (inference_pb2.FINISH_REASON_STOP, "small fox")
    assert last.usage.completion_token_count == num_kept
    [finish] = running.scheduler.of_kind(Finish)
    assert (finish.sequence, finish.kept_tokens) == (0, num_kept)
    whole = await running.inference.Generate(GenerateRequest(text="x", stopping=stopping))
    assert (whole.completions[0].text, whole.usage) == (expected, last.usage)
    assert running.scheduler.of_kind(Cancel) == []


async def test_a_stop_string_counts_when_the_scheduler_ended_the_request_first(running: Running) -> None:
    """All tokens come in one message, together with their end."""
    running.scheduler.script = lambda _: Script([*STORY_IDS, 0], group_sizes=[1000])
    response = await running.inference.Generate(GenerateRequest(text="x", stopping=StoppingParams(stop_strings=["time"])))
    assert response.completions[0].text == "Once upon a "
    assert response.completions[0].stop_cause.string == "time"
    assert response.usage.completion_token_count == len(response.completions[0].token_ids) < len(STORY_IDS)


async def test_an_end_that_the_scheduler_does_not_confirm_comes_all_the_same(tmp_path: Path) -> None:
    def on_submit(scheduler: FakeScheduler, submit: Submit, handle: int) -> None:
        asyncio.get_running_loop().create_task(answer(scheduler, submit, handle))

    async def answer(scheduler: FakeScheduler, submit: Submit, handle: int) -> None:
        await scheduler.send(Accepted(submit.request_id, submit.attempt, handle))
        await scheduler.send_tokens(handle, offset=0, token_ids=STORY_IDS)

    scheduler = FakeScheduler(on_submit=on_submit)
    async with running_gateway(tmp_path, scheduler=scheduler, bounds=GatewayBounds(finish_timeout_s=0.1)) as running:
        response = await running.inference.Generate(GenerateRequest(text="x", stopping=StoppingParams(stop_strings=["time"])))
        assert response.completions[0].text == "Once upon a "
        await scheduler.wait_for(Cancel)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "code", "reason", "fields", "message"),
    [
        (GenerateRequest(text="x", adapter="a"), "UNIMPLEMENTED", "NOT_SUPPORTED", ["adapter"], "adapter is not supported yet"),
        (GenerateRequest(text="x", n=9), "INVALID_ARGUMENT", "INVALID_REQUEST", ["n"], "n is 9; it takes 1 to 8"),
        (
            GenerateRequest(text="x" * 4000, output=OutputParams(prompt_logprobs=20), stopping=StoppingParams(max_tokens=1)),
            "INVALID_ARGUMENT",
            "PROMPT_TOO_LONG",
            [],
            "this model takes 2048",
        ),
        (
            GenerateRequest(text="x", sampling=SamplingParams(top_p=0)),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
            ["sampling.top_p"],
            "top_p is 0",
        ),
        (GenerateRequest(), "INVALID_ARGUMENT", "EMPTY_PROMPT", ["prompt"], "no prompt"),
        (GenerateRequest(text="x", model="gpt"), "NOT_FOUND", "MODEL_NOT_FOUND", ["model"], "served: quire-tales"),
        (GenerateRequest(token_ids=TokenIds(ids=[4096])), "INVALID_ARGUMENT", "UNKNOWN_TOKEN_ID", ["token_ids.ids"], "below 4096"),
        (
            GenerateRequest(token_ids=TokenIds(ids=[1] * 100), stopping=StoppingParams(max_tokens=1949)),
            "INVALID_ARGUMENT",
            "REQUEST_TOO_LONG",
            ["stopping.max_tokens"],
            "prompt has 100 tokens and max_tokens is 1949, 2049 together; this model takes 2048 (max_model_len)",
        ),
    ],
)
async def test_a_bad_request_is_refused_alike_at_both_entry_points(
    running: Running, request_: GenerateRequest, code: str, reason: str, fields: list[str], message: str
) -> None:
    for call in (running.inference.Generate, running.inference.GenerateStream):
        error = await refusal(call(request_))
        assert error.code().name == code
        assert message in str(error.details())
        info, violated, delay_s = details_of(error)
        assert (info.reason, info.domain, violated, delay_s) == (reason, "quire.dev", fields, None)
    assert running.scheduler.of_kind(Submit) == []


@pytest.mark.parametrize("text", [STORY * 400, "\x00", "<|endoftext|>"])
async def test_odd_texts_are_refused_or_tokenized_but_never_break_anything(running: Running, text: str) -> None:
    call = running.inference.Tokenize(inference_pb2.TokenizeRequest(text=text))
    if len(text) > 8 * 2048:
        assert "characters" in str((await refusal(call)).details())
    else:
        assert not {0, 1, 2} & set((await call).token_ids)


async def test_tokenize_and_detokenize_refuse_what_generate_refuses(running: Running) -> None:
    error = await refusal(running.inference.Tokenize(inference_pb2.TokenizeRequest()))
    assert details_of(error)[0].reason == "EMPTY_PROMPT"
    chat = Chat(messages=[ChatMessage(role="user")])
    error = await refusal(running.inference.Tokenize(inference_pb2.TokenizeRequest(chat=chat, parse_special_tokens=True)))
    assert details_of(error)[1] == ["parse_special_tokens"]
    error = await refusal(running.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[5000])))
    assert details_of(error)[0].reason == "UNKNOWN_TOKEN_ID"
    error = await refusal(running.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[1] * 2049)))
    assert "2049 entries" in str(error.details())


async def test_what_the_scheduler_rejects_reaches_the_client_with_its_numbers(running: Running) -> None:
    def on_submit(scheduler: FakeScheduler, submit: Submit, handle: int) -> None:
        rejection = scheduler.reject(submit, StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "the queue is full", retry_after_s=0.75)
        asyncio.get_running_loop().create_task(rejection)

    running.scheduler.on_submit = on_submit
    error = await refusal(running.inference.Generate(GenerateRequest(text="x")))
    info, _, delay_s = details_of(error)
    assert (error.code(), info.reason, dict(info.metadata), delay_s) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUEUE_FULL",
        {"waiting_requests": "4096"},
        0.75,
    )


async def test_a_failure_in_the_middle_of_a_stream_comes_after_its_tokens(running: Running) -> None:
    running.scheduler.script = lambda _: Script(STORY_IDS[:5], ends=False)
    call = running.inference.GenerateStream(GenerateRequest(text="x"))
    ids: list[int] = []
    while len(ids) < 5:
        ids += (await call.read()).token_ids
    await running.scheduler.fail(0, StatusCode.UNAVAILABLE, "GROUP_LOST", "worker group g0 is gone")
    error = await refusal(call)
    info, _, delay_s = details_of(error)
    assert (error.code(), info.reason, dict(info.metadata), delay_s) == (grpc.StatusCode.UNAVAILABLE, "GROUP_LOST", {"group": "g0"}, 1.5)
    assert running.scheduler.of_kind(Cancel) == []


async def test_a_failure_after_one_of_two_sequences_has_ended_still_fails_the_request(running: Running) -> None:
    running.scheduler.script = lambda _: Script(STORY_IDS[:3], others=[TALES[1]], ends=False)
    call = running.inference.GenerateStream(GenerateRequest(text="x", n=2))
    ids: dict[int, list[int]] = {0: [], 1: []}
    while sum(map(len, ids.values())) < 9:
        message = await call.read()
        ids[message.index] += message.token_ids
    submit = running.scheduler.of_kind(Submit)[0]
    await running.scheduler.send_finished(0, submit, num_tokens=6, stop_id=0, sequence=1, is_last=False)
    message = await call.read()
    assert (message.index, message.stop_cause.token_id, message.HasField("usage")) == (1, 0, False)
    assert ids == {0: STORY_IDS[:3], 1: TALES[1]}
    await running.scheduler.fail(0, StatusCode.UNAVAILABLE, "GROUP_LOST", "worker group g0 is gone")
    error = await refusal(call)
    assert details_of(error)[0].reason == "GROUP_LOST"


async def test_a_failure_after_all_sequences_have_reached_their_ends_is_none(running: Running) -> None:
    running.scheduler.script = lambda _: Script(STORY_IDS[:6], others=[TALES[1]], ends=False)
    call = running.inference.GenerateStream(GenerateRequest(text="x", n=2, stopping=StoppingParams(max_tokens=6)))
    num_tokens = 0
    while num_tokens < 12:
        num_tokens += len((await call.read()).token_ids)
    await running.scheduler.fail(0, StatusCode.UNAVAILABLE, "GROUP_LOST", "worker group g0 is gone")
    rest: list[inference_pb2.GenerateStreamResponse] = []
    while (message := await call.read()) is not grpc.aio.EOF:
        rest.append(message)
    assert {message.index: message.finish_reason for message in rest} == {
        0: inference_pb2.FINISH_REASON_LENGTH,
        1: inference_pb2.FINISH_REASON_STOP,
    }
    assert rest[-1].usage.completion_token_count == 12


async def test_a_request_id_in_use_is_refused_until_its_request_ends(running: Running) -> None:
    running.scheduler.script = lambda _: Script(STORY_IDS[:1], ends=False)
    first = running.inference.GenerateStream(GenerateRequest(text="x", request_id="same"))
    await first.read()
    error = await refusal(running.inference.Generate(GenerateRequest(text="x", request_id="same")))
    assert (error.code(), details_of(error)[0].reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_IN_USE")
    first.cancel()
    await running.scheduler.wait_for(Cancel)
    running.scheduler.script = lambda _: Script([5, 0])
    await running.inference.Generate(GenerateRequest(text="x", request_id="same"))
    assert len({submit.request_id for submit in running.scheduler.of_kind(Submit)}) == 2


async def test_prompts_never_reach_the_log(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="quire"):
        await running.inference.Generate(GenerateRequest(text="my secret"))
        await refusal(running.inference.Generate(GenerateRequest(text="my secret", n=9)))
    assert "request " in caplog.text
    assert "secret" not in caplog.text


# -- cancelling and deadlines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_client_that_goes_away_cancels_its_request(running: Running, method: str) -> None:
    running.scheduler.script = lambda _: Script(STORY_IDS[:2], ends=False)
    call = getattr(running.inference, method)(GenerateRequest(text="x"))
    if method == "GenerateStream":
        await call.read()
    submit = await running.scheduler.wait_for(Submit)
    call.cancel()
    cancel = await running.scheduler.wait_for(Cancel)
    assert (cancel.request_id, cancel.attempt, cancel.sequence, cancel.reason) == (submit.request_id, 1, None, "the client is gone")


async def test_the_clients_deadline_cancels_its_request(running: Running) -> None:
    running.scheduler.script = lambda _: Script(ends=False)
    error = await refusal(running.inference.Generate(GenerateRequest(text="x"), timeout=0.3))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await running.scheduler.wait_for(Cancel)


async def test_a_request_without_a_deadline_gets_the_servers(tmp_path: Path) -> None:
    scheduler = FakeScheduler(script=lambda _: Script(ends=False))
    async with running_gateway(tmp_path, scheduler=scheduler, request_timeout_s=0.3) as running:
        error = await refusal(running.inference.GenerateStream(GenerateRequest(text="x")))
        assert (error.code(), details_of(error)[0].reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        assert scheduler.of_kind(Submit)[0].time_left_s <= 0.3
        await scheduler.wait_for(Cancel)


# -- slow readers -----------------------------------------------------------------------------------------------------


class SlowContext:
    """A client whose transport takes a message only when the test lets it."""

    def __init__(self) -> None:
        self.taken: list[inference_pb2.GenerateStreamResponse] = []
        self.may_take = asyncio.Semaphore(0)
        self.aborted: Any = None

    def time_remaining(self) -> None:
        return None

    async def write(self, message: inference_pb2.GenerateStreamResponse) -> None:
        await self.may_take.acquire()
        self.taken.append(message)

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        self.aborted = (code, status_pb2.Status.FromString(dict(trailing_metadata)["grpc-status-details-bin"]))
        raise grpc.aio.AbortError


async def test_a_slow_reader_gets_everything_in_few_messages(running: Running) -> None:
    running.scheduler.script = lambda _: Script(STORY_IDS * 20)
    context = SlowContext()
    task = asyncio.create_task(running.gateway.inference.GenerateStream(GenerateRequest(text="x"), context))  # type: ignore[arg-type]
    num_tokens = len(STORY_IDS) * 20
    await running.scheduler.wait_for(Submit)
    await until(lambda: running.gateway.link.num_requests == 0)  # the scheduler has told it all
    for _ in range(3):
        context.may_take.release()
        await asyncio.sleep(0)
    await task
    assert len(context.taken) <= 3
    assert sum(len(message.token_ids) for message in context.taken) == num_tokens
    assert "".join(message.text_delta for message in context.taken) == STORY * 20


async def test_a_reader_that_takes_nothing_is_given_up(tmp_path: Path) -> None:
    scheduler = FakeScheduler(script=lambda _: Script(STORY_IDS, ends=False))
    context = SlowContext()
    async with running_gateway(tmp_path, scheduler=scheduler, bounds=GatewayBounds(write_stall_timeout_s=0.1)) as running:
        with pytest.raises(grpc.aio.AbortError):
            await running.gateway.inference.GenerateStream(GenerateRequest(text="x"), context)  # type: ignore[arg-type]
        assert context.aborted[0] is grpc.StatusCode.CANCELLED
        await scheduler.wait_for(Cancel)


async def test_a_reader_that_stalls_on_a_real_connection_is_given_up(tmp_path: Path) -> None:
    """The transport takes some megabytes, then the write blocks; the request is cancelled and the gateway serves others."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    tokenizer.add_tokens(["long " * 200])
    scheduler = FakeScheduler(
        script=lambda submit: Script([4096] * 20_000, group_sizes=[1000] * 20, ends=False) if submit.max_tokens > 2 else Script([5, 0]),
        limits=(ModelLimits("quire-tales", 16, 100_000),),
    )
    model = {"logits_size": 5000, "max_model_len": 100_000, "max_request_tokens": 100_000}
    files = tokenizer_files(tokenizer.to_str(), {})
    bounds = GatewayBounds(write_stall_timeout_s=0.2)
    async with (
        running_gateway(tmp_path, scheduler=scheduler, model=model, files=files, bounds=bounds) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        call = type(running.inference)(channel).GenerateStream(GenerateRequest(text="x"))
        await call.read()
        cancel = await scheduler.wait_for(Cancel)
        assert cancel.request_id == scheduler.of_kind(Submit)[0].request_id
        response = await running.inference.Generate(GenerateRequest(text="x", stopping=StoppingParams(max_tokens=2)))
        assert response.usage.completion_token_count == 2
        assert running.gateway.gate.num_calls == 0
        error = await refusal(call)
        assert (error.code(), details_of(error)[0].reason) == (grpc.StatusCode.CANCELLED, "CLIENT_NOT_READING")


# -- the link to the scheduler ----------------------------------------------------------------------------------------


async def rest_of(call: Any) -> list[inference_pb2.GenerateStreamResponse]:
    """What still comes of a stream that was read before."""
    messages: list[inference_pb2.GenerateStreamResponse] = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def test_a_lost_scheduler_is_a_pause_in_a_stream_and_a_new_one_is_used(running: Running) -> None:
    running.scheduler.script = lambda _: Script(STORY_IDS[:2], ends=False)
    call = running.inference.GenerateStream(GenerateRequest(text="x"))
    first = await call.read()
    await running.scheduler.__aexit__()
    await running.wait_for_health("NOT_SERVING")
    error = await refusal(running.inference.Generate(GenerateRequest(text="x")))
    assert (error.code(), details_of(error)[0].reason) == (grpc.StatusCode.UNAVAILABLE, "NO_SCHEDULER")
    script = Script([*STORY_IDS[:5], 0])
    new = FakeScheduler(script=lambda _: script, scheduler_id="scheduler-2", limits=LIMITS, address=running.scheduler.address)
    async with new:
        rest = await rest_of(call)
        assert [*first.token_ids, *(token_id for message in rest for token_id in message.token_ids)] == [*STORY_IDS[:5], 0]
        assert rest[-1].usage.completion_token_count == 6
        script = Script([5, 0])
        await running.wait_for_health("SERVING")
        response = await running.inference.Generate(GenerateRequest(text="x"))
        assert response.usage.completion_token_count == 2


async def test_a_welcome_with_a_new_scheduler_id_means_that_everything_is_submitted_again(running: Running) -> None:
    running.scheduler.script = lambda _: Script(STORY_IDS[:2], ends=False)
    call = running.inference.GenerateStream(GenerateRequest(text="x"))
    first = await call.read()
    running.scheduler.scheduler_id = "scheduler-2"
    running.scheduler.script = lambda _: Script([*STORY_IDS[:4], 0])
    await running.scheduler.welcome()
    rest = await rest_of(call)
    assert [*first.token_ids, *(token_id for message in rest for token_id in message.token_ids)] == [*STORY_IDS[:4], 0]
    assert [message.attempt for message in running.scheduler.of_kind(Submit)] == [1, 2]
    assert await running.health() == "SERVING"


async def test_a_gateway_that_drains_waits_for_no_scheduler(running: Running) -> None:
    running.scheduler.script = lambda _: Script(STORY_IDS[:2], ends=False)
    call = running.inference.GenerateStream(GenerateRequest(text="x"))
    await call.read()
    await running.scheduler.__aexit__()
    await running.wait_for_health("NOT_SERVING")
    await running.gateway.drain()
    error = await refusal(call)
    info, _, delay_s = details_of(error)
    assert (error.code(), info.reason, delay_s) == (grpc.StatusCode.UNAVAILABLE, "SCHEDULER_LOST", scheduler_link.RETRY_AFTER_S)


async def test_a_scheduler_that_moved_is_followed(running: Running) -> None:
    async with FakeScheduler(script=lambda _: Script([6, 0]), scheduler_id="scheduler-2", limits=LIMITS) as new:
        running.controller.scheduler_address = new.address
        await running.controller.change()
        await new.wait_for(Hello)
        await running.wait_for_health("SERVING")
        await running.inference.Generate(GenerateRequest(text="x"))
        assert len(new.of_kind(Submit)) == 1


async def test_a_scheduler_of_another_version_is_not_used(running: Running) -> None:
    running.scheduler.version = 99
    await running.scheduler.welcome()
    await running.wait_for_health("NOT_SERVING")
    assert details_of(await refusal(running.inference.Generate(GenerateRequest(text="x"))))[0].reason == "NO_SCHEDULER"


async def test_a_scheduler_that_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    scheduler = FakeScheduler(on_submit=lambda *_: None)
    async with running_gateway(tmp_path, scheduler=scheduler, bounds=GatewayBounds(link=LinkBounds(accept_timeout_s=0.1))) as running:
        error = await refusal(running.inference.Generate(GenerateRequest(text="x")))
        assert details_of(error)[0].reason == "SCHEDULER_SILENT"
        await scheduler.wait_for(Cancel)


async def test_lost_tokens_fail_the_request_and_only_that_one(running: Running) -> None:
    running.scheduler.script = lambda _: Script(STORY_IDS[:2], ends=False)
    call = running.inference.GenerateStream(GenerateRequest(text="x"))
    ids: list[int] = []
    while len(ids) < 2:
        ids += (await call.read()).token_ids
    await running.scheduler.send_tokens(0, offset=1, token_ids=STORY_IDS[1:3])  # a duplicate, and a new one
    await running.scheduler.send_tokens(0, offset=9, token_ids=[5])
    error = await refusal(call)
    assert (error.code(), details_of(error)[0].reason) == (grpc.StatusCode.INTERNAL, "TOKENS_LOST")
    await running.scheduler.wait_for(Cancel)
    await running.scheduler.send_raw(b"not a message")
    running.scheduler.script = lambda _: Script([5, 0])
    await running.inference.Generate(GenerateRequest(text="x"))


async def test_the_schedulers_limits_count(running: Running) -> None:
    running.scheduler.limits = (ModelLimits("quire-tales", 32, 64),)
    await running.scheduler.welcome()
    await until(lambda: running.gateway.link.limits_of("quire-tales") != LIMITS[0])
    error = await refusal(running.inference.Generate(GenerateRequest(token_ids=TokenIds(ids=[1] * 65))))
    assert "prompt has 65 tokens; this model takes 64 (max_request_tokens" in str(error.details())
    await running.inference.Generate(GenerateRequest(token_ids=TokenIds(ids=[5] * 40)))
    [submit] = running.scheduler.of_kind(Submit)
    assert (len(submit.block_hashes), submit.max_tokens) == (1, 24)


# -- discovery --------------------------------------------------------------------------------------------------------


async def until_served(running: Running, num_models: int) -> None:
    async def is_it() -> bool:
        return await running.num_models() == num_models

    await until(is_it)


async def test_models_come_and_go_with_the_routing_table(running: Running) -> None:
    num_fetches = running.controller.num_fetches
    running.controller.serve(small_tokenizers.llama_like(), name="other", vocab_size=600, is_default=True)
    await running.controller.change()
    await until_served(running, 2)
    assert running.controller.num_fetches == num_fetches + 2  # only the files that are new
    response = await running.inference.Tokenize(inference_pb2.TokenizeRequest(text="the fox"))  # the default is the new one
    assert response.token_ids[0] == 1
    response = await running.inference.Tokenize(inference_pb2.TokenizeRequest(text="the fox", model="quire-tales"))
    assert list(response.token_ids) == TOKENIZER.encode("the fox").ids
    running.controller.models[1].model.default = False
    await running.controller.change()
    await until(lambda: not any(model.public.default for model in running.gateway.watcher.table.models.values()))
    error = await refusal(running.inference.Tokenize(inference_pb2.TokenizeRequest(text="the fox")))
    assert details_of(error)[0].reason == "MODEL_NOT_NAMED"


async def test_the_last_table_stays_while_the_controller_is_away(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    await running.controller.__aexit__()
    await until(lambda: "no news from the controller" in caplog.text)
    assert await running.health() == "SERVING"
    response = await running.inference.Generate(GenerateRequest(text="x"))
    assert response.completions[0].text == STORY
    error = await refusal(running.cluster.ListGroups(cluster_pb2.ListGroupsRequest()))
    assert (error.code(), details_of(error)[0].reason) == (grpc.StatusCode.UNAVAILABLE, "NO_CONTROLLER")
    running.controller.group_state = cluster_pb2.GROUP_STATE_STOPPED
    await running.controller.__aenter__()  # at the same address
    await running.wait_for_health("NOT_SERVING", timeout_s=10)


async def test_a_file_that_is_not_what_the_table_names_is_not_used(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    running.controller.corrupts_files = True
    running.controller.serve(small_tokenizers.chatml(), name="other")
    await running.controller.change()
    await until(lambda: "not the" in caplog.text)  # it was tried, and the old table stays
    assert [m.name for m in (await running.inference.ListModels(inference_pb2.ListModelsRequest())).models] == ["quire-tales"]
    running.controller.corrupts_files = False
    await until_served(running, 2)


def test_a_table_entry_has_all_that_a_gateway_uses() -> None:
    assert {field.name for field in discovery_pb2.ServedModel.DESCRIPTOR.fields} == {"model", "files", "logits_size", "max_request_tokens"}


# -- health, reflection, the cluster service --------------------------------------------------------------------------


async def test_health_follows_the_groups(running: Running) -> None:
    for service in ("", "quire.v1.InferenceService", "quire.v1.ClusterService"):
        assert await running.health(service) == "SERVING"
    for state, expected in (
        (cluster_pb2.GROUP_STATE_DRAINING, "NOT_SERVING"),
        (cluster_pb2.GROUP_STATE_READY, "SERVING"),
        (cluster_pb2.GROUP_STATE_STARTING, "NOT_SERVING"),
    ):
        running.controller.group_state = state
        await running.controller.change()
        await running.wait_for_health(expected)
    error = await refusal(running.health("no.such.Service"))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_names_the_services(running: Running) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    [response] = [message async for message in call]
    names = {service.name for service in response.list_services_response.service}
    assert {"quire.v1.InferenceService", "quire.v1.ClusterService", "grpc.health.v1.Health"} <= names


async def test_cluster_calls_are_passed_on_with_their_deadline_and_errors(running: Running) -> None:
    groups = await running.cluster.ListGroups(cluster_pb2.ListGroupsRequest())
    assert [group.group_id for group in groups.groups] == ["g0"]
    blocks = await running.cluster.GetBlocks(cluster_pb2.GetBlocksRequest(group_id="g0"))
    assert [group.group_id for group in blocks.groups] == ["g0"]
    drained = await running.cluster.DrainGroup(cluster_pb2.DrainGroupRequest(group_id="g0"))
    assert drained.group.state == cluster_pb2.GROUP_STATE_DRAINING
    error = await refusal(running.cluster.DrainGroup(cluster_pb2.DrainGroupRequest(group_id="g9")))
    assert (error.code(), error.details(), tuple(error.trailing_metadata() or ())) == status_of(NO_GROUP)
    scaled = await running.cluster.ScaleModel(cluster_pb2.ScaleModelRequest(model="m", group_count=2))
    assert [group.group_id for group in scaled.groups] == ["g0", "g1"]
    error = await refusal(running.cluster.ScaleModel(cluster_pb2.ScaleModelRequest(model="m", group_count=3)))
    assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "there is no place for so many")
    restarted = await running.cluster.RestartGroups(cluster_pb2.RestartGroupsRequest(group_id="g0"))
    assert [group.group_id for group in restarted.groups] == ["g0"]
    error = await refusal(running.cluster.GetQueue(cluster_pb2.GetQueueRequest(), timeout=0.2))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_an_error_of_the_controller_without_details_says_nothing_of_what_was_inside(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    error = await refusal(running.cluster.GetBlocks(cluster_pb2.GetBlocksRequest(group_id="broken")))
    info, _, delay_s = details_of(error)
    assert (error.code(), info.reason, dict(info.metadata), delay_s) == (
        grpc.StatusCode.UNAVAILABLE,
        "NO_CONTROLLER",
        {"code": "UNKNOWN"},
        1.0,
    )
    assert "secret" not in f"{error.details()}"
    assert "secret" not in "".join(record.getMessage() for record in caplog.records if record.name == "quire.gateway")


async def test_a_call_too_many_is_refused(tmp_path: Path) -> None:
    scheduler = FakeScheduler(script=lambda _: Script(STORY_IDS[:1], ends=False))
    async with running_gateway(tmp_path, scheduler=scheduler, bounds=GatewayBounds(max_calls=2)) as running:
        calls = [running.inference.GenerateStream(GenerateRequest(text="x")) for _ in range(2)]
        for call in calls:
            await call.read()
        error = await refusal(running.inference.Tokenize(inference_pb2.TokenizeRequest(text="x")))
        info, _, delay_s = details_of(error)
        assert (error.code(), info.reason, delay_s) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS", 1.0)
        calls[0].cancel()
        await scheduler.wait_for(Cancel)
        await until(lambda: running.gateway.gate.num_calls == 1)
        await running.inference.Tokenize(inference_pb2.TokenizeRequest(text="x"))


async def test_a_burst_of_requests_is_answered_in_full(running: Running) -> None:
    running.scheduler.script = lambda _: Script([5, 6, 0])
    calls = [running.inference.Generate(GenerateRequest(text=f"x {number}")) for number in range(300)]
    responses = await asyncio.gather(*calls)
    assert all(response.usage.completion_token_count == 3 for response in responses)
