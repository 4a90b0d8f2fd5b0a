"""Which calls may enter: none while the gateway drains, no more than it can hold, no request id twice at once."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Final

from quire.common.errors import AlreadyExists, Overloaded, Unavailable

# Calls at once. Above what the scheduler queues by default, so that its own refusal, which knows more, comes first.
MAX_CALLS: Final = 8192
DRAIN_RETRY_AFTER_S: Final = 1.0
FULL_RETRY_AFTER_S: Final = 1.0


class CallGate:
    """Counts the calls inside."""

    def __init__(self, *, max_calls: int = MAX_CALLS) -> None:
        self._max_calls = max_calls
        self._num_calls = 0
        self._request_ids: set[tuple[str, str]] = set()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self.is_draining = False

    @property
    def num_calls(self) -> int:
        return self._num_calls

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Around each call.

        Raises:
            Unavailable: the gateway drains.
            Overloaded: too many calls are inside.
        """
        if self.is_draining:
            text = "this gateway is shutting down; another one, or a new one, takes the request"
            raise Unavailable(text, reason="DRAINING", retry_after_s=DRAIN_RETRY_AFTER_S)
        if self._num_calls >= self._max_calls:
            text = f"this gateway holds {self._num_calls} calls of {self._max_calls}; try again"
            raise Overloaded(text, reason="TOO_MANY_CALLS", retry_after_s=FULL_RETRY_AFTER_S)
        self._num_calls += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self._num_calls -= 1
            if self._num_calls == 0:
                self._is_empty.set()

    @contextlib.contextmanager
    def hold_request_id(self, request_id: str, *, tenant: str) -> Iterator[None]:
        """While a request runs, its id is taken within its tenant.

        Raises:
            AlreadyExists: another one has it.
        """
        if (tenant, request_id) in self._request_ids:
            text = f"request id {request_id} is in use by a request that has not ended; take another"
            raise AlreadyExists(text, reason="REQUEST_ID_IN_USE", field="request_id")
        self._request_ids.add((tenant, request_id))
        try:
            yield
        finally:
            self._request_ids.discard((tenant, request_id))

    def close(self) -> None:
        """Let nothing more in."""
        self.is_draining = True

    async def drain(self, *, timeout_s: float) -> bool:
        """Let nothing more in and wait until nothing is left; False if something still is."""
        self.close()
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_empty.wait()
        except TimeoutError:
            return False
        return True
