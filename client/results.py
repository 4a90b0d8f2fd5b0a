"""What the calls give back: plain frozen data, apart from the wire's messages.

Spans are in seconds. Token ids are tuples of int and can be given back to `generate` as a prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# "unknown" is a value that is newer than this SDK.
FinishReason = Literal["stop", "length", "unknown"]
GroupState = Literal["STARTING", "READY", "DRAINING", "STOPPED", "UNKNOWN"]
ServingStatus = Literal["SERVING", "NOT_SERVING", "UNKNOWN"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; completion tokens are counted over all returned sequences."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, as the server measured it."""

    queue_s: float
    prefill_s: float
    decode_s: float
    preempted_s: float  # part of prefill_s or decode_s
    time_to_first_token_s: float
    total_s: float
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token
    text: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token and the most likely tokens at its place, most likely first."""

    token: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One generated sequence."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stopped_by: int | str | None  # the stop token or stop string, if one ended it
    logprobs: tuple[TokenLogprobs, ...]  # empty unless asked for
    cumulative_logprob: float | None


@dataclass(frozen=True, slots=True)
class Generation:
    """The whole answer to one request. `text`, `token_ids` and `finish_reason` are the first choice's."""

    request_id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    seed: int
    prompt_logprobs: tuple[TokenLogprobs, ...]  # empty unless asked for

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one sequence of a stream. `usage`, `timings` and `seed` come with the stream's last delta, else None."""

    request_id: str
    model: str
    index: int  # which of the n sequences
    text: str  # never half a character; may come later than its tokens
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None  # set in the sequence's last delta
    stopped_by: int | str | None
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]  # in the stream's first delta, if asked for
    usage: Usage | None
    timings: Timings | None
    seed: int | None
    cumulative_logprob: float | None = None  # in the sequence's last delta, if it was computed


@dataclass(frozen=True, slots=True)
class Model:
    """A served model."""

    name: str
    is_default: bool
    model_type: str
    max_model_len: int
    vocab_size: int
    has_chat_template: bool
    default_sampling: Mapping[str, Any]  # by option name; only what the model sets
    eos_token_ids: tuple[int, ...]
    adapters: tuple[str, ...]
    block_size: int


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """Token ids, and for a conversation the text that the chat template made of it."""

    token_ids: tuple[int, ...]
    rendered: str | None


@dataclass(frozen=True, slots=True)
class BlockPool:
    """How the blocks of one pool are used: num_free + num_cached + num_held = num_blocks."""

    num_blocks: int
    num_free: int
    num_cached: int
    num_held: int
    num_shared: int  # held blocks with more than one holder
    block_size: int  # tokens
    block_bytes: int  # on one rank


@dataclass(frozen=True, slots=True)
class Rank:
    rank: int
    device: str
    pid: int
    host: str


@dataclass(frozen=True, slots=True)
class Group:
    """A worker group: the ranks that hold one copy of a model."""

    group_id: str
    model: str
    state: GroupState
    term: int
    tensor_parallel_size: int
    num_restarts: int
    detail: str
    ranks: tuple[Rank, ...]
    num_running_sequences: int
    num_preempted_requests: int
    gpu_blocks: BlockPool
    cpu_blocks: BlockPool
    num_steps: int


@dataclass(frozen=True, slots=True)
class GroupBlocks:
    """The block pools of one group."""

    group_id: str
    gpu_blocks: BlockPool
    cpu_blocks: BlockPool
    gpu_ref_counts: bytes  # holders of each block, by block id
    gpu_states: bytes = b""  # of each block: 0 free, 1 cached, 2 held, 3 shared
    cpu_states: bytes = b""  # likewise; held ones are those of preempted sequences


@dataclass(frozen=True, slots=True)
class Queue:
    """The central queue. Its bounds are `max_waiting_requests` and `max_waiting_tokens`."""

    num_waiting_requests: int
    num_waiting_tokens: int
    max_waiting_requests: int
    max_waiting_tokens: int
    oldest_wait_s: float
    num_running_requests: int
    num_waiting_by_priority: Mapping[str, int]  # by class name ("LOW", "NORMAL", "HIGH"), those with any
