"""Living through a scheduler's journal again: the same plans, and the story of each request."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import msgspec

from quire.cluster.scheduler.journal import Header, Input, read_journal
from quire.cluster.scheduler.scheduler import Scheduler, SchedulerConfig
from quire.common.errors import ConfigError, InternalError
from quire.common.messages import StepPlan, decode_control_down, decode_rank_down, decode_rank_up, decode_session_down

# In what is told of one request, another is named so; the story puts its id there.
_OTHER = re.compile(r"\brequest (\d+)\b")


@dataclass(slots=True)
class Event:
    """Something that happened to a request, perhaps several times in a row."""

    first_s: float  # since the journal's beginning
    last_s: float
    text: str
    count: int = 1


@dataclass(slots=True)
class RequestStory:
    """All that happened to one request, in order."""

    request_id: str
    events: list[Event] = field(default_factory=list)


@dataclass(slots=True)
class Replay:
    """What came of living through a journal."""

    num_plans: int = 0
    num_inputs: int = 0
    span_s: float = 0.0
    stories: dict[int, RequestStory] = field(default_factory=dict)  # by the scheduler's handle, in order of arrival
    plans: list[tuple[float, str, StepPlan]] = field(default_factory=list)  # (when, group, plan)


def replay(journal: BinaryIO) -> Replay:
    """Give a new scheduler all the inputs of a journal, and compare its plans with the ones that were made.

    Raises:
        ConfigError: it is no journal, or was written with settings that are not known here.
        InternalError: a plan differs: the journal was written by another version of Quire, or planning depends on something
            that is no input, which would be a bug.
    """
    records = read_journal(journal)
    header = next(records)
    assert isinstance(header, Header)
    try:
        scheduler = Scheduler(SchedulerConfig(**header.config))
    except TypeError as error:
        raise ConfigError(f"the journal was written with settings that this version does not know: {error}") from None
    result = Replay()
    clock = _Clock()
    scheduler.listen(lambda handle, text: _tell(result, scheduler, clock.now_s - clock.start_s, handle, text))
    planned: StepPlan | None = None
    for record in records:
        assert isinstance(record, Input)
        result.num_inputs += 1
        clock.see(record.now_s)
        if record.kind == "plan":
            made = decode_rank_down(record.message)
            if made != planned:
                raise InternalError(
                    f"at {clock.now_s - clock.start_s:.6f} s, step {made.step_id} of {record.who.decode()} was planned otherwise than "
                    "the journal has it; replay it with the version of Quire that wrote it"
                )
            result.num_plans += 1
            result.plans.append((clock.now_s - clock.start_s, record.who.decode(), made))
        elif record.kind == "next_plan":
            planned = scheduler.next_plan(record.who.decode(), record.now_s)
        else:
            _perform(scheduler, record)
        scheduler.take_outbox()
    result.span_s = clock.now_s - clock.start_s
    names = {handle: story.request_id for handle, story in result.stories.items()}
    for story in result.stories.values():
        for event in story.events:
            event.text = _name_others(event.text, names)
    return result


class _Clock:
    """The time of the last input that had one. The journal's times are a process's own clock, of any beginning."""

    def __init__(self) -> None:
        self.now_s = self.start_s = 0.0
        self._has_started = False

    def see(self, now_s: float) -> None:
        if now_s == 0.0:
            return
        if not self._has_started:
            self._has_started, self.start_s = True, now_s
        self.now_s = now_s


def _perform(scheduler: Scheduler, record: Input) -> None:
    """Call the method that the record names, as it was called."""
    now_s = record.now_s
    match record.kind:
        case "hello" | "cancel":
            getattr(scheduler, record.kind)(record.who, decode_session_down(record.message))
        case "submit" | "finish":
            getattr(scheduler, record.kind)(record.who, decode_session_down(record.message), now_s)
        case "gateway_lost":
            scheduler.gateway_lost(record.who)
        case "attach" | "detach":
            getattr(scheduler, record.kind)(decode_control_down(record.message), now_s)
        case "drain":
            message: Any = decode_control_down(record.message)
            scheduler.drain(message)
        case "rank_hello":
            hello: Any = decode_rank_up(record.message)
            scheduler.rank_hello(hello, now_s)
        case "apply" | "ack":
            getattr(scheduler, record.kind)(record.who.decode(), decode_rank_up(record.message), now_s)
        case "tick":
            scheduler.tick(now_s)
        case _:
            raise msgspec.ValidationError(f"an input of kind {record.kind!r}")


def _tell(result: Replay, scheduler: Scheduler, at_s: float, handle: int, text: str) -> None:
    story = result.stories.get(handle)
    if story is None:
        story = result.stories[handle] = RequestStory(scheduler.request_id(handle))
    if story.events and story.events[-1].text == text:
        story.events[-1].last_s = at_s
        story.events[-1].count += 1
    else:
        story.events.append(Event(at_s, at_s, text))


def _name_others(text: str, names: Mapping[int, str]) -> str:
    return _OTHER.sub(lambda match: f"request {names.get(int(match[1]), match[1])!r}", text)
