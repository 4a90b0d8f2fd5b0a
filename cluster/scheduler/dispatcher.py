"""Late binding: a waiting request meets a worker group only when the group has rows and blocks for it."""

from collections.abc import Mapping
from typing import Final

from quire.cluster.scheduler.group import Group, Note
from quire.cluster.scheduler.request import Request
from quire.cluster.scheduler.waiting_queue import WaitingQueue

# Requests that do not fit and are looked past, in one go, for others that do.
LOOK_AHEAD: Final = 8
# Requests that may go before one that does not fit; then blocks are kept for it (K in docs/DESIGN.md S2).
MAX_SKIPS: Final = 8


class Dispatcher:
    """Takes requests from the queue in order, each to the group that has the longest prefix of it cached, if that group is not
    overloaded, else to the one with most blocks available."""

    def __init__(self, queue: WaitingQueue, groups: Mapping[str, Group]) -> None:
        self._queue = queue
        self._groups = groups
        self.note: Note | None = None
        # Whether anything changed since the last time that could let a request in.
        self.is_due = False
        # Whether a group was lost: what could be held when it came may be too large for those that are left.
        self.may_have_shrunk = False

    def dispatch(self, now_s: float) -> None:
        """Admit what can be admitted now."""
        self.is_due = False
        for model in self._queue.models():
            groups = [group for group in self._groups.values() if group.model == model and group.is_ready]
            while groups and self._admit_one(model, groups, now_s):
                pass

    def _admit_one(self, model: str, groups: list[Group], now_s: float) -> bool:
        """Admit the first request in order that fits somewhere, at most LOOK_AHEAD places behind the first that does not."""
        passed: list[Request] = []
        closed: set[str] = set()  # groups that keep their blocks for one of `passed`
        for request in self._queue.in_order(model):
            if self.may_have_shrunk and not any(group.can_ever_hold(request.submit) for group in groups):
                continue  # its group came back smaller, or not at all; nobody waits for it
            open_groups = [group for group in groups if group.group_id not in closed]
            group = None if request.awaits_result else self._choose(request, open_groups, now_s)
            if group is not None:
                self._admit(request, group, now_s)
                for other in passed:
                    other.num_skips += other.level <= request.level
                return True
            if self.note and not request.awaits_result:
                self.note(request.handle, "waits: " + self._why_not(request, groups, closed, now_s))
            passed.append(request)
            if request.is_preempted or request.num_skips >= MAX_SKIPS:  # who ran before is passed over by nobody
                closed.add(self._keeper(request, groups))
            if len(passed) > LOOK_AHEAD or len(closed) == len(groups):
                return False
        return False

    @staticmethod
    def _keeper(request: Request, groups: list[Group]) -> str:
        """The group that lets nobody in who comes after the request: always the same one, lest its blocks are given away
        while another gathers them."""
        if not any(group.group_id == request.kept_by for group in groups):
            able = [group for group in groups if group.can_ever_hold(request.submit)]
            request.kept_by = max(able, key=lambda group: (not group.draining, group.pool.num_available)).group_id
        return request.kept_by

    def _choose(self, request: Request, groups: list[Group], now_s: float) -> Group | None:
        """The group to run a request that it can take now."""
        open_groups = [
            group for group in groups if not group.is_closed_to(request, now_s) and (not group.draining or self._belongs_to(request, group))
        ]
        open_groups.sort(key=lambda group: -group.pool.num_available)
        cached = self._with_longest_prefix(request, open_groups) if len(open_groups) > 1 else []
        return next((group for group in (*cached, *open_groups) if group.has_room(request)), None)

    @staticmethod
    def _with_longest_prefix(request: Request, groups: list[Group]) -> list[Group]:
        """Those of the groups that remember some of the request and are not overloaded, longest prefix first, else in their order."""
        counted = [(num_hits, group) for group in groups if (num_hits := group.prefix_hits(request)) and not group.is_overloaded]
        counted.sort(key=lambda item: -item[0])
        return [group for _, group in counted]

    @staticmethod
    def _belongs_to(request: Request, group: Group) -> bool:
        """A draining group still finishes what it has begun."""
        return request.is_preempted and request.group_id == group.group_id

    def _admit(self, request: Request, group: Group, now_s: float) -> None:
        self._queue.remove(request)
        request.num_skips, request.kept_by = 0, ""
        num_tokens = group.admit(request, now_s)
        self._queue.charge(request.submit.tenant, num_tokens)

    def _why_not(self, request: Request, groups: list[Group], closed: set[str], now_s: float) -> str:
        """Why no group takes the request now, for its story."""
        reasons = []
        for group in groups:
            if group.group_id in closed:
                reasons.append(f"{group.group_id} keeps its blocks for one before it")
            elif group.is_closed_to(request, now_s):
                reasons.append(f"what was swapped out of {group.group_id} goes first")
            elif group.draining and not self._belongs_to(request, group):
                reasons.append(f"{group.group_id} drains")
            else:
                reasons.append(group.lack_of_room(request))
        return "; ".join(reasons) or "no group of its model is ready"
