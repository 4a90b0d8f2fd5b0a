"""How much of its quota each tenant uses. State."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from quire.cluster.gateway.tenants import Caller
from quire.common.errors import Overloaded

# When a place among the requests in flight may be free again; nobody knows.
BUSY_RETRY_AFTER_S: Final = 1.0


@dataclass(slots=True)
class _Use:
    """Of one tenant."""

    num_requests: int = 0
    # Of the minute's tokens, at `as_of_s`. Below 0 after requests that took more than was left: what an answer takes is known at
    # its end, and nobody is cut off in its midst.
    tokens_left: float = 0.0
    as_of_s: float = 0.0
    has_limit: bool = False  # of tokens, when it was last looked at


class Quotas:
    """Of all tenants. Their tokens come back evenly, up to a minute's worth."""

    def __init__(self) -> None:
        self._uses: dict[str, _Use] = {}  # bounded by the tenants of the token file

    @contextlib.contextmanager
    def hold_request(self, caller: Caller, *, now_s: float) -> Iterator[None]:
        """While a generation runs.

        Raises:
            Overloaded: the tenant has as many in flight as it may, or its tokens are used up.
        """
        use = self._refill(caller, now_s)
        limits = caller.limits
        if limits.max_requests is not None and use.num_requests >= limits.max_requests:
            text = (
                f"tenant {caller.tenant} has {use.num_requests} requests in flight of {limits.max_requests}; try again when one has ended"
            )
            raise Overloaded(
                text,
                reason="TOO_MANY_REQUESTS_OF_TENANT",
                metadata={"max_requests": str(limits.max_requests)},
                retry_after_s=BUSY_RETRY_AFTER_S,
            )
        _check_tokens(caller, use)
        use.num_requests += 1
        try:
            yield
        finally:
            use.num_requests -= 1

    def charge_prompt(self, caller: Caller, num_tokens: int, *, now_s: float) -> None:
        """Tokens of a prompt that is about to run. Of many that came at once, those behind the one that used the tokens up are refused.

        Raises:
            Overloaded: the tenant's tokens are used up.
        """
        _check_tokens(caller, self._refill(caller, now_s))
        self.charge(caller, num_tokens, now_s=now_s)

    def charge(self, caller: Caller, num_tokens: int, *, now_s: float) -> None:
        """Tokens that a completion took. Who has no limit pays nothing, and owes nothing when a limit comes."""
        if caller.limits.tokens_per_minute is not None:
            self._refill(caller, now_s).tokens_left -= num_tokens

    def _refill(self, caller: Caller, now_s: float) -> _Use:
        use = self._uses.setdefault(caller.tenant, _Use(as_of_s=now_s))
        most = caller.limits.tokens_per_minute
        if most is None:
            use.has_limit = False
            return use
        if not use.has_limit:  # a limit begins with a minute's worth
            use.has_limit, use.tokens_left = True, most
        use.tokens_left = min(most, use.tokens_left + max(0.0, now_s - use.as_of_s) * most / 60)
        use.as_of_s = max(use.as_of_s, now_s)
        return use


def _check_tokens(caller: Caller, use: _Use) -> None:
    most = caller.limits.tokens_per_minute
    if most is not None and use.tokens_left < 1:
        wait_s = (1 - use.tokens_left) * 60 / most
        text = f"tenant {caller.tenant} has used up its {most} tokens per minute; try again in {wait_s:.3g} s"
        raise Overloaded(text, reason="TOKEN_QUOTA_USED_UP", metadata={"tokens_per_minute": str(most)}, retry_after_s=wait_s)
