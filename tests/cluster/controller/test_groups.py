"""The life of worker groups: every observation in every state."""

import pytest

from quire.cluster.controller.groups import (
    EDGES,
    MAX_PAUSE_S,
    MAX_RESTARTS_IN_A_ROW,
    STEADY_S,
    Action,
    AfterDrain,
    DrainAtScheduler,
    Group,
    GroupState,
    GroupTable,
    RankInfo,
    Reattach,
    RestartRanks,
    StartRanks,
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


def table_of(num_groups: int) -> GroupTable:
    """A table with so many groups of model m, all ready."""
    table = GroupTable()
    actions = table.on_scale_asked("m", num_groups, tensor_parallel_size=1)
    assert actions == [StartRanks(f"m-{index}") for index in range(num_groups)]
    for index in range(num_groups):
        assert become_ready(table, f"m-{index}") == []
    return table


def become_ready(table: GroupTable, group_id: str) -> list[Action]:
    term = table.groups[group_id].term
    return table.on_ready(group_id, term, ranks=RANKS, max_request_tokens=10, block_bytes=1, now_s=5.0)


def states(table: GroupTable) -> dict[str, str]:
    return {group_id: group.state.value for group_id, group in table.groups.items()}


def test_scaling_up_adds_groups_whose_numbers_are_never_given_twice() -> None:
    table = table_of(2)
    assert table.on_scale_asked("m", 1, tensor_parallel_size=1) == [DrainAtScheduler("m-1")]
    assert table.on_scale_asked("m", 3, tensor_parallel_size=1) == [StartRanks("m-2"), StartRanks("m-3")]
    assert states(table) == {"m-0": "ready", "m-1": "draining", "m-2": "starting", "m-3": "starting"}
    assert table.on_scale_asked("m", 3, tensor_parallel_size=1) == []
    assert table.on_drained("m-1", 1) == [StopRanks("m-1", 1)]
    table.on_gone("m-1")
    assert "m-1" not in table.groups


def test_scaling_down_takes_the_newest_first_and_those_that_start_at_once() -> None:
    table = table_of(2)
    table.on_scale_asked("m", 4, tensor_parallel_size=1)
    actions = table.on_scale_asked("m", 1, tensor_parallel_size=1)
    assert actions == [StopRanks("m-3", 1), StopRanks("m-2", 1), DrainAtScheduler("m-1")]
    assert states(table) == {"m-0": "ready", "m-1": "draining", "m-2": "stopped", "m-3": "stopped"}
    for group_id in ("m-3", "m-2"):
        table.on_gone(group_id)
    assert states(table) == {"m-0": "ready", "m-1": "draining"}
    assert table.on_lost("m-1", 1, "died", now_s=9.0) == [StopRanks("m-1", 1, is_lost=True)]
    assert not table.groups["m-1"].has_failed, "nobody wanted it any more"
    table.on_gone("m-1")
    assert table.on_scale_asked("m", 0, tensor_parallel_size=1) == [DrainAtScheduler("m-0")]


def test_scaling_replaces_groups_that_stopped_or_drain_and_forgets_them() -> None:
    table = table_of(3)
    table.on_drain_asked("m-0")
    table.on_drain_asked("m-1")
    table.on_drained("m-0", 1)
    table.on_gone("m-0")
    assert states(table) == {"m-0": "stopped", "m-1": "draining", "m-2": "ready"}
    assert table.on_scale_asked("m", 2, tensor_parallel_size=1) == [StartRanks("m-3")]
    assert states(table) == {"m-1": "draining", "m-2": "ready", "m-3": "starting"}
    table.on_drained("m-1", 1)
    table.on_gone("m-1")
    assert states(table) == {"m-2": "ready", "m-3": "starting"}


def test_groups_of_another_model_are_left_alone() -> None:
    table = table_of(1)
    table.on_scale_asked("a/b", 2, tensor_parallel_size=2)
    assert set(table.groups) == {"m-0", "a-b-0", "a-b-1"}
    table.on_scale_asked("a/b", 0, tensor_parallel_size=2)
    assert [group.group_id for group in table.wanted("m")] == ["m-0"]


def test_a_rolling_restart_takes_one_group_after_the_other() -> None:
    table = table_of(3)
    assert table.on_restart_asked(["m-0", "m-1", "m-2"]) == [DrainAtScheduler("m-0", comes_back=True)]
    assert table.on_restart_asked(["m-1", "m-0"]) == [], "asked for already"
    for index in range(3):
        assert [group.state for group in table.wanted("m")].count(GroupState.READY) == 2
        assert table.on_drained(f"m-{index}", 1) == [RestartRanks(f"m-{index}", 1, 0.0, is_lost=False)]
        following = become_ready(table, f"m-{index}")
        assert following == ([DrainAtScheduler(f"m-{index + 1}", comes_back=True)] if index < 2 else [])
    assert set(states(table).values()) == {"ready"}
    assert [(group.term, group.num_restarts, group.num_failures) for group in table.wanted("m")] == [(2, 1, 0)] * 3
    assert (table.to_restart, table.restarting) == ([], "")


def test_a_restart_waits_for_groups_that_are_starting() -> None:
    table = table_of(2)
    table.on_lost("m-1", 1, "died", now_s=6.0)
    assert table.on_restart_asked(["m-0", "m-1"]) == []
    assert become_ready(table, "m-1") == [DrainAtScheduler("m-0", comes_back=True)]


@pytest.mark.parametrize("death", ["rank", "scheduler"])
def test_a_death_in_the_midst_of_a_restart_ends_its_drain(death: str) -> None:
    table = table_of(2)
    table.on_restart_asked(["m-0", "m-1"])
    if death == "rank":
        assert table.on_lost("m-0", 1, "died", now_s=9.0) == [RestartRanks("m-0", 1, 0.0)]
        assert become_ready(table, "m-0") == [DrainAtScheduler("m-1", comes_back=True)]
    else:
        assert table.on_scheduler_lost() == [RestartRanks("m-0", 1, 0.0, is_lost=False), Reattach("m-1", 1)]
        assert become_ready(table, "m-0") == [], "the other one is not ready yet"
        assert become_ready(table, "m-1") == [DrainAtScheduler("m-1", comes_back=True)]


def test_a_group_that_does_not_come_back_ends_the_rolling_restart() -> None:
    table = table_of(2)
    table.on_restart_asked(["m-0", "m-1"])
    table.on_drained("m-0", 1)
    for term in range(2, MAX_RESTARTS_IN_A_ROW + 2):
        table.on_lost("m-0", term, "broken", now_s=7.0)
    assert states(table) == {"m-0": "starting", "m-1": "ready"}
    table.on_lost("m-0", table.groups["m-0"].term, "broken", now_s=7.0)
    assert states(table) == {"m-0": "stopped", "m-1": "ready"}
    assert table.to_restart == []


def test_a_wish_to_drain_or_for_fewer_groups_goes_before_a_restart() -> None:
    table = table_of(3)
    table.on_restart_asked(["m-2", "m-1", "m-0"])
    assert table.on_scale_asked("m", 2, tensor_parallel_size=1) == [DrainAtScheduler("m-2")]
    assert table.groups["m-2"].after_drain is AfterDrain.REMOVE
    assert table.on_drain_asked("m-1") == [DrainAtScheduler("m-1")]
    assert table.on_drained("m-1", 1) == [StopRanks("m-1", 1)]
    assert table.on_drained("m-2", 1) == [StopRanks("m-2", 1), DrainAtScheduler("m-0", comes_back=True)]
