"""Who calls: the tenant behind a token, what it may do and how much. State."""

import enum
from dataclasses import dataclass
from typing import Final


class Role(enum.Enum):
    USER = "user"  # generates, and lists models
    ADMIN = "admin"  # sees and steers the whole cluster besides


@dataclass(frozen=True, slots=True)
class Limits:
    """What all callers of a tenant share. None: no limit of the tenant's own."""

    max_requests: int | None = None  # generations in flight in one gateway
    tokens_per_minute: int | None = None  # of prompts and completions, in one gateway


@dataclass(frozen=True, slots=True)
class Caller:
    """What a token stands for. Callers of one tenant share limits, their turn in the queue and cached prompts."""

    tenant: str
    role: Role
    limits: Limits = Limits()


# Everyone, where no tokens are asked for.
LOCAL_CALLER: Final = Caller("local", Role.ADMIN)
