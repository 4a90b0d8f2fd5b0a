"""What a request is to the next scheduler when its own was lost: ids, seed, attempt, and what has ended already."""

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from fake_scheduler import FakeScheduler, Script
from gateway_parts import LIMITS, until
from msgspec.structs import replace

from quire.cluster.gateway.request_stream import RequestStream, TokenEntry
from quire.cluster.gateway.resubmission import MAX_LOSSES, end_what_has_ended, next_attempt
from quire.cluster.gateway.scheduler_link import LinkBounds, SchedulerLink, SchedulerStream
from quire.common.errors import StatusCode, Unavailable
from quire.common.messages import (
    BeamSearch,
    Cancel,
    EndReason,
    Finish,
    Finished,
    ModelLimits,
    SamplingState,
    SequenceStart,
    Spans,
    Submit,
    UsageCounts,
)

SEEDED = SamplingState(seed=2**63 + 5, stop_ids=(0,), min_tokens=2)
OTHER_MODEL = (ModelLimits("other", 16, 2048),)
NOT_READY = (ModelLimits("quire-tales", 16, 0),)


def submit(*, num_sequences: int = 1, sampling: SamplingState = SEEDED, max_tokens: int = 4, beam: BeamSearch | None = None) -> Submit:
    starts = tuple(SequenceStart(index) for index in range(num_sequences))
    n = num_sequences
    return Submit("r", 1, "local", 2, "quire-tales", "", (5, 6, 7), (), b"", starts, n, sampling, max_tokens, 60.0, 1.0, beam)


def stream_of(message: Submit) -> SchedulerStream:
    return SchedulerStream(message, now_s=0.0)


def ended(sequence: int, *, num_tokens: int, is_last: bool = False) -> Finished:
    """num_tokens: of all sequences that ended so far, in this attempt"""
    return Finished(7, sequence, EndReason.STOP, None, is_last, UsageCounts(3, 2, num_tokens), Spans(0.5, 0, 0, 0))


def lose(message: Submit, stream: RequestStream, *, elapsed_s: float = 10.0) -> Submit:
    end_what_has_ended(message, stream)
    assert not stream.is_over
    return next_attempt(message, stream, elapsed_s=elapsed_s)


def test_the_next_attempt_has_the_received_ids_the_seed_and_the_time_that_is_left() -> None:
    message = submit()
    stream = stream_of(message)
    stream.receive(sequence=0, first_offset=0, token_ids=[8, 9])
    stream.sequences[0].take(max_tokens=1)  # what the client has is resumed like what it has not
    again = lose(message, stream)
    assert (again.attempt, again.sequences, again.sampling) == (2, (SequenceStart(0, (8, 9)),), SEEDED)
    assert (again.prompt_ids, again.max_tokens, again.time_left_s, again.age_s) == ((5, 6, 7), 4, 50.0, 11.0)
    stream.receive(sequence=0, first_offset=2, token_ids=[3])
    later = lose(message, stream, elapsed_s=99.0)
    assert (later.attempt, later.sequences, later.time_left_s) == (3, (SequenceStart(0, (8, 9, 3)),), 0.0)


def test_tokens_of_the_next_attempt_follow_without_gap_or_double() -> None:
    message = submit()
    stream = stream_of(message)
    stream.receive(sequence=0, first_offset=0, token_ids=[8])
    lose(message, stream)
    stream.receive(sequence=0, first_offset=0, token_ids=[8, 9])
    assert stream.sequences[0].take(max_tokens=9) == ([8, 9], [])
    stream.receive(sequence=0, first_offset=3, token_ids=[1])
    assert stream.error is not None
    assert stream.error.reason == "TOKENS_LOST"


@dataclass(frozen=True)
class OwnEnd:
    token_ids: tuple[int, ...]
    end: tuple[EndReason, int | None] | None


@pytest.mark.parametrize(
    "case",
    [
        OwnEnd((8, 9, 3, 4), (EndReason.LENGTH, None)),
        OwnEnd((8, 9, 0), (EndReason.STOP, 0)),
        OwnEnd((8, 9, 3, 0), (EndReason.STOP, 0)),
        OwnEnd((8, 0), None),  # below min_tokens no stop id ends anything
        OwnEnd((0, 9, 3), None),
        OwnEnd((), None),
    ],
)
def test_an_end_that_the_tokens_show_needs_no_scheduler(case: OwnEnd) -> None:
    stream = stream_of(submit())
    stream.receive(sequence=0, first_offset=0, token_ids=case.token_ids)
    end_what_has_ended(submit(), stream)
    finished = stream.sequences[0].finished
    assert (None if finished is None else (finished.reason, finished.stop_id)) == case.end
    assert stream.is_over == (case.end is not None)
    assert stream.sequences[0].unsent == list(case.token_ids)


def test_of_several_sequences_only_those_go_on_that_have_not_ended() -> None:
    message = submit(num_sequences=4)
    stream = stream_of(message)
    for index in range(4):
        stream.receive(sequence=index, first_offset=0, token_ids=[8, index, 9])
    stream.finish(ended(0, num_tokens=3))
    stream.sequences[1].drop()  # a stop string, whose Finish the scheduler may not have seen
    stream.receive(sequence=3, first_offset=3, token_ids=[0])
    again = lose(message, stream)
    assert (again.sequences, again.n) == ((SequenceStart(2, (8, 2, 9)),), 4)
    stream.receive(sequence=2, first_offset=3, token_ids=[1])
    stream.finish(ended(2, num_tokens=4, is_last=True))  # the next scheduler counts anew
    assert (stream.is_over, stream.error) == (True, None)
    assert stream.finished is not None
    assert stream.finished.usage.num_cached_tokens == 2


def test_the_last_of_several_sequences_may_end_at_the_loss() -> None:
    message = submit(num_sequences=2)
    stream = stream_of(message)
    for index in range(2):
        stream.receive(sequence=index, first_offset=0, token_ids=[1, 2, 3])
    stream.finish(ended(1, num_tokens=3))
    stream.receive(sequence=0, first_offset=3, token_ids=[4])
    end_what_has_ended(message, stream)
    assert (stream.is_over, stream.error) == (True, None)


def entries(*logprobs: float) -> list[TokenEntry]:
    return [TokenEntry(logprob, 1, (5,), (logprob,)) for logprob in logprobs]


def test_log_probabilities_of_tokens_add_up_and_those_of_the_prompt_are_not_asked_for_twice() -> None:
    message = submit(sampling=SamplingState(num_logprobs=1, num_prompt_logprobs=1))
    stream = stream_of(message)
    stream.receive_prompt(first_position=1, entries=entries(-1.0))
    partly = lose(message, stream)
    assert partly.sampling == message.sampling  # only half of them came
    stream.receive_prompt(first_position=1, entries=entries(-1.0, -2.0))
    assert len(stream.prompt_entries) == 2
    stream.receive(sequence=0, first_offset=0, token_ids=[8, 9], entries=entries(-0.5, -0.25))
    again = lose(message, stream)
    assert again.sequences == (SequenceStart(0, (8, 9), -0.75),)
    assert again.sampling == SamplingState(num_logprobs=1, num_prompt_logprobs=None)
    stream.receive(sequence=0, first_offset=2, token_ids=[3], entries=entries(-0.125))
    assert [entry.logprob for entry in stream.sequences[0].unsent_entries] == [-0.5, -0.25, -0.125]


def test_a_beam_search_begins_anew_and_what_came_of_it_may_come_again() -> None:
    message = replace(submit(beam=BeamSearch(num_beams=2)), n=2)
    stream = stream_of(message)
    stream.receive(sequence=0, first_offset=0, token_ids=[8, 9])
    stream.finish(ended(0, num_tokens=2))
    again = lose(message, stream)
    assert (again.sequences, again.beam) == (message.sequences, message.beam)
    for index, token_ids in enumerate(([8, 9], [8, 3, 4])):
        stream.receive(sequence=index, first_offset=0, token_ids=token_ids)
        stream.finish(ended(index, num_tokens=2 + 3 * index, is_last=index == 1))
    assert (stream.is_over, stream.error) == (True, None)
    assert [sequence.unsent for sequence in stream.sequences] == [[8, 9], [8, 3, 4]]


# -- the link ---------------------------------------------------------------------------------------------------------


async def lost_stream(first: FakeScheduler, **bounds: Any) -> tuple[SchedulerLink, SchedulerStream]:
    """A stream with one token whose scheduler has just gone."""
    first.limits, first.script = LIMITS, lambda _: Script([8], ends=False)
    link = SchedulerLink(gateway_id="g", bounds=LinkBounds(**bounds))
    async with first:
        await link.connect(first.address)
        await until(lambda: link.is_up)
        stream = link.submit(submit())
        await until(lambda: stream.sequences[0].num_received == 1)
    await until(lambda: not link.is_up)
    return link, stream


def reason_of(stream: SchedulerStream) -> str | None:
    return stream.error.reason if stream.error is not None else None


async def test_a_lost_request_waits_until_its_model_is_served_again() -> None:
    first = FakeScheduler()
    link, stream = await lost_stream(first)
    async with FakeScheduler(scheduler_id="next", address=first.address, limits=OTHER_MODEL, script=lambda _: Script([8, 9, 3, 4])) as new:
        for limits in (OTHER_MODEL, NOT_READY):
            new.limits = limits
            await until(lambda: link.is_up)
            await new.welcome()
        assert new.of_kind(Submit) == []
        new.limits = LIMITS
        await new.welcome()
        await until(lambda: stream.is_over)
        assert (stream.error, stream.sequences[0].token_ids) == (None, [8, 9, 3, 4])
        await link.close()


async def test_a_lost_request_is_not_refused_for_what_passes() -> None:
    first = FakeScheduler()
    link, stream = await lost_stream(first)
    new = FakeScheduler(scheduler_id="next", address=first.address, limits=LIMITS, script=lambda _: Script([8, 9, 3, 4]))
    refused: list[Submit] = []

    async def refuse(message: Submit) -> None:
        await new.reject(message, StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "full", retry_after_s=0.01)

    def on_submit(_: FakeScheduler, message: Submit, handle: int) -> None:
        refused.append(message)
        if len(refused) == 2:
            new.on_submit = None
        tasks.append(asyncio.create_task(refuse(message)))

    tasks: list[asyncio.Task[None]] = []
    new.on_submit = on_submit
    async with new:
        await until(lambda: stream.is_over)
        await asyncio.gather(*tasks)
        assert [message.attempt for message in new.of_kind(Submit)] == [2, 3, 4]
        assert (stream.error, stream.sequences[0].token_ids) == (None, [8, 9, 3, 4])
        await link.close()


async def test_a_request_that_no_scheduler_takes_in_time_fails() -> None:
    link, stream = await lost_stream(FakeScheduler(), recovery_timeout_s=0.05)
    await until(lambda: stream.is_over)
    assert isinstance(stream.error, Unavailable)
    assert reason_of(stream) == "SCHEDULER_LOST"
    assert link.num_requests == 0
    await link.close()


async def test_a_request_that_ends_several_schedulers_is_not_given_to_another() -> None:
    scheduler = FakeScheduler(script=lambda _: Script([8], ends=False), limits=LIMITS)
    link = SchedulerLink(gateway_id="g")
    async with scheduler:
        await link.connect(scheduler.address)
        await until(lambda: link.is_up)
        stream = link.submit(submit())
        for number in range(1, MAX_LOSSES):
            await scheduler.wait_for(Submit, count=number)
            await until(lambda: stream.handle is not None)
            assert not stream.is_over
            scheduler.scheduler_id = f"scheduler-{number + 1}"
            await scheduler.welcome()
        await scheduler.wait_for(Submit, count=MAX_LOSSES)
        scheduler.scheduler_id = "the last"
        await scheduler.welcome()
        await until(lambda: stream.is_over)
        assert reason_of(stream) == "SCHEDULER_LOST"
        assert [message.attempt for message in scheduler.of_kind(Submit)] == list(range(1, MAX_LOSSES + 1))
        await link.close()


async def test_what_ends_while_no_scheduler_is_there_ends_at_once() -> None:
    first = FakeScheduler()
    link, stopped = await lost_stream(first)
    link.finish(stopped, sequence=0, kept_tokens=1)
    assert (stopped.is_over, stopped.error, link.num_requests) == (True, None, 0)
    await link.close()
    link, cancelled = await lost_stream(FakeScheduler())
    link.cancel(cancelled, reason="test")
    assert (reason_of(cancelled), link.num_requests) == ("CANCELLED", 0)
    assert not [message for message in link._outbox if isinstance(message, (Cancel, Finish))]
    await link.close()
