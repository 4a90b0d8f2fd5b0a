"""Every metric of the cluster: its name, what it means, and the labels and edges that it has. Data only: no metric library here.

Names are `quire_*` in base units (seconds, bytes, tokens, ratios from 0 to 1); counters end in `_total`. docs/observe.md explains
each, and a test compares the two.
"""

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["counter", "gauge", "histogram"]

# Values of the label `priority`, by the number that messages have for the class.
PRIORITY_LABELS: Final = {1: "low", 2: "normal", 3: "high"}

# Edges of OpenTelemetry's conventions for generative AI, in seconds: gen_ai.server.time_to_first_token, .time_per_output_token
# and .request.duration, each with a bucket or two beyond for requests that are long here.
TTFT_EDGES_S: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
TIME_PER_TOKEN_EDGES_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
DURATION_EDGES_S: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68)
# What one step takes, and what planning it does: the second is meant to stay far below the first.
STEP_EDGES_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
PLAN_EDGES_S: Final = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
BATCH_EDGES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
STEP_TOKEN_EDGES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class Metric:
    """One family. Its samples have all of its labels."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()  # upper ends of a histogram's buckets, ascending; a last one without an end follows


# -- gateways: requests as clients see them ------------------------------------------------------------------------------

REQUESTS: Final = Metric(
    "quire_requests_total",
    "counter",
    "Generate and GenerateStream calls that ended, by how: outcome is ok or a gRPC code, reason says more (STOP, QUEUE_FULL, ...)",
    ("model", "outcome", "reason"),
)
TIME_TO_FIRST_TOKEN: Final = Metric(
    "quire_time_to_first_token_seconds", "histogram", "From arrival at the gateway to the first token", ("model",), TTFT_EDGES_S
)
TIME_PER_OUTPUT_TOKEN: Final = Metric(
    "quire_time_per_output_token_seconds",
    "histogram",
    "Mean gap between the tokens of one sequence, the first token's wait left out; one observation per request",
    ("model",),
    TIME_PER_TOKEN_EDGES_S,
)
REQUEST_DURATION: Final = Metric(
    "quire_request_duration_seconds", "histogram", "From arrival at the gateway to the end of a request that went well", ("model",),
    DURATION_EDGES_S,
)  # fmt: skip
QUEUE_TIME: Final = Metric(
    "quire_queue_time_seconds", "histogram", "From submission until a group took the request", ("model", "priority"), DURATION_EDGES_S
)
PREEMPTED_TIME: Final = Metric(
    "quire_preempted_time_seconds", "histogram", "Time that requests with a preemption spent preempted", ("model",), DURATION_EDGES_S
)
PROMPT_TOKENS: Final = Metric("quire_prompt_tokens_total", "counter", "Prompt tokens of requests that were submitted", ("model",))
CACHED_PROMPT_TOKENS: Final = Metric(
    "quire_prompt_tokens_cached_total", "counter", "Prompt tokens whose keys and values were found in the prefix cache", ("model",)
)
COMPLETION_TOKENS: Final = Metric(
    "quire_completion_tokens_total", "counter", "Tokens generated, also for requests that did not end well", ("model",)
)
GATEWAY_CALLS: Final = Metric("quire_gateway_calls", "gauge", "Calls of any kind inside the gateway")
GATEWAY_READY: Final = Metric("quire_gateway_ready", "gauge", "1 while the gateway's health service says SERVING")

GATEWAY_METRICS: Final = (
    REQUESTS,
    TIME_TO_FIRST_TOKEN,
    TIME_PER_OUTPUT_TOKEN,
    REQUEST_DURATION,
    QUEUE_TIME,
    PREEMPTED_TIME,
    PROMPT_TOKENS,
    CACHED_PROMPT_TOKENS,
    COMPLETION_TOKENS,
    GATEWAY_CALLS,
    GATEWAY_READY,
)

# -- the scheduler: the queue, and each group's batch and blocks ------------------------------------------------------------

SCHEDULER_UP: Final = Metric("quire_scheduler_up", "gauge", "1 if the scheduler answered this scrape; without it the metrics below stop")
REQUESTS_RUNNING: Final = Metric("quire_requests_running", "gauge", "Requests that hold rows of a group", ("model",))
REQUESTS_WAITING: Final = Metric("quire_requests_waiting", "gauge", "Requests in the central queue", ("model",))
REQUESTS_SWAPPED: Final = Metric("quire_requests_swapped", "gauge", "Requests whose blocks are in CPU memory", ("model",))
WAITING_BY_PRIORITY: Final = Metric(
    "quire_requests_waiting_by_priority", "gauge", "Requests in the central queue by the class that they asked for", ("priority",)
)
QUEUE_LIMIT: Final = Metric("quire_queue_limit_requests", "gauge", "Requests that the queue takes before it refuses")
QUEUE_TOKENS: Final = Metric("quire_queue_tokens", "gauge", "Tokens of the requests in the queue")
QUEUE_TOKEN_LIMIT: Final = Metric("quire_queue_limit_tokens", "gauge", "Tokens that the queue takes before it refuses")
OLDEST_WAIT: Final = Metric("quire_queue_oldest_wait_seconds", "gauge", "How long the first request of the queue has waited")
SCHEDULER_CPU: Final = Metric("quire_scheduler_cpu_seconds_total", "counter", "CPU time of the scheduler process")
SCHEDULER_MEMORY: Final = Metric("quire_scheduler_resident_memory_bytes", "gauge", "Memory of the scheduler process")

_GROUP: Final = ("model", "group")
GROUP_SEQUENCES: Final = Metric("quire_group_sequences_running", "gauge", "Sequences in the group's batch", _GROUP)
GROUP_SWAPPED: Final = Metric("quire_group_requests_swapped", "gauge", "Requests of the group whose blocks are in CPU memory", _GROUP)
BLOCKS: Final = Metric(
    "quire_kv_cache_blocks",
    "gauge",
    "Blocks of a pool (gpu or cpu) by state: free, cached (findable, held by nobody), held",
    (*_GROUP, "pool", "state"),
)
SHARED_BLOCKS: Final = Metric("quire_kv_cache_shared_blocks", "gauge", "Blocks with more than one holder", (*_GROUP, "pool"))
KV_USAGE: Final = Metric("quire_kv_cache_usage_ratio", "gauge", "Held share of the group's GPU blocks; cached ones count as room", _GROUP)
WASTE: Final = Metric(
    "quire_kv_cache_waste_ratio", "gauge", "Share of the slots of held GPU blocks without a token in them (fragmentation)", _GROUP
)
PREFIX_QUERIES: Final = Metric("quire_prefix_cache_queried_tokens_total", "counter", "Prompt tokens looked up in the prefix cache", _GROUP)
PREFIX_HITS: Final = Metric("quire_prefix_cache_hit_tokens_total", "counter", "Prompt tokens found in the prefix cache", _GROUP)
PREEMPTIONS: Final = Metric("quire_preemptions_total", "counter", "Preemptions by kind: swap or recompute", (*_GROUP, "kind"))
SWAP_BYTES: Final = Metric("quire_swap_bytes_total", "counter", "Bytes copied by swaps on all ranks: out or in", (*_GROUP, "direction"))
SWAP_TIME: Final = Metric(
    "quire_swap_duration_seconds",
    "histogram",
    "From the plan that starts a request's swap to the last rank's word that it is done",
    (*_GROUP, "direction"),
    STEP_EDGES_S,
)
FAILED_SWAPS: Final = Metric("quire_swaps_failed_total", "counter", "Swaps of which a copy failed: computed anew", _GROUP)
STEPS: Final = Metric("quire_steps_total", "counter", "Steps that rank 0 answered, heartbeats included", _GROUP)
STEP_TIME: Final = Metric("quire_step_duration_seconds", "histogram", "Device time of a step, as rank 0 measured it", _GROUP, STEP_EDGES_S)
STEP_HOST_TIME: Final = Metric(
    "quire_step_host_seconds_total", "counter", "Host time of steps on rank 0, besides the device's", _GROUP
)  # fmt: skip
PLAN_TIME: Final = Metric("quire_plan_duration_seconds", "histogram", "What the scheduler took to make one plan", _GROUP, PLAN_EDGES_S)
BATCH_SIZE: Final = Metric("quire_step_sequences", "histogram", "Sequences in a step that computes", _GROUP, BATCH_EDGES)
STEP_TOKENS: Final = Metric(
    "quire_step_tokens", "histogram", "Tokens that a step computes: prompts' and decodes'", _GROUP, STEP_TOKEN_EDGES
)
COMPUTED_TOKENS: Final = Metric("quire_computed_tokens_total", "counter", "Tokens computed by kind: prefill or decode", (*_GROUP, "kind"))

# -- ranks ---------------------------------------------------------------------------------------------------------------

_RANK: Final = (*_GROUP, "rank")
RANK_MEMORY: Final = Metric("quire_rank_resident_memory_bytes", "gauge", "Host memory of a rank's process", _RANK)
RANK_CPU: Final = Metric("quire_rank_cpu_seconds_total", "counter", "CPU time of a rank's process", _RANK)
DEVICE_MEMORY: Final = Metric("quire_rank_device_memory_bytes", "gauge", "Memory of a rank's GPU: used or free", (*_RANK, "state"))
STARTUP_PHASE: Final = Metric("quire_rank_startup_seconds", "gauge", "What a phase of a rank's start took", (*_RANK, "phase"))

# -- the controller --------------------------------------------------------------------------------------------------------

GROUP_STATE: Final = Metric("quire_group_state", "gauge", "1 for the state that the group is in, 0 for the others", (*_GROUP, "state"))
GROUP_RESTARTS: Final = Metric("quire_group_restarts_total", "counter", "How often the group's ranks were started anew", _GROUP)
GROUP_START_TIME: Final = Metric("quire_group_start_seconds", "gauge", "From the group's latest start until it was ready", _GROUP)
SCHEDULER_RESTARTS: Final = Metric("quire_scheduler_restarts_total", "counter", "How often the scheduler was started anew")
CACHE_INFO: Final = Metric(
    "quire_cache_config_info",
    "gauge",
    "1; the KV cache's shape is in the labels",
    (*_GROUP, "block_size", "num_gpu_blocks", "num_cpu_blocks"),
)
BUILD_INFO: Final = Metric("quire_build_info", "gauge", "1; the versions are in the labels", ("version", "python", "component"))

SCHEDULER_METRICS: Final = (
    SCHEDULER_UP,
    REQUESTS_RUNNING,
    REQUESTS_WAITING,
    REQUESTS_SWAPPED,
    WAITING_BY_PRIORITY,
    QUEUE_LIMIT,
    QUEUE_TOKENS,
    QUEUE_TOKEN_LIMIT,
    OLDEST_WAIT,
    SCHEDULER_CPU,
    SCHEDULER_MEMORY,
    GROUP_SEQUENCES,
    GROUP_SWAPPED,
    BLOCKS,
    SHARED_BLOCKS,
    KV_USAGE,
    WASTE,
    PREFIX_QUERIES,
    PREFIX_HITS,
    PREEMPTIONS,
    SWAP_BYTES,
    SWAP_TIME,
    FAILED_SWAPS,
    STEPS,
    STEP_TIME,
    STEP_HOST_TIME,
    PLAN_TIME,
    BATCH_SIZE,
    STEP_TOKENS,
    COMPUTED_TOKENS,
)
RANK_METRICS: Final = (RANK_MEMORY, RANK_CPU, DEVICE_MEMORY, STARTUP_PHASE)
CONTROLLER_METRICS: Final = (GROUP_STATE, GROUP_RESTARTS, GROUP_START_TIME, SCHEDULER_RESTARTS, CACHE_INFO, BUILD_INFO)

METRICS: Final = {
    metric.name: metric for metric in (*GATEWAY_METRICS, *SCHEDULER_METRICS, *RANK_METRICS, *CONTROLLER_METRICS)
}  # fmt: skip
