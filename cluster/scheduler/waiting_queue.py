"""The central queue: requests that no worker group has blocks for yet."""

from collections import OrderedDict

from quire.cluster.scheduler.request import Request


class WaitingQueue:
    """Requests in order of arrival, bounded in number and in prompt tokens."""

    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._requests: OrderedDict[int, Request] = OrderedDict()  # by handle

    def __len__(self) -> int:
        return len(self._requests)

    def has_room(self, num_tokens: int) -> bool:
        return len(self._requests) < self.max_requests and self.num_tokens + num_tokens <= self.max_tokens

    def push(self, request: Request) -> None:
        """Add a request at the end. `has_room` answers first."""
        self._requests[request.handle] = request
        self.num_tokens += len(request.submit.prompt_ids)

    def first(self) -> Request | None:
        """The request that has waited longest."""
        return next(iter(self._requests.values()), None)

    def remove(self, request: Request) -> None:
        """Take a request out, at whatever place it stands."""
        del self._requests[request.handle]
        self.num_tokens -= len(request.submit.prompt_ids)

    def all(self) -> list[Request]:
        return list(self._requests.values())

    def check(self) -> None:
        """Assert every invariant."""
        assert self.num_tokens == sum(len(request.submit.prompt_ids) for request in self._requests.values())
