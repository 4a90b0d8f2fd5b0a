"""Checks of single values, in one form of words."""

import math
from collections.abc import Sequence

from quire.common.errors import InvalidRequest


def in_range(field: str, value: float, *, low: float, high: float, excludes_low: bool = False) -> float:
    """The value, if it is finite and within its limits. `field` is its path in the request.

    Raises:
        InvalidRequest: it is not.
    """
    if not math.isfinite(value) or not low <= value <= high or (excludes_low and value == low):
        name = field.rpartition(".")[2]
        first = f"above {low:g}" if excludes_low else f"{low:g}"
        shown = str(value) if isinstance(value, int) else f"{value:g}"
        raise InvalidRequest(f"{name} is {shown}; it takes {first} to {high:g}", field=field, metadata={name: shown})
    return value


def check_token_ids(token_ids: Sequence[int], *, below: int, field: str, what: str) -> None:
    """Refuse ids that the model has no row for."""
    if token_ids and max(token_ids) >= below:
        token_id = max(token_ids)
        raise InvalidRequest(
            f"{what} holds token id {token_id}; this model's ids are below {below}",
            reason="UNKNOWN_TOKEN_ID",
            field=field,
            metadata={"token_id": str(token_id), "limit": str(below)},
        )
