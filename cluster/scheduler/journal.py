"""Everything that a scheduler is told and plans, as records: since the scheduler is pure, they can be lived through again.

A journal is a row of records, each a msgpack array behind its length in 4 bytes (little-endian): first a Header, then Inputs
in the order in which they came. It holds the token ids of prompts and completions. Its file is process.py's to write.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, BinaryIO, Final

import msgspec

from quire.cluster.scheduler.scheduler import Scheduler, SchedulerConfig
from quire.common.errors import ConfigError
from quire.common.messages import (
    AttachGroup,
    Cancel,
    DetachGroup,
    DrainGroup,
    Finish,
    Hello,
    RankHello,
    StepAck,
    StepPlan,
    StepResult,
    Submit,
    encode,
)

JOURNAL_VERSION: Final = 1
# A record longer than this is no record.
MAX_RECORD_BYTES: Final = 2**28
_LENGTH: Final = struct.Struct("<I")

Write = Callable[[bytes], None]  # takes one record, with its length


class Header(msgspec.Struct, array_like=True, frozen=True):
    """What the scheduler was made with."""

    version: int
    config: dict[str, Any]


class Input(msgspec.Struct, array_like=True, frozen=True):
    """One call of a method of Scheduler, or the plan that a call of next_plan gave."""

    kind: str  # the method's name; "plan"
    now_s: float
    who: bytes = b""  # the gateway or the group
    message: bytes = b""  # encoded


class JournaledScheduler(Scheduler):
    """A Scheduler that writes down each input before it acts on it, and each plan."""

    def __init__(self, config: SchedulerConfig, write: Write) -> None:
        super().__init__(config)
        self._write = write
        self._put(Header(JOURNAL_VERSION, asdict(config)))

    def hello(self, gateway: bytes, message: Hello) -> None:
        self._record("hello", 0.0, gateway, message)
        super().hello(gateway, message)

    def gateway_lost(self, gateway: bytes) -> None:
        self._record("gateway_lost", 0.0, gateway)
        super().gateway_lost(gateway)

    def submit(self, gateway: bytes, message: Submit, now_s: float) -> None:
        self._record("submit", now_s, gateway, message)
        super().submit(gateway, message, now_s)

    def finish(self, gateway: bytes, message: Finish, now_s: float) -> None:
        self._record("finish", now_s, gateway, message)
        super().finish(gateway, message, now_s)

    def cancel(self, gateway: bytes, message: Cancel) -> None:
        self._record("cancel", 0.0, gateway, message)
        super().cancel(gateway, message)

    def attach(self, message: AttachGroup, now_s: float) -> None:
        self._record("attach", now_s, b"", message)
        super().attach(message, now_s)

    def detach(self, message: DetachGroup, now_s: float) -> None:
        self._record("detach", now_s, b"", message)
        super().detach(message, now_s)

    def drain(self, message: DrainGroup) -> None:
        self._record("drain", 0.0, b"", message)
        super().drain(message)

    def rank_hello(self, message: RankHello, now_s: float) -> None:
        self._record("rank_hello", now_s, b"", message)
        super().rank_hello(message, now_s)

    def next_plan(self, group_id: str, now_s: float) -> StepPlan | None:
        group = self.groups.get(group_id)
        if group is None or not group.may_plan():
            return None  # nothing can happen
        self._record("next_plan", now_s, group_id.encode())
        plan = super().next_plan(group_id, now_s)
        if plan is not None:
            self._record("plan", now_s, group_id.encode(), plan)
        return plan

    def apply(self, group_id: str, result: StepResult, now_s: float) -> None:
        self._record("apply", now_s, group_id.encode(), result)
        super().apply(group_id, result, now_s)

    def ack(self, group_id: str, ack: StepAck, now_s: float) -> None:
        self._record("ack", now_s, group_id.encode(), ack)
        super().ack(group_id, ack, now_s)

    def tick(self, now_s: float) -> None:
        self._record("tick", now_s)
        super().tick(now_s)

    def _record(self, kind: str, now_s: float, who: bytes = b"", message: msgspec.Struct | None = None) -> None:
        self._put(Input(kind, now_s, who, b"" if message is None else encode(message)))

    def _put(self, record: Header | Input) -> None:
        frame = encode(record)
        self._write(_LENGTH.pack(len(frame)) + frame)


def read_journal(file: BinaryIO) -> Iterator[Header | Input]:
    """The records of a journal; a last one that was not written whole is left out.

    Raises:
        ConfigError: it is no journal, or not one of this version.
    """
    decode_header = msgspec.msgpack.Decoder(Header).decode
    decode_input = msgspec.msgpack.Decoder(Input).decode
    try:
        frame = _read_frame(file)
        header = None if frame is None else decode_header(frame)
        if header is None or header.version != JOURNAL_VERSION:
            found = "no journal" if header is None else f"a journal of version {header.version}"
            raise ConfigError(f"the file is {found}; this version of Quire reads version {JOURNAL_VERSION}")
        yield header
        while (frame := _read_frame(file)) is not None:
            yield decode_input(frame)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"the file is no journal of a scheduler, or a broken one: {error}") from None


def _read_frame(file: BinaryIO) -> bytes | None:
    """The next record's bytes; None at the end."""
    prefix = file.read(_LENGTH.size)
    if len(prefix) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(prefix)
    if size > MAX_RECORD_BYTES:
        raise ValueError(f"a record of {size} bytes")
    frame = file.read(size)
    return frame if len(frame) == size else None
