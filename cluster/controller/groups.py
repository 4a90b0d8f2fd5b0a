"""The life of worker groups, as state: what each is, what may follow, and what the controller must then do.

A group whose ranks die is started anew under the next term: at once, then after pauses that double, until it has failed too
often in a row. What it held waits in the scheduler meanwhile. One that never was ready is not tried again: its settings are wrong.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

# A group that dies within this long of being ready again has failed once more in a row.
STEADY_S: Final = 60.0
# Restarts in a row, and the pauses before them: 0, 1, 2, 4, ... seconds.
MAX_RESTARTS_IN_A_ROW: Final = 6
MAX_PAUSE_S: Final = 30.0


class GroupState(enum.Enum):
    STARTING = "starting"  # its ranks load the model
    READY = "ready"  # it serves
    DRAINING = "draining"  # it finishes what it runs and gets nothing new
    STOPPED = "stopped"  # its ranks are gone


# An edge that is not listed cannot happen. Each says what was observed.
EDGES: Final[Mapping[GroupState, frozenset[GroupState]]] = {
    GroupState.STARTING: frozenset(
        {
            GroupState.READY,  # all ranks said hello to the scheduler
            GroupState.STARTING,  # a rank died while the group was started anew
            GroupState.STOPPED,  # a rank could not load the model, or died too often; or an operator asked to drain it
        }
    ),
    GroupState.READY: frozenset(
        {
            GroupState.DRAINING,  # an operator asked
            GroupState.STARTING,  # a rank died or was late: all of them are started anew; or its scheduler died, and the next takes over
            GroupState.STOPPED,  # it died too often
        }
    ),
    GroupState.DRAINING: frozenset(
        {
            GroupState.STOPPED,  # nothing runs any more, or a rank died
        }
    ),
    GroupState.STOPPED: frozenset(),
}


def restart_pause_s(num_failures: int) -> float:
    """How long to wait before the restart that follows the n-th failure in a row."""
    return 0.0 if num_failures == 1 else min(MAX_PAUSE_S, 2.0 ** (num_failures - 2))


@dataclass(frozen=True, slots=True)
class RankInfo:
    rank: int
    device: str
    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class Group:
    """One worker group as the controller knows it."""

    group_id: str
    model: str
    tensor_parallel_size: int
    state: GroupState = GroupState.STARTING
    term: int = 1  # of the scheduler's attachment; rises with each
    ranks_term: int = 1  # under which its ranks were started
    num_restarts: int = 0
    num_failures: int = 0  # in a row
    ready_at_s: float | None = None  # since when its latest term is ready; None if no term ever was
    detail: str = ""
    has_failed: bool = False  # it stopped because something broke, not because it was drained
    ranks: tuple[RankInfo, ...] = ()
    max_request_tokens: int = 0  # most tokens of one request, once it is ready
    block_bytes: int = 0  # one block on one rank


@dataclass(frozen=True, slots=True)
class StopRanks:
    """End the group's ranks and tell the scheduler that the term is over; is_lost: whatever they do, at once."""

    group_id: str
    term: int
    is_lost: bool = False


@dataclass(frozen=True, slots=True)
class RestartRanks:
    """End the ranks of a term as StopRanks does; when they are gone, and the pause is over, start new ones under the group's term."""

    group_id: str
    lost_term: int
    pause_s: float


@dataclass(frozen=True, slots=True)
class DrainAtScheduler:
    """Tell the scheduler to give the group nothing new."""

    group_id: str


@dataclass(frozen=True, slots=True)
class Reattach:
    """Let a new scheduler plan for the group's ranks, which are there or on their way, under the group's new term."""

    group_id: str
    oldest_term: int  # under which any of these ranks was started


Action = StopRanks | RestartRanks | Reattach | DrainAtScheduler


class IllegalTransition(Exception):
    """A state was to follow that cannot: a bug of ours."""


@dataclass(slots=True)
class GroupTable:
    """All groups by id, and the version of this table, which rises with each change.

    Each method takes in one observation and returns what must be done, in order. Observations of a term that is over, or of
    a group that is stopped, change nothing.
    """

    groups: dict[str, Group] = field(default_factory=dict)
    version: int = 0

    def add(self, group: Group) -> None:
        self.groups[group.group_id] = group
        self.version += 1

    def on_ready(
        self,
        group_id: str,
        term: int,
        *,
        ranks: tuple[RankInfo, ...],
        max_request_tokens: int,
        block_bytes: int,
        now_s: float,
        detail: str = "",
    ) -> list[Action]:
        """All ranks said hello to the scheduler. detail: what an operator should know of the group, "" for nothing."""
        group = self._current(group_id, term)
        if group is None or group.state is not GroupState.STARTING:
            return []
        self._set(
            group,
            GroupState.READY,
            ranks=ranks,
            max_request_tokens=max_request_tokens,
            block_bytes=block_bytes,
            ready_at_s=now_s,
            detail=detail,
        )
        return []

    def on_lost(self, group_id: str, term: int, reason: str, *, now_s: float) -> list[Action]:
        """A rank died, failed, or was late."""
        group = self._current(group_id, term)
        if group is None or group.state is GroupState.STOPPED:
            return []
        is_steady = group.state is GroupState.READY and group.ready_at_s is not None and now_s - group.ready_at_s >= STEADY_S
        num_failures = 1 if is_steady else group.num_failures + 1
        if group.ready_at_s is None or group.state is GroupState.DRAINING or num_failures > MAX_RESTARTS_IN_A_ROW:
            self._set(group, GroupState.STOPPED, detail=reason, has_failed=True)
            return [StopRanks(group_id, term, is_lost=True)]
        self._set(
            group,
            GroupState.STARTING,
            term=term + 1,
            ranks_term=term + 1,
            num_restarts=group.num_restarts + 1,
            num_failures=num_failures,
            ranks=(),
            detail=f"started anew: {reason}",
        )
        return [RestartRanks(group_id, term, restart_pause_s(num_failures))]

    def on_scheduler_lost(self) -> list[Action]:
        """The scheduler died, and what it planned with it. Ranks keep the model and wait for the next one."""
        actions: list[Action] = []
        for group in list(self.groups.values()):
            match group.state:
                case GroupState.STARTING | GroupState.READY:
                    self._set(group, GroupState.STARTING, term=group.term + 1, ranks=(), detail="its scheduler was started anew")
                    actions.append(Reattach(group.group_id, group.ranks_term))
                case GroupState.DRAINING:
                    self._set(group, GroupState.STOPPED, detail="drained: its scheduler died")
                    actions.append(StopRanks(group.group_id, group.term))
                case GroupState.STOPPED:
                    pass
        return actions

    def on_drain_asked(self, group_id: str) -> list[Action]:
        """An operator asked to drain the group. Asking again changes nothing; a group that is starting is not needed at all."""
        group = self.groups[group_id]
        if group.state is GroupState.STARTING:
            self._set(group, GroupState.STOPPED, detail="drained before it was ready")
            return [StopRanks(group_id, group.term)]
        if group.state is not GroupState.READY:
            return []
        self._set(group, GroupState.DRAINING, detail="an operator asked")
        return [DrainAtScheduler(group_id)]

    def on_drained(self, group_id: str, term: int) -> list[Action]:
        """A draining group has nothing left."""
        group = self._current(group_id, term)
        if group is None or group.state is not GroupState.DRAINING:
            return []
        self._set(group, GroupState.STOPPED, detail="drained")
        return [StopRanks(group_id, term)]

    def _current(self, group_id: str, term: int) -> Group | None:
        group = self.groups.get(group_id)
        return group if group is not None and group.term == term else None

    def _set(self, group: Group, state: GroupState, **changes: object) -> None:
        if state not in EDGES[group.state]:
            raise IllegalTransition(f"group {group.group_id} cannot go from {group.state.value} to {state.value}")
        self.groups[group.group_id] = replace(group, state=state, **changes)  # type: ignore[arg-type]  # replace checks the names
        self.version += 1
