"""The life of worker groups, as state: what each is, what may follow, and what the controller must then do.

A group whose ranks die is started anew under the next term: at once, then after pauses that double, until it has failed too
often in a row. What it held waits in the scheduler meanwhile. One that never was ready is not tried again: its settings are wrong.

Operators ask for three things: that a group is drained, that a model has so many groups, and that groups are restarted, one after
the other. Each begins with a drain, and `AfterDrain` says what comes behind it.
"""

import enum
from collections.abc import Mapping, Sequence
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


class AfterDrain(enum.Enum):
    """What becomes of a group once it has finished what it runs."""

    STOP = "stop"  # it stays in the table, stopped
    REMOVE = "remove"  # it leaves the table once its ranks are gone
    RESTART = "restart"  # its ranks are started anew


# An edge that is not listed cannot happen. Each says what was observed.
EDGES: Final[Mapping[GroupState, frozenset[GroupState]]] = {
    GroupState.STARTING: frozenset(
        {
            GroupState.READY,  # all ranks said hello to the scheduler
            GroupState.STARTING,  # a rank died while the group was started anew
            GroupState.STOPPED,  # a rank could not load the model, or died too often; or an operator does not want it any more
        }
    ),
    GroupState.READY: frozenset(
        {
            GroupState.DRAINING,  # an operator asked to drain or restart it, or for fewer groups
            GroupState.STARTING,  # a rank died or was late: all of them are started anew; or its scheduler died, and the next takes over
            GroupState.STOPPED,  # it died too often
        }
    ),
    GroupState.DRAINING: frozenset(
        {
            GroupState.STOPPED,  # nothing runs any more, or a rank or the scheduler died
            GroupState.STARTING,  # the same, and it was drained to be restarted
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
    after_drain: AfterDrain = AfterDrain.STOP
    is_gone: bool = False  # it is stopped, its ranks have ended, and their place was given back
    term: int = 1  # of the scheduler's attachment; rises with each
    ranks_term: int = 1  # under which its ranks were started
    num_restarts: int = 0
    num_failures: int = 0  # in a row
    ready_at_s: float | None = None  # since when its latest term is ready; None if no term ever was
    detail: str = ""
    has_failed: bool = False  # it stopped because something broke, and nobody had asked it to
    ranks: tuple[RankInfo, ...] = ()
    max_request_tokens: int = 0  # most tokens of one request, once it is ready
    block_bytes: int = 0  # one block on one rank
    index: int = 0  # rises with each group of a model, and is not given twice


@dataclass(frozen=True, slots=True)
class StartRanks:
    """Let the scheduler plan for the group, and start its first ranks."""

    group_id: str


@dataclass(frozen=True, slots=True)
class StopRanks:
    """End the group's ranks and tell the scheduler that the term is over; is_lost: whatever they do, at once. Then say on_gone."""

    group_id: str
    term: int
    is_lost: bool = False


@dataclass(frozen=True, slots=True)
class RestartRanks:
    """End the ranks of a term as StopRanks does; when they are gone, and the pause is over, start new ones under the group's term."""

    group_id: str
    lost_term: int
    pause_s: float
    is_lost: bool = True


@dataclass(frozen=True, slots=True)
class DrainAtScheduler:
    """Tell the scheduler to give the group nothing new. comes_back: requests that no other group takes may wait for it."""

    group_id: str
    comes_back: bool = False


@dataclass(frozen=True, slots=True)
class Reattach:
    """Let a new scheduler plan for the group's ranks, which are there or on their way, under the group's new term."""

    group_id: str
    oldest_term: int  # under which any of these ranks was started


Action = StartRanks | StopRanks | RestartRanks | Reattach | DrainAtScheduler


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
    next_index: dict[str, int] = field(default_factory=dict)  # by model
    # Invariant: restarting is in none of to_restart; at most one group of all is drained to be restarted, this one.
    to_restart: list[str] = field(default_factory=list)  # whose turn is yet to come, in order
    restarting: str = ""  # whose turn it is, "" for none

    def add(self, group: Group) -> None:
        self.groups[group.group_id] = group
        self.version += 1

    def wanted(self, model: str) -> list[Group]:
        """The groups of a model that serve, or will without anybody asking, oldest first."""
        return sorted(
            (group for group in self.groups.values() if group.model == model and _is_wanted(group)), key=lambda group: group.index
        )

    def on_scale_asked(self, model: str, num_groups: int, *, tensor_parallel_size: int) -> list[Action]:
        """An operator asked for so many groups of a model: new ones are added, or the newest drained and then removed.

        Groups that stopped, and those that drain, do not count, and leave the table.
        """
        for group in [group for group in self.groups.values() if group.model == model and not _is_wanted(group)]:
            self._forget(group)
        actions: list[Action] = []
        wanted = self.wanted(model)
        for _ in range(num_groups - len(wanted)):
            index = self.next_index.get(model, 0)
            self.next_index[model] = index + 1
            group = Group(f"{model.replace('/', '-')}-{index}", model, tensor_parallel_size, index=index)
            self.add(group)
            actions.append(StartRanks(group.group_id))
        for group in reversed(wanted[num_groups:]):
            actions += self._drain(group, AfterDrain.REMOVE, "an operator asked for fewer groups")
        return actions + self._roll()

    def on_restart_asked(self, group_ids: Sequence[str]) -> list[Action]:
        """An operator asked to restart groups. One follows the other: it is drained once no group of its model is starting."""
        self.to_restart += [group_id for group_id in group_ids if group_id not in (*self.to_restart, self.restarting)]
        return self._roll()

    def on_gone(self, group_id: str) -> None:
        """The ranks of a stopped group have ended, and their place was given back."""
        group = self.groups.get(group_id)
        if group is not None and group.state is GroupState.STOPPED:
            self.groups[group_id] = replace(group, is_gone=True)
            if group.after_drain is AfterDrain.REMOVE:
                self._forget(self.groups[group_id])

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
        return self._roll()

    def on_lost(self, group_id: str, term: int, reason: str, *, now_s: float) -> list[Action]:
        """A rank died, failed, or was late."""
        group = self._current(group_id, term)
        if group is None or group.state is GroupState.STOPPED:
            return []
        is_steady = group.state is GroupState.READY and group.ready_at_s is not None and now_s - group.ready_at_s >= STEADY_S
        num_failures = 1 if is_steady else group.num_failures + 1
        is_leaving = group.state is GroupState.DRAINING and group.after_drain is not AfterDrain.RESTART
        if group.ready_at_s is None or is_leaving or num_failures > MAX_RESTARTS_IN_A_ROW:
            self._set(group, GroupState.STOPPED, detail=reason, has_failed=not is_leaving)
            return [StopRanks(group_id, term, is_lost=True), *self._roll()]
        self._start_anew(group, f"started anew: {reason}", num_failures=num_failures)
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
                    actions += self._end_drain(group, "its scheduler died")
                case GroupState.STOPPED:
                    pass
        return actions

    def on_drain_asked(self, group_id: str) -> list[Action]:
        """An operator asked to drain the group. Asking again changes nothing; a group that is starting is not needed at all."""
        group = self.groups[group_id]
        if not _is_wanted(group):
            return []
        return self._drain(group, AfterDrain.STOP, "an operator asked") + self._roll()

    def on_drained(self, group_id: str, term: int) -> list[Action]:
        """A draining group has nothing left."""
        group = self._current(group_id, term)
        if group is None or group.state is not GroupState.DRAINING:
            return []
        return self._end_drain(group, "")

    def _drain(self, group: Group, after: AfterDrain, why: str) -> list[Action]:
        """Begin to drain a group that is wanted, or change what comes behind its drain."""
        if group.state is GroupState.STARTING:
            self._set(group, GroupState.STOPPED, after_drain=after, detail="drained before it was ready")
            return [StopRanks(group.group_id, group.term)]
        if group.state is GroupState.DRAINING:
            self._change(group, after_drain=after, detail=why)
        else:
            self._set(group, GroupState.DRAINING, after_drain=after, detail=why)
        return [DrainAtScheduler(group.group_id, comes_back=after is AfterDrain.RESTART)]

    def _end_drain(self, group: Group, why: str) -> list[Action]:
        """A group has nothing left to finish."""
        if group.after_drain is AfterDrain.RESTART:
            self._start_anew(group, "started anew: an operator asked", num_failures=0)
            return [RestartRanks(group.group_id, group.term, 0.0, is_lost=False)]
        self._set(group, GroupState.STOPPED, detail=f"drained: {why}" if why else "drained")
        return [StopRanks(group.group_id, group.term), *self._roll()]

    def _start_anew(self, group: Group, why: str, *, num_failures: int) -> None:
        self._set(
            group,
            GroupState.STARTING,
            after_drain=AfterDrain.STOP,
            term=group.term + 1,
            ranks_term=group.term + 1,
            num_restarts=group.num_restarts + 1,
            num_failures=num_failures,
            ranks=(),
            detail=why,
        )

    def _roll(self) -> list[Action]:
        """Begin the next restart that was asked for, if the one before has ended. A group that did not come back ends them all."""
        current = self.groups.get(self.restarting)
        if current is not None and current.state in (GroupState.DRAINING, GroupState.STARTING):
            return []
        if current is not None and current.has_failed:
            self.to_restart.clear()
        self.restarting = ""
        while self.to_restart:
            group = self.groups.get(self.to_restart[0])
            if group is not None and _is_wanted(group):
                if any(other.state is GroupState.STARTING for other in self.wanted(group.model)):
                    return []
                self.restarting = self.to_restart.pop(0)
                return self._drain(group, AfterDrain.RESTART, "an operator asked to restart it")
            self.to_restart.pop(0)
        return []

    def _forget(self, group: Group) -> None:
        """Take a group out of the table, once its ranks are gone."""
        if group.is_gone:
            del self.groups[group.group_id]
            self.version += 1
        else:
            self._change(group, after_drain=AfterDrain.REMOVE)

    def _current(self, group_id: str, term: int) -> Group | None:
        group = self.groups.get(group_id)
        return group if group is not None and group.term == term else None

    def _set(self, group: Group, state: GroupState, **changes: object) -> None:
        if state not in EDGES[group.state]:
            raise IllegalTransition(f"group {group.group_id} cannot go from {group.state.value} to {state.value}")
        self._change(group, state=state, **changes)

    def _change(self, group: Group, **changes: object) -> None:
        self.groups[group.group_id] = replace(group, **changes)  # type: ignore[arg-type]  # replace checks the names
        self.version += 1


def _is_wanted(group: Group) -> bool:
    is_leaving = group.state is GroupState.DRAINING and group.after_drain is not AfterDrain.RESTART
    return group.state is not GroupState.STOPPED and not is_leaving
