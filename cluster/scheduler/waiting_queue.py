"""The central queue: requests that no worker group has blocks for yet, in fair order.

Order: class, preempted before new, tenant, urgency, arrival (docs/DESIGN.md S2, S7).

class     1 low, 2 normal, 3 high; a waiting request rises one class per `ageing_s`, up to high
tenant    the one that was served least, by weight, of those with requests in the class (a virtual token counter, as in
          Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024)
urgency   the deadline, but at most `patience_s` after arrival: so who comes that much later never overtakes
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from quire.cluster.scheduler.request import Request
from quire.cluster.scheduler.timers import Timers

HIGHEST_LEVEL: Final = 3
# Tenants without requests whose counters are remembered.
MAX_IDLE_TENANTS: Final = 10_000

# (urgency, arrival, handle): what orders requests of one lane.
_Key: TypeAlias = tuple[float, float, int]


def risen_level(level: int, waited_s: float, *, ageing_s: float) -> int:
    """The class of a request after so long a wait."""
    return min(HIGHEST_LEVEL, level + int(waited_s / ageing_s))


@dataclass(slots=True)
class Tenant:
    """One tenant's share."""

    weight: float
    served: float = 0.0  # tokens over weight: the smallest goes first
    num_active: int = 0  # requests that wait or run


@dataclass(slots=True)
class _Lanes:
    """Requests of one model and class: sorted keys, preempted ones, and new ones by tenant."""

    preempted: list[_Key] = field(default_factory=list)
    new: dict[str, list[_Key]] = field(default_factory=dict)


class WaitingQueue:
    """Bounded in number and in prompt tokens. Preempted requests come back whatever the bounds: they were let in once."""

    def __init__(
        self,
        *,
        max_requests: int,
        max_tokens: int,
        ageing_s: float = 10.0,
        patience_s: float = 60.0,
        tenant_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.ageing_s = ageing_s
        self._patience_s = patience_s
        self._weights = dict(tenant_weights or {})
        self._tenants: dict[str, Tenant] = {}
        self._requests: dict[int, Request] = {}  # by handle, in order of entry
        # Invariant: each waiting request is in exactly one lane, that of its model, its level, and its tenant or "preempted".
        self._lanes: dict[str, dict[int, _Lanes]] = {}
        self._rises = Timers(self._is_to_rise)

    def __len__(self) -> int:
        return len(self._requests)

    def has_room(self, num_tokens: int) -> bool:
        return len(self._requests) < self.max_requests and self.num_tokens + num_tokens <= self.max_tokens

    def models(self) -> list[str]:
        """Models that requests wait for."""
        return [model for model, lanes in self._lanes.items() if lanes]

    # -- tenants ------------------------------------------------------------------------------------------------------

    def open_account(self, name: str) -> None:
        """A request of the tenant is there. One that comes back from idleness starts at the least of the active counters:
        it has not saved up a right to be served alone."""
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = Tenant(self._weights.get(name, 1.0))
        if not tenant.num_active:
            least = min((t.served for t in self._tenants.values() if t.num_active), default=0.0)
            tenant.served = max(tenant.served, least)
        tenant.num_active += 1

    def close_account(self, name: str) -> None:
        """A request of the tenant has ended."""
        self._tenants[name].num_active -= 1
        if len(self._tenants) > 2 * MAX_IDLE_TENANTS:
            idle = sorted((t.served, name) for name, t in self._tenants.items() if not t.num_active)
            for _, idle_name in idle[: len(idle) - MAX_IDLE_TENANTS]:
                del self._tenants[idle_name]

    def charge(self, name: str, num_tokens: int) -> None:
        """Tokens were computed for the tenant."""
        tenant = self._tenants[name]
        tenant.served += num_tokens / tenant.weight

    # -- requests -----------------------------------------------------------------------------------------------------

    def push(self, request: Request, now_s: float) -> None:
        """Add a request, in its class or the higher one that it had risen to. For new ones, `has_room` answers first."""
        request.level = max(request.submit.priority, request.level)
        self._requests[request.handle] = request
        self.num_tokens += len(request.submit.prompt_ids)
        self._enter(request, since_s=now_s if request.is_preempted else request.arrival_s)

    def remove(self, request: Request) -> None:
        """Take a request out, at whatever place it stands."""
        del self._requests[request.handle]
        self.num_tokens -= len(request.submit.prompt_ids)
        self._leave(request)

    def rise(self, now_s: float) -> bool:
        """Lift requests whose time has come; whether any was."""
        any_rose = False
        while (handle := self._rises.pop_due(now_s)) is not None:
            request = self._requests[handle]
            self._leave(request)
            request.level += 1
            self._enter(request, since_s=request.rises_s)
            any_rose = True
        return any_rose

    def next_rise_s(self) -> float | None:
        return self._rises.next_due_s()

    def in_order(self, model: str) -> Iterator[Request]:
        """The requests that wait for a model, first to last. The queue must not change meanwhile."""
        lanes_of_model = self._lanes.get(model, {})
        for level in sorted(lanes_of_model, reverse=True):
            lanes = lanes_of_model[level]
            for _, _, handle in lanes.preempted:
                yield self._requests[handle]
            for name in sorted(lanes.new, key=lambda name: (self._tenants[name].served, lanes.new[name][0])):
                for _, _, handle in lanes.new[name]:
                    yield self._requests[handle]

    def first(self) -> Request | None:
        """The request that has waited longest."""
        return min(self._requests.values(), key=lambda request: request.arrival_s, default=None)

    def all(self) -> list[Request]:
        return list(self._requests.values())

    def check(self) -> None:
        """Assert every invariant."""
        num_tokens = num_seen = 0
        for model, levels in self._lanes.items():
            for level, lanes in levels.items():
                assert lanes.preempted or lanes.new, "an empty class is kept"
                for name, keys in (("", lanes.preempted), *lanes.new.items()):
                    assert keys or not name, "an empty lane is kept"
                    last = None
                    for key in keys:
                        assert last is None or last < key, "a lane is out of order"
                        last = key
                        request = self._requests[key[2]]
                        submit = request.submit
                        assert submit.model == model
                        assert request.level == level
                        assert self._key(request) == key
                        assert request.is_preempted if not name else submit.tenant == name and not request.is_preempted
                        assert self._tenants[submit.tenant].num_active > 0
                        num_tokens += len(submit.prompt_ids)
                        num_seen += 1
        assert num_seen == len(self._requests), "a request is in no lane, or in two"
        assert num_tokens == self.num_tokens

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _is_to_rise(self, due_s: float, handle: int) -> bool:
        request = self._requests.get(handle)
        return request is not None and request.rises_s == due_s and request.level < HIGHEST_LEVEL

    def _key(self, request: Request) -> _Key:
        if request.is_preempted:
            return (request.arrival_s, request.arrival_s, request.handle)
        return (min(request.deadline_s, request.arrival_s + self._patience_s), request.arrival_s, request.handle)

    def _enter(self, request: Request, *, since_s: float) -> None:
        lanes = self._lanes.setdefault(request.submit.model, {}).setdefault(request.level, _Lanes())
        keys = lanes.preempted if request.is_preempted else lanes.new.setdefault(request.submit.tenant, [])
        insort(keys, self._key(request))
        request.rises_s = since_s + self.ageing_s
        if request.level < HIGHEST_LEVEL:
            self._rises.add(request.rises_s, request.handle, num_live=len(self._requests))

    def _leave(self, request: Request) -> None:
        levels = self._lanes[request.submit.model]
        lanes = levels[request.level]
        keys = lanes.preempted if request.is_preempted else lanes.new[request.submit.tenant]
        place = bisect_left(keys, self._key(request))
        assert keys[place][2] == request.handle
        del keys[place]
        if not keys and not request.is_preempted:
            del lanes.new[request.submit.tenant]
        if not lanes.preempted and not lanes.new:
            del levels[request.level]
            if not levels:
                del self._lanes[request.submit.model]
