"""The waiting queue once more, slow and obvious: a list, and everything sorted anew at every look."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HIGHEST_CLASS = 3


@dataclass
class Waiting:
    """A request that waits, and since when in which class."""

    handle: int
    model: str
    tenant: str
    num_tokens: int
    arrival_s: float
    deadline_s: float
    is_preempted: bool
    level: int
    since_s: float


@dataclass
class Account:
    weight: float
    served: float = 0.0
    num_active: int = 0


class SlowWaitingQueue:
    """What WaitingQueue promises (docs/DESIGN.md S2), by sorting."""

    def __init__(self, *, ageing_s: float, patience_s: float, weights: Mapping[str, float]) -> None:
        self.waiting: list[Waiting] = []
        self.accounts: dict[str, Account] = {}
        self._ageing_s = ageing_s
        self._patience_s = patience_s
        self._weights = weights

    def open_account(self, tenant: str) -> None:
        account = self.accounts.setdefault(tenant, Account(self._weights.get(tenant, 1.0)))
        active = [other.served for other in self.accounts.values() if other.num_active]
        if not account.num_active and active:
            account.served = max(account.served, min(active))
        account.num_active += 1

    def charge(self, tenant: str, num_tokens: int) -> None:
        self.accounts[tenant].served += num_tokens / self.accounts[tenant].weight

    def level(self, waiting: Waiting, now_s: float) -> int:
        """The class that the request has risen to."""
        return min(HIGHEST_CLASS, waiting.level + int((now_s - waiting.since_s) / self._ageing_s))

    def in_order(self, model: str, now_s: float) -> list[int]:
        """Handles, first to last."""
        waiting = [waiting for waiting in self.waiting if waiting.model == model]
        return [one.handle for one in sorted(waiting, key=lambda one: self._place(one, now_s))]

    def _place(self, one: Waiting, now_s: float) -> tuple[Any, ...]:
        level = self.level(one, now_s)
        if one.is_preempted:
            return (-level, 0, one.arrival_s, one.handle)
        of_tenant = [
            self._urgency(other)
            for other in self.waiting
            if (other.model, other.tenant, other.is_preempted, self.level(other, now_s)) == (one.model, one.tenant, False, level)
        ]
        return (-level, 1, self.accounts[one.tenant].served, min(of_tenant), self._urgency(one))

    def _urgency(self, one: Waiting) -> tuple[float, float, int]:
        return (min(one.deadline_s, one.arrival_s + self._patience_s), one.arrival_s, one.handle)
