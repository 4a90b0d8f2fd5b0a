"""A request on its way through the scheduler, and the sequences that it generates."""

import enum
from dataclasses import dataclass, field

from quire.common.messages import SamplingState, Submit


class RequestState(enum.Enum):
    WAITING = "waiting"  # in the central queue, holds no block
    RUNNING = "running"  # in a group's batch
    ENDED = "ended"  # its last message is sent, it holds no block


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation in flight.

    Tokens [0, num_planned) have their keys and values in `block_table`, computed or on their way by plans that were sent.
    """

    handle: int  # of its request
    index: int
    prompt_len: int  # prompt and resumed tokens are known at the start
    token_ids: list[int]
    max_tokens: int  # of the completion, resumed tokens included
    num_prompt_tokens: int  # of the client's prompt, without resumed tokens
    sampling: SamplingState
    cache_root: bytes  # parent of its first block's hash
    row: int = -1  # in the group's batch; -1 outside it
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks known so far
    num_published: int = 0  # blocks that the pool can find by these
    # Invariant: num_planned <= len(token_ids) + num_in_flight and num_planned <= len(block_table) * block_size.
    num_planned: int = 0
    num_in_flight: int = 0  # sampled tokens that plans asked for and no result brought yet
    num_blocks_reserved: int = 0  # that block_table may still grow by
    num_cached_tokens: int = 0
    ended: bool = False

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_completion_planned(self) -> int:
        """Completion tokens known or asked for."""
        return self.num_completion_tokens + self.num_in_flight


@dataclass(slots=True, eq=False)
class Request:
    """One request. Times are the scheduler's clock."""

    handle: int
    gateway: bytes
    submit: Submit
    arrival_s: float
    deadline_s: float
    sequence: Sequence
    state: RequestState = RequestState.WAITING
    group_id: str = ""  # where it runs
    admitted_s: float | None = None
    first_token_s: float | None = None

    @property
    def key(self) -> tuple[bytes, str]:
        """What names a request across attempts."""
        return self.gateway, self.submit.request_id
