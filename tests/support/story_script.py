"""Stories as text: a script's commands, each followed by what it prints. The scripts read without this file; it is their stage.

cluster blocks=16 …     one or more groups of one size; every script begins so (Story has the names and defaults)
order 7 1 3 [g0]        these free blocks are given out next
submit A PROMPT …       a request arrives. PROMPT is words, or parts joined by +: A:5 for five words A1…A5 of its own,
                        A:answer for what A was told so far. Further: n, beams, max_tokens, priority, tenant, within (s), salt, stop
say A.0 fathers …       what the model will say to a sequence; else it says numbers
choose A 0:x 1:y …      which beams will go on after the next step, best first: place of the parent, and word
step [g0]               one plan of each group, or of this one, is made, executed and answered
run [N]                 N such steps, or as many as there is work for; prints only what the gateway hears
plan g0, answer g0      half a step each, where it matters that plans are made ahead
wait S                  time passes
cancel A, lose g0, attach g0 term=2, drain g0, copies slow|fast|fail
who, tables, contents, pool               looks at the state
why A                                     what the scheduler noted of A since the last time
"""

import inspect
import re
import shlex
from array import array
from collections.abc import Iterable
from typing import Final

from plan_teller import PlanTeller
from story import STEP_S, Story, config

from quire.cluster.scheduler.block_pool import BlockPool
from quire.cluster.scheduler.request import Request, RequestState, Sequence
from quire.common.errors import StatusCode
from quire.common.messages import Failed, Finished, GroupDrained, GroupLost, Rejected, SamplingState, StepPlan, Tokens, Welcome

COMMAND: Final = "> "
PROSE: Final = "#"
NOTHING_WRITTEN: Final = 2**32 - 1
CLASSES: Final = {"low": 1, "normal": 2, "high": 3}
CLASS_NAMES: Final = {level: name for name, level in CLASSES.items()}


def perform(script: str) -> str:
    """The script with what its commands print now, in place of what it says that they print."""
    stage = Stage()
    lines: list[str] = []
    for line in script.splitlines():
        if line.startswith(COMMAND):
            lines += [line, *stage.perform(line.removeprefix(COMMAND))]
        elif not line or line.startswith(PROSE):
            lines.append(line)
    return "\n".join(lines) + "\n"


class Stage:
    """A story, and the names by which a script speaks of it."""

    def __init__(self) -> None:
        self.story = Story()
        self._num_heard = 0  # messages to the gateway that were printed
        self._num_heard_by_controller = 0
        self._tellers: dict[str, PlanTeller] = {}  # by group
        self._last_held: dict[str, set[int]] = {}  # blocks held at the last `pool`
        self._notes: dict[int, list[str]] = {}

    def perform(self, command: str) -> list[str]:
        verb, *words = shlex.split(command)
        options = dict(word.split("=", 1) for word in words if "=" in word)
        method = getattr(self, f"do_{verb}")
        lines = method(*(word for word in words if "=" not in word), **options) or []
        return [*lines, *self._news()]

    # -- the stage ------------------------------------------------------------------------------------------------------

    def do_cluster(self, **options: str) -> None:
        """Names of Story's and SchedulerConfig's fields, some of them shortened."""
        short = {
            "blocks": "num_blocks",
            "cpu_blocks": "num_cpu_blocks",
            "rows": "max_rows",
            "budget": "max_batched_tokens",
            "groups": "num_groups",
        }
        settings: dict[str, object] = {short.get(name, name): _value(text) for name, text in options.items()}
        of_story = {name: settings.pop(name) for name in list(settings) if name in inspect.signature(Story).parameters}
        self.story = Story(**of_story, config=config(**settings))  # type: ignore[arg-type]
        self._num_heard, self._num_heard_by_controller = len(self.story.messages), len(self.story.control)
        self.story.scheduler.listen(self._take_note)

    def do_order(self, *words: str) -> None:
        block_ids = [int(word) for word in words if word.isdigit()]
        pool = self.story.group(words[-1] if words[-1].startswith("g") else "g0").pool
        for block_id in [*block_ids, *sorted(set(pool.allocate(pool.num_free)) - set(block_ids))]:
            pool.free([block_id])

    def do_submit(self, name: str, prompt: str, **options: str) -> None:
        known = {"n", "beams", "max_tokens", "priority", "tenant", "within", "salt", "stop"}
        assert options.keys() <= known, f"submit does not know {options.keys() - known}"
        self.story.submit(
            name,
            self._prompt(prompt),
            n=int(options.get("n", options.get("beams", 1))),
            num_beams=int(options.get("beams", 0)),
            max_tokens=int(options.get("max_tokens", 4)),
            priority=CLASSES[options.get("priority", "normal")],
            tenant=options.get("tenant", "local"),
            time_left_s=float(options.get("within", 100)),
            cache_salt=options.get("salt", ""),
            sampling=SamplingState(stop_ids=tuple(self.story.model.ids(options.get("stop", "").split()))),
        )

    def do_say(self, sequence: str, *words: str) -> None:
        name, _, index = sequence.partition(".")
        self.story.model.say(self.story.submitted[name].prompt_ids, int(index or 0), words)

    def do_choose(self, name: str, *choices: str) -> None:
        pairs = [(int(parent), word) for parent, word in (choice.split(":") for choice in choices)]
        self.story.model.choose(self.story.submitted[name].prompt_ids, pairs)

    def do_copies(self, kind: str) -> None:
        self.story.copies_are_slow, self.story.copies_fail = kind == "slow", kind == "fail"

    # -- what happens ---------------------------------------------------------------------------------------------------

    def do_step(self, *group_ids: str) -> list[str]:
        self.story.pass_time(STEP_S)
        lines = []
        for group_id in group_ids or list(self.story.groups):
            lines += self.do_plan(group_id)
            if self.story.groups[group_id].plans:
                self.story.answer(group_id)
            lines += self._news()
        return lines

    def do_run(self, most: str = "1000") -> None:
        for _ in range(int(most)):
            self.story.pass_time(STEP_S)
            idle = 0
            for group_id in list(self.story.groups):
                self.do_plan(group_id)
                if self.story.groups[group_id].plans:
                    self.story.answer(group_id)
                else:
                    idle += 1
            if idle == len(self.story.groups):
                return

    def do_plan(self, group_id: str) -> list[str]:
        plan = self.story.plan(group_id)
        return [f"{group_id} has nothing to do"] if plan is None else self._tell_plan(group_id, plan)

    def do_answer(self, group_id: str) -> None:
        self.story.answer(group_id)

    def do_wait(self, seconds: str) -> None:
        self.story.pass_time(float(seconds))

    def do_cancel(self, name: str) -> None:
        self.story.cancel(name)

    def do_lose(self, group_id: str) -> None:
        self.story.detach(group_id)
        self._tellers.pop(group_id, None)
        self._last_held.pop(group_id, None)

    def do_attach(self, group_id: str, *, term: str = "1") -> None:
        self.story.attach(group_id, term=int(term))

    def do_drain(self, group_id: str) -> None:
        self.story.drain(group_id)

    # -- looks ----------------------------------------------------------------------------------------------------------

    def do_who(self) -> list[str]:
        lines = []
        for group_id in self.story.groups:
            group = self.story.group(group_id)
            lines.append(f"running on {group_id}: {self._names(group.running.values())}")
            if group.swapped:
                lines.append(f"swapped out of {group_id}: {self._names(group.swapped.values())}")
        waiting = [f"{self.story.name(request.handle)}{_standing(request)}" for request in self.story.scheduler.queue.in_order("m")]
        return [*lines, f"waiting: {', '.join(waiting) or 'nobody'}"]

    def do_tables(self) -> list[str]:
        lines = []
        for group_id in self.story.groups:
            group = self.story.group(group_id)
            tables = []
            for request in (*group.running.values(), *group.swapped.values()):
                for sequence in request.sequences:
                    if sequence.block_table:
                        tables.append((self._name(sequence), _numbers(sequence.block_table)))
                    if sequence.cpu_table:
                        tables.append((self._name(sequence), f"cpu {_numbers(sequence.cpu_table)}"))
            lines += [f"{name}  {table}" for name, table in tables]
            lines += [f"block {block} is held {count} times" for block, count in enumerate(group.pool.ref_counts()) if count > 1]
        return lines or ["nobody holds a block"]

    def do_contents(self, group_id: str = "g0") -> list[str]:
        rank, group = self.story.groups[group_id].rank, self.story.group(group_id)
        gpu = [f"block {block}: {self._words(rank.gpu[block])}" for block in _held(group.pool)]
        return gpu + [f"cpu {block}: {self._words(rank.cpu[block])}" for block in _held(group.cpu_pool)]

    def do_pool(self, group_id: str = "g0") -> list[str]:
        group = self.story.group(group_id)
        held = set(_held(group.pool))
        before = self._last_held.get(group_id, set())
        self._last_held[group_id] = held
        lines = [f"held: {_numbers(sorted(held))}; {group.pool.num_cached} cached, {group.pool.num_free} free"]
        if before - held:
            lines.append(f"given back: {_numbers(sorted(before - held))}")
        if before and held - before:
            lines.append(f"handed out: {_numbers(sorted(held - before))}")
        if group.cpu_pool.num_blocks:
            lines.append(f"cpu held: {_numbers(_held(group.cpu_pool))}; {group.cpu_pool.num_available} free")
        return lines

    def do_why(self, name: str) -> list[str]:
        (handle,) = [handle for handle in self._notes if self.story.name(handle) == name]
        notes, self._notes[handle] = self._notes[handle], []
        by_name = (re.sub(r"request (\d+)", lambda match: self.story.name(int(match[1])), note) for note in dict.fromkeys(notes))
        return [f"{name} {note}" for note in by_name]

    def _take_note(self, handle: int, text: str) -> None:
        if " arrives: " not in text:  # the script has just said so
            self._notes.setdefault(handle, []).append(text)

    # -- what is printed --------------------------------------------------------------------------------------------------

    def _tell_plan(self, group_id: str, plan: StepPlan) -> list[str]:
        if group_id not in self._tellers:
            self._tellers[group_id] = PlanTeller(block_size=self.story.block_size, name=self._name, word=self.story.model.word)
        sequences = {s.row: s for request in self.story.group(group_id).running.values() for s in request.sequences if s.row >= 0}
        return [f"{group_id}, step {plan.step_id}", *self._tellers[group_id].tell(plan, sequences)]

    def _news(self) -> list[str]:
        """What gateway and controller have heard since the last time."""
        story = self.story
        lines: list[str] = []
        received: dict[str, list[int]] = {}
        ends: list[str] = []
        for message in story.messages[self._num_heard :]:
            match message:
                case Tokens():
                    place = 0
                    for handle, index, count in zip(message.handles, message.sequences, message.counts, strict=True):
                        name = self._numbered(story.name(handle), index)
                        received.setdefault(name, []).extend(message.token_ids[place : place + count])
                        place += count
                case Finished():
                    ends.append(self._tell_end(message))
                case Failed():
                    ends.append(f"{story.name(message.handle)} fails: {StatusCode(message.code).name}, {message.message}")
                case Rejected():
                    ends.append(f"{message.request_id} is refused: {StatusCode(message.code).name}, {message.message}")
                case Welcome():
                    pass
        self._num_heard = len(story.messages)
        for name, ids in received.items():
            words = [story.model.word(token_id) for token_id in ids]
            lines.append(f"{name} says {' '.join(words)}" if not words[0].isdigit() else f"{name} gets {_count(len(words), 'token')}")
        for control in story.control[self._num_heard_by_controller :]:
            match control:
                case GroupLost():
                    lines.append(f"{control.group_id} is lost: {control.reason}")
                case GroupDrained():
                    lines.append(f"{control.group_id} is drained")
        self._num_heard_by_controller = len(story.control)
        return lines + ends

    def _tell_end(self, end: Finished) -> str:
        name = self.story.name(end.handle)
        remarks = [_count(len(self.story.completions[name, end.sequence]), "token")]
        if end.usage.num_cached_tokens and end.is_last:
            remarks.append(f"{end.usage.num_cached_tokens} of {end.usage.num_prompt_tokens} prompt tokens cached")
        if end.num_preemptions and end.is_last:
            remarks.append(f"preempted {_count(end.num_preemptions, 'time')}")
        return f"{self._numbered(name, end.sequence)} finishes by {end.reason.name}: {', '.join(remarks)}"

    # -- names ----------------------------------------------------------------------------------------------------------

    def _prompt(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in [text] if " " in text else text.split("+"):
            name, _, count = part.partition(":")
            if count == "answer":
                ids += self.story.completions[name, 0]
            else:
                ids += self.story.model.ids([f"{name}{number + 1}" for number in range(int(count))] if count else text.split())
        return ids

    def _words(self, content: bytes | bytearray) -> str:
        ids = array("I", bytes(content))
        return " ".join("_" if token_id == NOTHING_WRITTEN else self.story.model.word(token_id) for token_id in ids)

    def _name(self, sequence: Sequence) -> str:
        return self._numbered(self.story.name(sequence.handle), sequence.index)

    def _numbered(self, name: str, index: int) -> str:
        return f"{name}.{index}" if len(self.story.submitted[name].sequences) > 1 else name

    def _names(self, requests: Iterable[Request]) -> str:
        return (
            ", ".join(
                self.story.name(request.handle) + (" (swapping in)" if request.state is RequestState.SWAPPING_IN else "")
                for request in requests
            )
            or "nobody"
        )


def _value(text: str) -> object:
    """A setting's value."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    if ":" in text:
        return {name: float(weight) for name, weight in (part.split(":") for part in text.split(","))}
    return text


def _numbers(block_ids: Iterable[int]) -> str:
    return " ".join(map(str, block_ids)) or "none"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _held(pool: BlockPool) -> list[int]:
    return [block_id for block_id, count in enumerate(pool.ref_counts()) if count]


def _standing(request: Request) -> str:
    """How a request waits, if there is anything to say of it."""
    remarks = [] if request.level == CLASSES["normal"] else [CLASS_NAMES[request.level]]
    if request.is_preempted:
        remarks.append("preempted")
    if request.num_skips:
        remarks.append(f"passed over {_count(request.num_skips, 'time')}")
    return f" ({', '.join(remarks)})" if remarks else ""
