"""Every message inside the cluster (docs/DESIGN.md §8), msgpack arrays over ZeroMQ.

Three links, each a tagged union:

    session   gateway   <-> scheduler     Hello, Submit, Finish, Cancel       down
                                          Welcome, Accepted, Rejected, PromptLogprobs, Tokens, Finished, Failed   up
    steps     scheduler <-> ranks         StepPlan                            down
                                          RankHello, StepResult, StepAck      up
    control   controller <-> scheduler    AttachGroup, DetachGroup, DrainGroup, StatusRequest     down
                                          GroupReady, GroupLost, GroupDrained, Status             up

Spans are durations in seconds, never instants: hosts' clocks differ. Messages of many items travel as columns.
New fields go at the end, with a default, so that neighbours of two versions understand each other; anything else raises
PROTOCOL_VERSION, which the first message of each link carries.
"""

import enum
from typing import Final

import msgspec

PROTOCOL_VERSION: Final = 1

# How KV blocks lie in a rank's memory; ranks of one group must agree because swap and transfer move whole blocks.
LAYOUT_VERSION: Final = 1


class _Message(msgspec.Struct, array_like=True, tag=True, frozen=True, gc=False):
    """Encoded as [type name, field, field, ...]."""


class _Part(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A piece of a message, encoded as [field, field, ...]."""


# ---------------------------------------------------------------------------------------------------------------------
# What both planes share


class EndReason(enum.IntEnum):
    """Why a sequence finished."""

    STOP = 1  # an end token or a stop token was drawn, or the gateway found a stop string
    LENGTH = 2  # max_tokens, or the model's length


class DrawPurpose(enum.IntEnum):
    """Which draw of a position this is: target and draft models must not share noise."""

    TARGET = 0
    DRAFT = 1


class SamplingState(_Part, frozen=True):
    """How a row's next token is chosen; everything resolved, nothing defaulted on the rank.

    Order: bias and allowed/bad ids, penalties, temperature, top_k, top_p, min_p, typical_p, then Gumbel-max with Philox
    noise keyed by (seed; token id >> 2, position, sequence_index, purpose).
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0  # unsigned, 64 bits
    sequence_index: int = 0
    min_tokens: int = 0  # stop_ids cannot be drawn before this many tokens are generated
    stop_ids: tuple[int, ...] = ()  # end and stop tokens; the scheduler ends the sequence, the rank only needs them for min_tokens
    bias: tuple[tuple[int, float], ...] = ()
    allowed_ids: tuple[int, ...] | None = None
    bad_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None  # of most likely tokens beside the drawn one; None asks for no log probabilities at all
    num_prompt_logprobs: int | None = None  # the same for prompt tokens
    num_beam_candidates: int = 0  # most likely continuations that the step reports for this row; above 0 nothing is drawn
    grammar_id: int | None = None  # of StepPlan.grammars
    typical_p: float = 1.0
    bad_sequences: tuple[tuple[int, ...], ...] = ()  # bad words of several tokens: their last token is forbidden behind the others


class Grammar(_Part, frozen=True):
    """A form that a completion must have."""

    kind: str  # json, json_schema, regex, choices or grammar
    text: str  # the schema, the expression, the choices as a JSON list, or the grammar; "" for json


class Logprobs(_Part, frozen=True):
    """Log probabilities of consecutive tokens of one sequence, as columns of one entry per token."""

    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]  # 1 is the most likely token
    top_ids: tuple[tuple[int, ...], ...]  # most likely first
    top_logprobs: tuple[tuple[float, ...], ...]


class Sample(_Part, frozen=True):
    """One number for metrics. `labels` are the metric's last ones; those of its group, and its rank, come from where it is found."""

    metric: str  # its name in common/metric_names.py
    labels: tuple[str, ...]
    value: float


class Distribution(_Part, frozen=True):
    """One histogram for metrics, labelled likewise."""

    metric: str
    labels: tuple[str, ...]
    counts: tuple[int, ...]  # by bucket, one more than the metric has edges
    total: float  # sum of what was observed


# ---------------------------------------------------------------------------------------------------------------------
# steps: scheduler <-> ranks


class RankHello(_Message, frozen=True):
    """First message of a rank: who it is and what it can hold and do."""

    version: int
    group_id: str
    term: int
    rank: int
    num_gpu_blocks: int
    num_cpu_blocks: int
    block_bytes: int  # one block on this rank, all layers, keys and values
    h2d_bytes_per_s: float  # 0.0 when not measured
    d2h_bytes_per_s: float
    prefill_tokens_per_s: tuple[tuple[int, float], ...]  # (prompt length, speed), ascending; empty when not measured
    max_rows: int
    model_fingerprint: str
    layout_version: int
    device: str = ""
    host: str = ""
    pid: int = 0
    kv_dtype: str = "auto"  # number format of the KV cache


class RowAdd(_Part, frozen=True):
    """A sequence enters the ranks' batch at `row`, which is free.

    token_ids are the prompt and, after a preemption, the tokens generated before; keys and values of
    [0, num_computed) are already in block_ids. The row computes only what the plan's chunks say until its last chunk.
    """

    row: int
    token_ids: tuple[int, ...]
    prompt_len: int
    num_computed: int
    block_ids: tuple[int, ...]
    adapter_id: int
    sampling: SamplingState


class Chunk(_Part, frozen=True):
    """Prefill of tokens [start, start + count) of a row. After the chunk with is_last the row is sampled."""

    row: int
    start: int
    count: int
    is_last: bool


class StepPlan(_Message, frozen=True):
    """One forward pass of a group, as differences to the one before. Every rank gets the same plan.

    A rank performs, in this order: remove_rows, add_rows, forks, append, grow, hold_rows, cow copies, swap_in (starts),
    wait_copies, the forward pass over `chunks` and then over the sticky rows by ascending row, sampling, and after the
    forward swap_out (starts). StepAck.copies_done says when a copy has ended; until then the scheduler gives away neither
    of its blocks, and no plan reads what it writes.

    Sticky rows: a row that has been sampled once decodes one token in every following plan until it is removed or held.
    The token that it decodes is the one sampled last, at position len(tokens) - 1; its slot is in the row's block table.

    samples: (source, row): the logits of `source`'s last token are sampled into `row`. A last chunk's row names itself
             here; with n > 1 one source feeds several rows, which `forks` gave its state.
    hold_rows: a row >= 0 stops decoding until ~row (its bitwise complement, negative) releases it. A fork is not held.
    wait_copies: copies, of this plan's swap_in or of earlier plans, that must end before the forward pass; so this step's ack has
                 them at the latest. Those that have ended before are no news.

    Beams: a row with num_beam_candidates draws nothing, its sample has a count of 0 and candidates in the result. It is held
    from the plan that adds or forks it on; the next plan appends the token that the scheduler chose for it, and computes it
    as a chunk of one token with is_last.
    """

    term: int
    step_id: int  # dense within a term, from 0
    add_rows: tuple[RowAdd, ...] = ()
    remove_rows: tuple[int, ...] = ()
    # (source row, new row, the new row's sequence_index): copies tokens, block table, computed length and sampling state
    forks: tuple[tuple[int, int, int], ...] = ()
    grow_rows: tuple[int, ...] = ()  # with grow_block_ids: append this block to this row's block table
    grow_block_ids: tuple[int, ...] = ()
    # (row, source block, target block): copies the block, and puts the target in the source's place in the row's block table
    cow: tuple[tuple[int, int, int], ...] = ()
    swap_out: tuple[tuple[int, int, int], ...] = ()  # (copy_id, gpu block, cpu block)
    swap_in: tuple[tuple[int, int, int], ...] = ()
    wait_copies: tuple[int, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    samples: tuple[tuple[int, int], ...] = ()
    hold_rows: tuple[int, ...] = ()
    draft_rows: tuple[int, ...] = ()  # with draft_ids: tokens to verify behind the row's last token
    draft_ids: tuple[tuple[int, ...], ...] = ()
    debug_checksum: bool = False
    grammars: tuple[tuple[int, Grammar], ...] = ()  # (grammar_id, the form): known to the ranks from this plan on
    forget_grammars: tuple[int, ...] = ()
    append_rows: tuple[int, ...] = ()  # with append_ids: append this token, chosen by the scheduler, to this row
    append_ids: tuple[int, ...] = ()


class RowErrorCode(enum.IntEnum):
    """Why one sample of a step failed while the others went on."""

    NOT_FINITE = 1  # the row's logits hold NaN or no finite value
    NO_ALLOWED_TOKEN = 2  # every token is forbidden
    GRAMMAR = 3


class StepResult(_Message, frozen=True):
    """What a step sampled, from rank 0, in the plan's order: first `samples` as listed, then sticky rows by ascending row.

    Rows are reused while results are in flight, so results never name them; the scheduler keeps the plan.
    """

    term: int
    step_id: int
    counts: tuple[int, ...] = ()  # tokens per sample: 1, 0 after a row error or for a beam, more with drafts
    token_ids: tuple[int, ...] = ()  # flat, `counts` of them per sample
    logprobs: tuple[tuple[int, Logprobs], ...] = ()  # (index of the sample, of its tokens), for samples that ask
    prompt_logprobs: tuple[tuple[int, Logprobs], ...] = ()  # (index of the chunk, of its tokens but the sequence's first)
    # (index of the sample, its (token id, log probability) pairs, most likely first)
    beam_candidates: tuple[tuple[int, tuple[tuple[int, float], ...]], ...] = ()
    row_errors: tuple[tuple[int, int], ...] = ()  # (index of the sample, RowErrorCode)
    device_s: float = 0.0
    host_s: float = 0.0


class StepAck(_Message, frozen=True):
    """A rank has done a step."""

    term: int
    step_id: int
    rank: int
    copies_done: tuple[int, ...] = ()
    error: str = ""  # not empty: the rank cannot go on and exits
    checksum: int = 0
    gauges: tuple[Sample, ...] = ()  # of the rank, now and then; they replace those that it told before
    copies_failed: tuple[int, ...] = ()  # copies that ended without success; their target's contents are undefined


RankUp = RankHello | StepResult | StepAck
RankDown = StepPlan

# ---------------------------------------------------------------------------------------------------------------------
# session: gateway <-> scheduler


class Hello(_Message, frozen=True):
    """First message of a gateway."""

    version: int
    gateway_id: str


class SequenceStart(_Part, frozen=True):
    """One sequence of a request, with the tokens that an earlier attempt already delivered."""

    index: int
    resumed_ids: tuple[int, ...] = ()
    cumulative_logprob: float = 0.0


class BeamSearch(_Part, frozen=True):
    num_beams: int
    length_penalty: float = 1.0
    early_stopping: int = 1


class Submit(_Message, frozen=True):
    """A validated request. (request_id, attempt) names it; a higher attempt of the same id supersedes the lower one."""

    request_id: str
    attempt: int
    tenant: str
    priority: int  # 1 low, 2 normal, 3 high
    model: str
    adapter: str
    prompt_ids: tuple[int, ...]
    block_hashes: tuple[bytes, ...]  # of the prompt's full blocks (common/hashing.py), by the block size of Welcome
    cache_root: bytes
    sequences: tuple[SequenceStart, ...]
    n: int  # sequences to return; `sequences` are those to generate, more when the best of them are asked for
    sampling: SamplingState
    max_tokens: int
    time_left_s: float
    age_s: float  # time since arrival at the gateway
    beam: BeamSearch | None = None
    trace: str = ""  # W3C traceparent
    grammar: Grammar | None = None


class Finish(_Message, frozen=True):
    """The gateway found the end of a sequence (a stop string) after kept_tokens of its completion's tokens."""

    request_id: str
    attempt: int
    sequence: int
    kept_tokens: int


class Cancel(_Message, frozen=True):
    """Ends a request, or one sequence of it. Unknown ones are ignored: the end may have crossed this on the wire."""

    request_id: str
    attempt: int
    sequence: int | None
    reason: str


class ModelLimits(_Part, frozen=True):
    """What a gateway must know of a model to prepare requests for it."""

    model: str
    block_size: int
    max_request_tokens: int  # prompt + completion that the pool and the model's length allow; 0 while no group is ready


class Welcome(_Message, frozen=True):
    """Answer to Hello, again whenever the limits change, and when the scheduler gave the gateway up and hears of it again."""

    version: int
    scheduler_id: str  # a new one after a restart: everything submitted before is lost
    models: tuple[ModelLimits, ...]
    session: int = 0  # of this gateway; a higher one says the same of everything submitted under a lower one


class Accepted(_Message, frozen=True):
    """The request waits or runs. `handle` is its short name in Tokens, Finished and Failed."""

    request_id: str
    attempt: int
    handle: int


class Rejected(_Message, frozen=True):
    """The request was not taken."""

    request_id: str
    attempt: int
    code: int  # errors.StatusCode
    reason: str
    message: str
    numbers: dict[str, str] = {}
    retry_after_s: float | None = None


class Tokens(_Message, frozen=True):
    """New tokens of one step for one gateway, as columns.

    first_offsets count from the first token of the completion, resumed tokens included, so that duplicates and gaps show.
    """

    handles: tuple[int, ...]
    sequences: tuple[int, ...]
    first_offsets: tuple[int, ...]
    counts: tuple[int, ...]
    token_ids: tuple[int, ...]  # flat
    logprobs: tuple[tuple[int, Logprobs], ...] = ()  # (index of the entry, of its tokens), for requests that ask


class PromptLogprobs(_Message, frozen=True):
    """Log probabilities of the next prompt tokens of a request, from its second token on. All come before its first token."""

    handle: int
    first_position: int
    logprobs: Logprobs


class UsageCounts(_Part, frozen=True):
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int  # over all sequences that ended so far


class Spans(_Part, frozen=True):
    """Where a request's time went, in seconds, seen by the scheduler."""

    queue_s: float
    prefill_s: float
    decode_s: float
    preempted_s: float


class Finished(_Message, frozen=True):
    """A sequence ended well; all its tokens were sent before. With is_last the request has ended."""

    handle: int
    sequence: int
    reason: EndReason
    stop_id: int | None
    is_last: bool
    usage: UsageCounts
    spans: Spans
    num_preemptions: int = 0
    cumulative_logprob: float | None = None  # of the sequence's tokens, if log probabilities or a best_of asked for it


class Failed(_Message, frozen=True):
    """The request ended without success: expired, cancelled by an operator, or failed."""

    handle: int
    code: int  # errors.StatusCode
    reason: str
    message: str
    retryable: bool
    numbers: dict[str, str] = {}
    retry_after_s: float | None = None


SessionDown = Hello | Submit | Finish | Cancel
SessionUp = Welcome | Accepted | Rejected | PromptLogprobs | Tokens | Finished | Failed

# ---------------------------------------------------------------------------------------------------------------------
# control: controller <-> scheduler


class AttachGroup(_Message, frozen=True):
    """The scheduler may plan for this group under this term, once all its ranks have said hello."""

    version: int
    group_id: str
    term: int
    model: str
    tensor_parallel_size: int
    block_size: int
    max_model_len: int
    max_sequences: int
    max_batched_tokens: int
    preemption: str = "auto"  # auto, swap or recompute
    kv_dtype: str = "auto"
    # Ranks of this term and later ones are the group's, and will obey the new term: a scheduler takes over from one that is lost.
    # 0: of the new term alone.
    oldest_term: int = 0


class DetachGroup(_Message, frozen=True):
    """The group's term is over; its ranks are dead or dying."""

    group_id: str
    term: int
    reason: str


class DrainGroup(_Message, frozen=True):
    """Finish what the group runs, give it nothing new."""

    group_id: str
    term: int
    comes_back: bool = False  # it will be restarted: what no other group takes may wait for it


class StatusRequest(_Message, frozen=True):
    """Asks for a Status with the same query_id."""

    query_id: int


class GroupReady(_Message, frozen=True):
    """All ranks of the group said hello; it is offered work."""

    group_id: str
    term: int
    num_gpu_blocks: int
    num_cpu_blocks: int
    block_bytes: int
    max_request_tokens: int
    ranks: tuple[tuple[int, str, str, int], ...]  # (rank, device, host, pid)


class GroupLost(_Message, frozen=True):
    """The group cannot go on in this term: a rank failed, was late, or disagreed."""

    group_id: str
    term: int
    reason: str


class GroupDrained(_Message, frozen=True):
    """A draining group has nothing left."""

    group_id: str
    term: int


class PoolStatus(_Part, frozen=True):
    total: int
    free: int
    cached: int
    held: int
    shared: int


class GroupStatus(_Part, frozen=True):
    group_id: str
    term: int
    num_running_sequences: int
    num_preempted_requests: int
    num_steps: int
    gpu: PoolStatus
    cpu: PoolStatus
    gpu_ref_counts: bytes  # one byte per block, 255 for more
    waste_ratio: float = 0.0  # of the slots of held blocks, those without a token
    samples: tuple[Sample, ...] = ()
    distributions: tuple[Distribution, ...] = ()
    ranks: tuple[tuple[int, tuple[Sample, ...]], ...] = ()  # what each rank last told in its StepAck


class QueueStatus(_Part, frozen=True):
    num_waiting: int
    num_waiting_tokens: int
    max_waiting: int
    max_waiting_tokens: int
    oldest_wait_s: float
    num_running_requests: int
    num_waiting_by_priority: tuple[tuple[int, int], ...] = ()  # (priority, requests), those with any


class Status(_Message, frozen=True):
    """Answer to StatusRequest."""

    query_id: int
    groups: tuple[GroupStatus, ...]
    queue: QueueStatus
    samples: tuple[Sample, ...] = ()  # of the scheduler's process


ControlDown = AttachGroup | DetachGroup | DrainGroup | StatusRequest
ControlUp = GroupReady | GroupLost | GroupDrained | Status

encode = msgspec.msgpack.Encoder().encode
decode_rank_up = msgspec.msgpack.Decoder(RankUp).decode
decode_rank_down = msgspec.msgpack.Decoder(RankDown).decode
decode_session_up = msgspec.msgpack.Decoder(SessionUp).decode
decode_session_down = msgspec.msgpack.Decoder(SessionDown).decode
decode_control_up = msgspec.msgpack.Decoder(ControlUp).decode
decode_control_down = msgspec.msgpack.Decoder(ControlDown).decode
