"""Write deploy/grafana/*.json. Run it after a change: `python tools/make_dashboards.py`; a test compares what it gives with the files.

A dashboard is a table of panels; a panel is a title, the question that it answers, a unit, and expressions with their legends.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FOLDER: Final = Path(__file__).resolve().parents[1] / "deploy" / "grafana"
SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
RATE: Final = "[$__rate_interval]"
MODEL: Final = '{model=~"$model"}'
GROUP: Final = '{model=~"$model", group=~"$group"}'


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph."""

    title: str
    question: str  # that it answers: its description
    unit: str
    queries: tuple[tuple[str, str], ...]  # (expression, legend)
    is_stacked: bool = False
    is_heatmap: bool = False


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard: rows of panels."""

    name: str  # of the file, and the uid
    title: str
    about: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]


def by_model(metric: str, more: str = "") -> str:
    return f'{metric}{{model=~"$model"{more}}}'


def by_group(metric: str, more: str = "") -> str:
    return f'{metric}{{model=~"$model", group=~"$group"{more}}}'


def quantiles(metric: str, labels: str) -> tuple[tuple[str, str], ...]:
    """The median and the two that users feel."""
    return tuple(
        (f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket{labels}{RATE})))", f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)
    )


def mean(metric: str, labels: str, legend: str) -> tuple[str, str]:
    return f"sum by (group) (rate({metric}_sum{labels}{RATE})) / sum by (group) (rate({metric}_count{labels}{RATE}))", legend


OVERVIEW: Final = Board(
    "quire-overview",
    "Quire: overview",
    "Whether the cluster serves, how much, and how fast its clients find it",
    (
        (
            "Is it up",
            (
                Panel(
                    "Groups by state",
                    "Does every group serve?",
                    "short",
                    ((f"sum by (state) ({by_model('quire_group_state')})", "{{state}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "Scheduler and gateways",
                    "Do all processes answer?",
                    "short",
                    (
                        ("quire_scheduler_up", "scheduler answers"),
                        ("sum(quire_gateway_ready)", "gateways ready"),
                        ("sum(increase(quire_scheduler_restarts_total[1h]))", "scheduler restarts in 1 h"),
                    ),
                ),
            ),
        ),
        (
            "Requests",
            (
                Panel(
                    "Requests by outcome",
                    "How much is asked, and how does it end?",
                    "reqps",
                    ((f"sum by (outcome) (rate(quire_requests_total{RATE}))", "{{outcome}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "Why requests are not served",
                    "Which refusals and failures are there?",
                    "reqps",
                    ((f'sum by (outcome, reason) (rate(quire_requests_total{{outcome!="ok"}}{RATE}))', "{{outcome}} {{reason}}"),),
                ),
                Panel(
                    "Running, waiting, swapped",
                    "Where are the requests?",
                    "short",
                    (
                        (by_model("quire_requests_running"), "running"),
                        (by_model("quire_requests_waiting"), "waiting"),
                        (by_model("quire_requests_swapped"), "swapped"),
                    ),
                    is_stacked=True,
                ),
                Panel(
                    "Queue",
                    "How far is the queue from refusing?",
                    "short",
                    (
                        ("sum by (priority) (quire_requests_waiting_by_priority)", "{{priority}}"),
                        ("quire_queue_limit_requests", "limit"),
                    ),
                ),
            ),
        ),
        (
            "Latency",
            (
                Panel(
                    "Time to first token",
                    "How long until clients see something?",
                    "s",
                    quantiles("quire_time_to_first_token_seconds", MODEL),
                ),
                Panel("Time per output token", "How fast does text flow?", "s", quantiles("quire_time_per_output_token_seconds", MODEL)),
                Panel("Whole requests", "How long do requests take?", "s", quantiles("quire_request_duration_seconds", MODEL)),
                Panel(
                    "Queue time by priority",
                    "Who waits?",
                    "s",
                    (
                        (
                            f"histogram_quantile(0.95, sum by (le, priority) (rate(quire_queue_time_seconds_bucket{MODEL}{RATE})))",
                            "{{priority}} p95",
                        ),
                        ("quire_queue_oldest_wait_seconds", "oldest now"),
                    ),
                ),
            ),
        ),
        (
            "Tokens",
            (
                Panel(
                    "Tokens per second",
                    "How much text goes in and out?",
                    "short",
                    (
                        (f"sum(rate({by_model('quire_prompt_tokens_total')}{RATE}))", "prompt"),
                        (f"sum(rate({by_model('quire_prompt_tokens_cached_total')}{RATE}))", "prompt, cached"),
                        (f"sum(rate({by_model('quire_completion_tokens_total')}{RATE}))", "completion"),
                    ),
                ),
                Panel(
                    "KV cache in use",
                    "How full are the groups?",
                    "percentunit",
                    ((by_model("quire_kv_cache_usage_ratio"), "{{group}}"),),
                ),
            ),
        ),
        (
            "Processes",
            (
                Panel(
                    "CPU",
                    "Which process is busy?",
                    "short",
                    (
                        (f'rate(process_cpu_seconds_total{{job="quire-gateway"}}{RATE})', "gateway {{instance}}"),
                        (f"rate(quire_scheduler_cpu_seconds_total{RATE})", "scheduler"),
                        (f"rate({by_model('quire_rank_cpu_seconds_total')}{RATE})", "{{group}} rank {{rank}}"),
                    ),
                ),
                Panel(
                    "Memory",
                    "Does anything grow?",
                    "bytes",
                    (
                        ('process_resident_memory_bytes{job="quire-gateway"}', "gateway {{instance}}"),
                        ("quire_scheduler_resident_memory_bytes", "scheduler"),
                        (by_model("quire_rank_resident_memory_bytes"), "{{group}} rank {{rank}}"),
                    ),
                ),
                Panel("Calls inside", "How many calls do gateways hold?", "short", (("quire_gateway_calls", "{{instance}}"),)),
                Panel(
                    "Versions",
                    "Does everything run one version?",
                    "short",
                    (("count by (component, version, python) (quire_build_info)", "{{component}} {{version}} on {{python}}"),),
                ),
            ),
        ),
    ),
)

BLOCKS: Final = Board(
    "quire-blocks",
    "Quire: blocks and preemption",
    "Where the KV cache's memory is, how much of it is wasted, and what it costs when there is too little",
    (
        (
            "Blocks",
            (
                Panel(
                    "GPU blocks",
                    "Where are the blocks?",
                    "short",
                    ((f"""sum by (state) ({by_group("quire_kv_cache_blocks", ', pool="gpu"')})""", "{{state}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "CPU blocks",
                    "How much is swapped out?",
                    "short",
                    ((f"""sum by (state) ({by_group("quire_kv_cache_blocks", ', pool="cpu"')})""", "{{state}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "KV cache in use", "How full is each group?", "percentunit", ((by_group("quire_kv_cache_usage_ratio"), "{{group}}"),)
                ),
                Panel(
                    "Waste",
                    "Which share of held slots has no token? With static allocation it would be most of them.",
                    "percentunit",
                    ((by_group("quire_kv_cache_waste_ratio"), "{{group}}"),),
                ),
            ),
        ),
        (
            "Sharing",
            (
                Panel(
                    "Shared blocks",
                    "How many blocks serve more than one sequence?",
                    "short",
                    ((by_group("quire_kv_cache_shared_blocks"), "{{group}} {{pool}}"),),
                ),
                Panel(
                    "Prefix cache hits",
                    "Which share of prompt tokens need not be computed?",
                    "percentunit",
                    (
                        (
                            f"sum by (group) (rate({by_group('quire_prefix_cache_hit_tokens_total')}{RATE}))"
                            f" / (sum by (group) (rate({by_group('quire_prefix_cache_queried_tokens_total')}{RATE})) > 0)",
                            "{{group}}",
                        ),
                    ),
                ),
            ),
        ),
        (
            "Preemption",
            (
                Panel(
                    "Preemptions",
                    "How often does somebody lose its blocks, and how?",
                    "ops",
                    ((f"sum by (group, kind) (rate({by_group('quire_preemptions_total')}{RATE}))", "{{group}} {{kind}}"),),
                ),
                Panel(
                    "Preemptions per request",
                    "Is the cache too small for what runs?",
                    "short",
                    ((by_model("model:quire_preemptions_per_request:ratio_rate5m"), "{{model}}"),),
                ),
                Panel(
                    "Swapped out now",
                    "Who waits in CPU memory?",
                    "short",
                    ((by_group("quire_group_requests_swapped"), "{{group}}"),),
                ),
                Panel(
                    "Time preempted",
                    "What do the preempted lose?",
                    "s",
                    quantiles("quire_preempted_time_seconds", MODEL),
                ),
            ),
        ),
        (
            "Swap",
            (
                Panel(
                    "Bytes swapped",
                    "How much goes over the bus?",
                    "Bps",
                    ((f"sum by (group, direction) (rate({by_group('quire_swap_bytes_total')}{RATE}))", "{{group}} {{direction}}"),),
                ),
                Panel(
                    "Duration of a swap",
                    "How long do swaps take?",
                    "s",
                    (
                        (
                            "histogram_quantile(0.95, sum by (le, direction) "
                            f"(rate({by_group('quire_swap_duration_seconds_bucket')}{RATE})))",
                            "{{direction}} p95",
                        ),
                    ),
                ),
                Panel(
                    "Failed swaps",
                    "Do copies fail?",
                    "short",
                    ((f"increase({by_group('quire_swaps_failed_total')}[1h])", "{{group}} in 1 h"),),
                ),
            ),
        ),
    ),
)

GROUPS: Final = Board(
    "quire-groups",
    "Quire: one group",
    "How a worker group's steps go, what its ranks take, and what its start took",
    (
        (
            "Steps",
            (
                Panel("Step duration", "How long does the device take?", "s", quantiles("quire_step_duration_seconds", GROUP)),
                Panel("Plan duration", "Does planning stay far below a step?", "s", quantiles("quire_plan_duration_seconds", GROUP)),
                Panel(
                    "Step durations",
                    "Are there two kinds of steps?",
                    "s",
                    ((f"sum by (le) (rate({by_group('quire_step_duration_seconds_bucket')}{RATE}))", "{{le}}"),),
                    is_heatmap=True,
                ),
                Panel(
                    "Steps per second",
                    "How fast does the loop turn, and what does the host take of it?",
                    "short",
                    (
                        (f"sum by (group) (rate({by_group('quire_steps_total')}{RATE}))", "{{group}} steps/s"),
                        (f"sum by (group) (rate({by_group('quire_step_host_seconds_total')}{RATE}))", "{{group}} host s/s"),
                    ),
                ),
            ),
        ),
        (
            "Batch",
            (
                Panel(
                    "Batch",
                    "How many sequences does a step compute?",
                    "short",
                    (
                        mean("quire_step_sequences", GROUP, "{{group}} mean"),
                        (by_group("quire_group_sequences_running"), "{{group}} running"),
                    ),
                ),
                Panel("Tokens per step", "How much does a step compute?", "short", quantiles("quire_step_tokens", GROUP)),
                Panel(
                    "Tokens computed",
                    "Is it prompts or decodes?",
                    "short",
                    ((f"sum by (kind) (rate({by_group('quire_computed_tokens_total')}{RATE}))", "{{kind}}"),),
                    is_stacked=True,
                ),
            ),
        ),
        (
            "Ranks",
            (
                Panel(
                    "Device memory",
                    "How much of the GPU is left? (GPUs alone)",
                    "bytes",
                    ((by_group("quire_rank_device_memory_bytes"), "{{group}} rank {{rank}} {{state}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "Host memory",
                    "Does a rank grow?",
                    "bytes",
                    ((by_group("quire_rank_resident_memory_bytes"), "{{group}} rank {{rank}}"),),
                ),
                Panel(
                    "CPU",
                    "Is a rank's host thread the limit?",
                    "short",
                    ((f"rate({by_group('quire_rank_cpu_seconds_total')}{RATE})", "{{group}} rank {{rank}}"),),
                ),
            ),
        ),
        (
            "Life",
            (
                Panel(
                    "Restarts",
                    "Does it come down?",
                    "short",
                    ((f"increase({by_group('quire_group_restarts_total')}[1h])", "{{group}} in 1 h"),),
                ),
                Panel(
                    "Start",
                    "What does a start take?",
                    "s",
                    (
                        (by_group("quire_group_start_seconds"), "{{group}} until ready"),
                        (by_group("quire_rank_startup_seconds"), "{{group}} rank {{rank}} {{phase}}"),
                    ),
                ),
                Panel(
                    "Shape of the cache",
                    "How many blocks of which size does each group have?",
                    "short",
                    (
                        (
                            f"count by (group, block_size, num_gpu_blocks, num_cpu_blocks) ({by_group('quire_cache_config_info')})",
                            "{{group}}: {{num_gpu_blocks}} of {{block_size}} tokens, {{num_cpu_blocks}} to swap to",
                        ),
                    ),
                ),
            ),
        ),
    ),
)

SLO: Final = Board(
    "quire-slo",
    "Quire: service levels",
    "What clients were promised: 99 % of first tokens within 2.5 s, 99.9 % of requests without a fault of ours",
    (
        (
            "First tokens",
            (
                Panel(
                    "First tokens later than 2.5 s",
                    "Is the 1 % kept?",
                    "percentunit",
                    (
                        (by_model("model:quire_slow_first_tokens:ratio_rate5m"), "{{model}} 5 m"),
                        (by_model("model:quire_slow_first_tokens:ratio_rate1h"), "{{model}} 1 h"),
                    ),
                ),
                Panel(
                    "p99 of the time to first token",
                    "How late is late?",
                    "s",
                    ((by_model("model:quire_time_to_first_token_seconds:p99_rate5m"), "{{model}}"),),
                ),
                Panel(
                    "p99 of the time per output token",
                    "Does the text flow?",
                    "s",
                    ((by_model("model:quire_time_per_output_token_seconds:p99_rate5m"), "{{model}}"),),
                ),
            ),
        ),
        (
            "Faults",
            (
                Panel(
                    "Faults of ours", "Is the 0.1 % kept?", "percentunit", (("quire_request_faults:ratio_rate5m", "internal, unavailable"),)
                ),
                Panel(
                    "Requests by outcome",
                    "What else ended how?",
                    "reqps",
                    (("sum by (outcome) (model:quire_requests:rate5m)", "{{outcome}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "Queue by tokens",
                    "How much work waits, and how much may?",
                    "short",
                    (("quire_queue_tokens", "waiting"), ("quire_queue_limit_tokens", "limit")),
                ),
                Panel(
                    "Prefix cache hits",
                    "Is latency lost because prompts are not found again?",
                    "percentunit",
                    ((by_model("group:quire_prefix_cache_hit:ratio_rate5m"), "{{group}}"),),
                ),
            ),
        ),
    ),
)

BOARDS: Final = (OVERVIEW, BLOCKS, GROUPS, SLO)


def build(board: Board) -> str:
    """A dashboard as Grafana imports it."""
    builder = (
        dashboard.Dashboard(board.title)
        .uid(board.name)
        .description(board.about)
        .tags(["quire", "generated"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus").label("Data source"))
        .with_variable(_variable("model", "label_values(quire_cache_config_info, model)"))
        .with_variable(_variable("group", 'label_values(quire_cache_config_info{model=~"$model"}, group)'))
    )
    for title, panels in board.rows:
        builder = builder.with_row(dashboard.Row(title))
        for panel in panels:
            builder = builder.with_panel(_panel(panel, width=24 // min(len(panels), 4)))
    return JSONEncoder(sort_keys=True, indent=2).encode(builder.build()) + "\n"


def _variable(name: str, query: str) -> Any:
    return dashboard.QueryVariable(name).datasource(SOURCE).query(query).include_all(True).multi(True).all_value(".*").label(name)


def _panel(panel: Panel, *, width: int) -> Any:
    graph: Any = heatmap.Panel() if panel.is_heatmap else timeseries.Panel()
    graph = graph.title(panel.title).description(panel.question).unit(panel.unit).datasource(SOURCE).span(width).height(8)
    for expression, legend in panel.queries:
        query = prometheus.Dataquery().expr(expression).legend_format(legend).range()
        graph = graph.with_target(query.format(PromQueryFormat.HEATMAP) if panel.is_heatmap else query)
    if panel.is_heatmap:
        return graph
    legend_options = common.VizLegendOptions().show_legend(True).display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    graph = graph.min(0).legend(legend_options)
    if panel.is_stacked:
        graph = graph.fill_opacity(40).stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    return graph


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for board in BOARDS:
        (FOLDER / f"{board.name}.json").write_text(build(board))
    return 0


if __name__ == "__main__":
    sys.exit(main())
