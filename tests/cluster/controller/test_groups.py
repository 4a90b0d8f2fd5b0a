"""The life of worker groups: every observation in every state."""

import pytest

from quire.cluster.controller.groups import (
    EDGES,
    MAX_PAUSE_S,
    MAX_RESTARTS_IN_A_ROW,
    STEADY_S,
    DrainAtScheduler,
    Group,
    GroupState,
    GroupTable,
    RankInfo,
    Reattach,
    RestartRanks,
    StopRanks,
)

RANKS = (RankInfo(0, "cpu", "host", 1),)


def table_in(state: GroupState) -> GroupTable:
    """A table whose group g came to `state` by observations."""
    table = GroupTable()
    table.add(Group("g", "m", 1))
    if state in (GroupState.READY, GroupState.DRAINING):
        table.on_ready("g", 1, ranks=RANKS, max_request_tokens=10, block_bytes=1, now_s=5.0)
    if state is GroupState.DRAINING:
        table.on_drain_asked("g")
    if state is GroupState.STOPPED:
        table.on_lost("g", 1, "died", now_s=6.0)
    assert table.groups["g"].state is state
    return table


@pytest.mark.parametrize(
    ("before", "observation", "after", "actions"),
    [
        ("STARTING", "ready", "READY", []),
        ("STARTING", "lost", "STOPPED", [StopRanks("g", 1, is_lost=True)]),
        ("STARTING", "drain", "STOPPED", [StopRanks("g", 1)]),
        ("STARTING", "drained", "STARTING", []),
        ("READY", "ready", "READY", []),
        ("READY", "lost", "STARTING", [RestartRanks("g", 1, 0.0)]),
        ("READY", "drain", "DRAINING", [DrainAtScheduler("g")]),
        ("READY", "drained", "READY", []),
        ("DRAINING", "ready", "DRAINING", []),
        ("DRAINING", "lost", "STOPPED", [StopRanks("g", 1, is_lost=True)]),
        ("DRAINING", "drain", "DRAINING", []),
        ("DRAINING", "drained", "STOPPED", [StopRanks("g", 1)]),
        ("STOPPED", "ready", "STOPPED", []),
        ("STOPPED", "lost", "STOPPED", []),
        ("STOPPED", "drain", "STOPPED", []),
        ("STOPPED", "drained", "STOPPED", []),
    ],
)
def test_what_follows_an_observation(before: str, observation: str, after: str, actions: list[object]) -> None:
    table = table_in(GroupState[before])
    version = table.version
    match observation:
        case "ready":
            done = table.on_ready("g", 1, ranks=RANKS, max_request_tokens=10, block_bytes=1, now_s=6.0)
        case "lost":
            done = table.on_lost("g", 1, "died", now_s=6.0)
        case "drain":
            done = table.on_drain_asked("g")
        case _:
            done = table.on_drained("g", 1)
    assert table.groups["g"].state is GroupState[after]
    assert done == actions
    assert (table.version > version) == (before != after)


def test_observations_of_a_term_that_is_over_change_nothing() -> None:
    table = table_in(GroupState.READY)
    assert table.on_lost("g", 0, "late news", now_s=6.0) == []
    assert table.on_drained("g", 2) == []
    assert table.on_lost("unknown", 1, "?", now_s=6.0) == []
    assert table.groups["g"].state is GroupState.READY


def test_a_group_that_dies_again_and_again_waits_longer_each_time_and_is_given_up() -> None:
    table = table_in(GroupState.READY)
    pauses_s = []
    for term in range(1, MAX_RESTARTS_IN_A_ROW + 1):
        (action,) = table.on_lost("g", term, "died", now_s=10.0 * term)
        assert isinstance(action, RestartRanks)
        assert action.lost_term == term
        assert table.groups["g"].term == term + 1
        assert table.on_lost("g", term, "late news", now_s=10.0 * term) == []
        pauses_s.append(action.pause_s)
        if term % 2:  # every other time it does not even become ready
            table.on_ready("g", term + 1, ranks=RANKS, max_request_tokens=10, block_bytes=1, now_s=10.0 * term + 1)
    assert pauses_s == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]
    assert max(pauses_s) <= MAX_PAUSE_S
    last = MAX_RESTARTS_IN_A_ROW + 1
    assert table.on_lost("g", last, "died", now_s=100.0) == [StopRanks("g", last, is_lost=True)]
    group = table.groups["g"]
    assert (group.state, group.has_failed, group.num_restarts) == (GroupState.STOPPED, True, MAX_RESTARTS_IN_A_ROW)


def test_a_group_that_was_steady_begins_to_count_anew() -> None:
    table = table_in(GroupState.READY)
    now_s = 5.0
    for term in range(1, 3 * MAX_RESTARTS_IN_A_ROW):
        now_s += STEADY_S
        assert table.on_lost("g", term, "died", now_s=now_s) == [RestartRanks("g", term, 0.0)]
        table.on_ready("g", term + 1, ranks=RANKS, max_request_tokens=10, block_bytes=1, now_s=now_s)


def test_a_group_that_is_started_anew_can_be_drained() -> None:
    table = table_in(GroupState.READY)
    table.on_lost("g", 1, "died", now_s=6.0)
    assert table.on_drain_asked("g") == [StopRanks("g", 2)]
    assert table.groups["g"].state is GroupState.STOPPED


def test_a_group_outlives_its_scheduler_with_the_ranks_that_it_has() -> None:
    table = table_in(GroupState.READY)
    assert table.on_scheduler_lost() == [Reattach("g", 1)]
    assert table.on_scheduler_lost() == [Reattach("g", 1)]
    group = table.groups["g"]
    assert (group.state, group.term, group.ranks_term, group.num_restarts) == (GroupState.STARTING, 3, 1, 0)
    assert table.on_lost("g", 3, "died", now_s=7.0) == [RestartRanks("g", 3, 0.0)]
    assert table.on_scheduler_lost() == [Reattach("g", 4)]


def test_a_scheduler_takes_what_a_draining_group_was_to_finish_with_it() -> None:
    table = table_in(GroupState.DRAINING)
    assert table.on_scheduler_lost() == [StopRanks("g", 1)]
    assert table.groups["g"].state is GroupState.STOPPED
    assert table.on_scheduler_lost() == []


def test_every_state_has_its_edges_listed_and_nothing_follows_the_last() -> None:
    assert EDGES.keys() == set(GroupState)
    assert EDGES[GroupState.STOPPED] == frozenset()
