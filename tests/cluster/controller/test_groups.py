"""The life of worker groups: every observation in every state."""

import pytest

from quire.cluster.controller.groups import EDGES, DrainAtScheduler, Group, GroupState, GroupTable, RankInfo, StopRanks

RANKS = (RankInfo(0, "cpu", "host", 1),)


def table_in(state: GroupState) -> GroupTable:
    """A table whose group g came to `state` by observations."""
    table = GroupTable()
    table.add(Group("g", "m", 1))
    if state in (GroupState.READY, GroupState.DRAINING):
        table.on_ready("g", 1, ranks=RANKS, max_request_tokens=10, block_bytes=1)
    if state is GroupState.DRAINING:
        table.on_drain_asked("g")
    if state is GroupState.STOPPED:
        table.on_lost("g", 1, "died")
    assert table.groups["g"].state is state
    return table


@pytest.mark.parametrize(
    ("before", "observation", "after", "actions"),
    [
        ("STARTING", "ready", "READY", []),
        ("STARTING", "lost", "STOPPED", [StopRanks("g")]),
        ("STARTING", "drain", "STOPPED", [StopRanks("g")]),
        ("STARTING", "drained", "STARTING", []),
        ("READY", "ready", "READY", []),
        ("READY", "lost", "STOPPED", [StopRanks("g")]),
        ("READY", "drain", "DRAINING", [DrainAtScheduler("g")]),
        ("READY", "drained", "READY", []),
        ("DRAINING", "ready", "DRAINING", []),
        ("DRAINING", "lost", "STOPPED", [StopRanks("g")]),
        ("DRAINING", "drain", "DRAINING", []),
        ("DRAINING", "drained", "STOPPED", [StopRanks("g")]),
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
            done = table.on_ready("g", 1, ranks=RANKS, max_request_tokens=10, block_bytes=1)
        case "lost":
            done = table.on_lost("g", 1, "died")
        case "drain":
            done = table.on_drain_asked("g")
        case _:
            done = table.on_drained("g", 1)
    assert table.groups["g"].state is GroupState[after]
    assert done == actions
    assert (table.version > version) == (before != after)


def test_observations_of_a_term_that_is_over_change_nothing() -> None:
    table = table_in(GroupState.READY)
    assert table.on_lost("g", 0, "late news") == []
    assert table.on_drained("g", 2) == []
    assert table.on_lost("unknown", 1, "?") == []
    assert table.groups["g"].state is GroupState.READY


def test_every_state_has_its_edges_listed_and_nothing_follows_the_last() -> None:
    assert EDGES.keys() == set(GroupState)
    assert EDGES[GroupState.STOPPED] == frozenset()
