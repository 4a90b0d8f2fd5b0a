"""Random histories of groups: whatever is observed and asked, in whatever order, the table stays consistent and its wishes come true."""

import random
from collections import Counter

import pytest

from quire.cluster.controller.groups import (
    Action,
    AfterDrain,
    DrainAtScheduler,
    Group,
    GroupState,
    GroupTable,
    Reattach,
    RestartRanks,
    StartRanks,
    StopRanks,
)

NUM_EVENTS = 300
MODELS = ("m", "n")


class Edge:
    """Performs actions as the controller does, in its own time, and tells the table what follows."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.table = GroupTable()
        self.now_s = 0.0
        self.wanted = dict.fromkeys(MODELS, 0)
        self.running: dict[str, int] = {}  # groups with ranks, and the term under which these were started
        self.draining: set[tuple[str, int]] = set()
        self.num_starts: Counter[str] = Counter()

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartRanks(group_id):
                    assert group_id not in self.running
                    self.num_starts[group_id] += 1
                    self.running[group_id] = self.table.groups[group_id].ranks_term
                case RestartRanks(group_id, lost_term, pause_s):
                    assert lost_term < self.table.groups[group_id].term
                    assert pause_s >= 0
                    self.running[group_id] = self.table.groups[group_id].ranks_term
                case StopRanks(group_id):
                    del self.running[group_id]
                case DrainAtScheduler(group_id):
                    self.draining.add((group_id, self.table.groups[group_id].term))
                case Reattach(group_id, oldest_term):
                    assert oldest_term == self.running[group_id]
        self.check()

    def check(self) -> None:
        table = self.table
        for group in table.groups.values():
            assert group.ranks_term <= group.term
            assert (group.group_id in self.running) == (group.state is not GroupState.STOPPED), group
        restarted = [group.group_id for group in table.groups.values() if group.state is GroupState.DRAINING and _restarts(group)]
        assert restarted in ([], [table.restarting])
        assert table.restarting not in table.to_restart
        assert len(set(table.to_restart)) == len(table.to_restart)
        assert all(count == 1 for count in self.num_starts.values()), "an id is given twice"

    def become_ready(self, group: Group) -> None:
        self.perform(self.table.on_ready(group.group_id, group.term, ranks=(), max_request_tokens=1, block_bytes=1, now_s=self.now_s))

    def happen(self) -> None:
        """One thing, by chance."""
        self.now_s += self.rng.expovariate(0.1)
        groups = list(self.table.groups.values())
        group = self.rng.choice(groups) if groups else None
        model = self.rng.choice(MODELS)
        match self.rng.choice(["ready", "ready", "drained", "drained", "gone", "lost", "late", "scheduler", "scale", "drain", "restart"]):
            case "ready" if group is not None:
                self.become_ready(group)
            case "drained" if group is not None and (group.group_id, group.term) in self.draining:
                self.perform(self.table.on_drained(group.group_id, group.term))
            case "gone" if group is not None and group.group_id not in self.running:
                self.table.on_gone(group.group_id)
                self.check()
            case "lost" if group is not None:
                self.perform(self.table.on_lost(group.group_id, group.term, "died", now_s=self.now_s))
            case "late" if group is not None:
                version = self.table.version
                self.perform(self.table.on_lost(group.group_id, group.term - 1, "died before", now_s=self.now_s))
                assert self.table.version == version
            case "scheduler":
                self.draining.clear()
                self.perform(self.table.on_scheduler_lost())
            case "scale":
                self.wanted[model] = self.rng.randrange(4)
                self.perform(self.table.on_scale_asked(model, self.wanted[model], tensor_parallel_size=1))
                assert len(self.table.wanted(model)) == self.wanted[model]
            case "drain" if group is not None:
                self.perform(self.table.on_drain_asked(group.group_id))
            case "restart":
                self.perform(self.table.on_restart_asked([group.group_id for group in self.table.wanted(model)]))

    def settle(self) -> None:
        """Nothing dies any more, and nobody asks for anything."""
        for _ in range(100):
            for group in list(self.table.groups.values()):
                self.now_s += 1.0
                match group.state:
                    case GroupState.STARTING:
                        self.become_ready(group)
                    case GroupState.DRAINING:
                        self.perform(self.table.on_drained(group.group_id, group.term))
                    case GroupState.STOPPED:
                        self.table.on_gone(group.group_id)
                    case GroupState.READY:
                        pass


def _restarts(group: Group) -> bool:
    return group.after_drain is AfterDrain.RESTART


@pytest.mark.parametrize("seed", range(60))
def test_every_history_ends_as_it_was_wished(seed: int) -> None:
    edge = Edge(random.Random(seed))
    for _ in range(NUM_EVENTS):
        edge.happen()
    for model, number in edge.wanted.items():
        edge.perform(edge.table.on_scale_asked(model, number, tensor_parallel_size=1))
    edge.settle()
    table = edge.table
    assert {model: len(table.wanted(model)) for model in MODELS} == edge.wanted
    assert {group.state for group in table.groups.values()} <= {GroupState.READY}, "what is not wanted has left"
    assert (table.to_restart, table.restarting) == ([], "")
