"""`quire bench engine`: the speed of the scheduler process and the ranks together, without gateway, gRPC and Ray.

One start serves several workloads, so that a large model is loaded once. Greedy, no stop tokens, and nothing is ever found in
the prefix cache.
"""

import argparse
import importlib.metadata
import importlib.resources
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quire.bench.table import format_table
from quire.common.errors import ConfigError

# They need the server's packages, and `quire bench serve` needs none of them.
if TYPE_CHECKING:
    from quire.bench.engine_cluster import Engine
    from quire.bench.engine_measures import Arrivals, Settings
    from quire.common.config import ModelPlan

WORKLOADS: Final = ("decode", "prefill", "mixed256", "azure_conv400", "ttft", "load", "gaps", "swap")
_GPU_NAME_TIMEOUT_S: Final = 30.0
# Settings of `quire serve` that are flags here as well.
_NUMBERS: Final = (
    ("tensor_parallel_size", "ranks over which the model is split"),
    ("gpu_blocks", "KV blocks, exactly; when not given, as many as there is memory for"),
    ("block_size", "tokens per KV block (default 16)"),
    ("max_sequences", "most sequences in a batch"),
    ("max_batched_tokens", "most tokens in a step"),
    ("max_model_len", "most tokens of prompt and completion together"),
    ("num_threads", "threads that a rank computes with on cpu"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(sorted(path.name for path in _model_configs().iterdir() if path.is_dir()))
    parser.add_argument("--model-config", metavar="DIR", help=f"folder of a model, or the shape of one: {names}; else the built-in model")
    parser.add_argument("--dummy-weights", action="store_true", help="random weights; the folder needs config.json alone")
    parser.add_argument("--workload", type=_workloads, default=("decode",), help=f"by comma, of {', '.join(WORKLOADS)} (default decode)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--model-backend", choices=("auto", "native", "transformers"), default="auto")
    parser.add_argument("--preemption", choices=("auto", "swap", "recompute"), default="auto")
    parser.add_argument("--swap-memory", metavar="BYTES", help="CPU memory per rank for preempted sequences, such as 4Gi")
    for name, text in _NUMBERS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=_count, metavar="N", help=text)
    parser.add_argument(
        "--decode-cases", type=_cases, metavar="BxC,...", help="batch x context (default 1x128,1x4096,32x1024,128x1024,256x1024)"
    )
    parser.add_argument("--batch", type=_count, metavar="N", help="with --context: this one case of decode and gaps")
    parser.add_argument("--context", type=_count, metavar="N", help="with --batch: this one case of decode and gaps")
    parser.add_argument("--prefill-cases", type=_cases, metavar="NxL,...", help="prompts x length (default 1x8000,8x8000)")
    parser.add_argument(
        "--requests",
        type=_count,
        metavar="N",
        help="of mixed256 and azure_conv400 the first N alone; of load 3 a caller, of swap 96 if not given",
    )
    parser.add_argument("--repetitions", type=_count, metavar="N", help="of each workload (default 2; prefill 3, ttft 10, swap 1)")
    parser.add_argument("--beside", type=_count, default=64, metavar="N", help="sequences that decode beside ttft's prompt (default 64)")
    parser.add_argument(
        "--load-cases",
        type=_load_cases,
        metavar="CxPxT,...",
        help="callers x prompt tokens x tokens to generate (default 64x128x128,256x128x128)",
    )
    parser.add_argument(
        "--arrivals",
        type=_arrivals,
        default=(),
        metavar="FILE",
        help='for load instead of --load-cases: a list of {"prompt_tokens", "tokens", "arrivals_s"} as JSON, such as bench serve\'s',
    )
    parser.add_argument("--log-folder", type=Path, metavar="DIR", help="keep the processes' logs here")
    parser.add_argument(
        "--start-timeout-s", type=float, default=600.0, metavar="S", help="seconds until the engine must be ready (default 600)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from quire.bench.engine_cluster import Engine
    from quire.bench.engine_measures import MEASURES
    from quire.bench.engine_swap import measure_swap

    settings = _settings(args)
    plan = _plan(args)
    if "gaps" in args.workload and plan.device != "cuda":
        raise ConfigError(f"gaps are those of a GPU's kernels, and this engine would compute on {plan.device}; leave gaps out")
    report = _report(plan)
    workloads: dict[str, Any] = {}
    of_one_engine = [name for name in args.workload if name != "swap"]
    if of_one_engine:
        with Engine(plan, log_folder=_absolute(args.log_folder), start_timeout_s=args.start_timeout_s) as engine:
            report |= _engine_facts(engine)
            settings.on_progress(f"ready after {engine.startup_s['total']:.1f} s, with {report['gpu_blocks']} blocks")
            for name in of_one_engine:
                workloads[name] = MEASURES[name](engine, settings)
    if "swap" in args.workload:
        workloads["swap"] = measure_swap(
            plan,
            settings,
            log_folder=_absolute(args.log_folder),
            start_timeout_s=args.start_timeout_s,
            num_requests=args.requests,
            repetitions=args.repetitions or 1,
        )
    report["workloads"] = workloads
    print(json.dumps(report) if args.json else report_as_text(report))
    return 0


def report_as_text(report: dict[str, Any]) -> str:
    """A heading, and a table per workload."""
    settings = ("dtype", "tensor_parallel_size", "block_size", "gpu_blocks", "max_sequences", "max_batched_tokens")
    parts = [
        f"{report['model']} on {report['device_name']}, {report['date']}",
        ", ".join(f"{key} {report[key]}" for key in settings if key in report),
    ]
    if "startup_s" in report:
        parts.append("seconds to start: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in report["startup_s"].items()))
    for name, result in report["workloads"].items():
        rows = _SHOWN[name](result)
        parts.append(f"\n{name}\n{format_table(rows[0], rows[1:])}")
    return "\n".join(parts)


def _decode_rows(result: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = [
        (str(row["batch"]), str(row["context"]), _shown(row["median_decode_ms"], 2), _shown(row["median_steady_step_ms"], 2))
        for row in result
    ]
    return [("batch", "context", "ms by difference", "ms of a steady step"), *rows]


def _prefill_rows(result: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = [
        (str(row["prompts"]), str(row["length"]), f"{row['median_tokens_per_s']:.0f}", f"{row['best_tokens_per_s']:.0f}") for row in result
    ]
    return [("prompts", "length", "tokens/s", "best"), *rows]


def _many_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [
        (f"{run['total_s']:.2f}", f"{run['output_tokens_per_s']:.0f}", f"{run['total_tokens_per_s']:.0f}", str(run["preemptions"]))
        for run in result["repetitions"]
    ]
    return [("seconds", "output tokens/s", "all tokens/s", "preemptions"), *rows]


def _ttft_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [("idle", f"{1e3 * result['idle_median_s']:.1f}")]
    rows.append((f"beside {result['beside']} decodes ({result['least_beside']} at least)", f"{1e3 * result['beside_median_s']:.1f}"))
    return [("engine", "ms to the first token"), *rows]


def _load_rows(result: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    times = ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "itl_p50_ms", "itl_p99_ms")
    rows = [
        (
            _load_name(row),
            f"{row['output_tokens_per_s']:.0f}",
            *(_shown(row[name], 2) for name in times),
        )
        for row in result
    ]
    return [("requests", "tokens/s", *(name.replace("_", " ") for name in times)), *rows]


def _load_name(row: dict[str, Any]) -> str:
    if row["callers"] is not None:
        return f"{row['callers']} at a time"
    return f"{row['requests']} arrivals" if row["rate_per_s"] is None else f"{row['rate_per_s']:.1f} arriving per second"


def _gaps_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    names = ("step_median_us", "gap_median_us", "gap_p99_us", "gap_max_us")
    numbers = (_shown(result[name], 1) for name in names)
    row = (f"{result['batch']} x {result['context']}", str(result["steps"]), *numbers, f"{100 * result['busy_share']:.1f}")
    return [("batch x context", "steps", "µs a step", "µs between steps", "p99", "most", "% of the time a kernel runs"), row]


def _swap_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [
        (
            name,
            str(run["gpu_blocks"]),
            _shown(run["median_total_s"], 2),
            str(run["preemptions"]),
            _shown(run["stolen_us_per_token"], 1),
            _shown(run["spared_itl_p99_ms"], 1),
        )
        for name, run in result["runs"].items()
    ]
    headers = ("preemption", "blocks", "seconds", "preemptions", "stolen µs/token", "p99 ITL ms of those never preempted")
    return [headers, *rows]


_SHOWN: Final[Mapping[str, Callable[[Any], list[tuple[str, ...]]]]] = {
    "decode": _decode_rows,
    "prefill": _prefill_rows,
    "mixed256": _many_rows,
    "azure_conv400": _many_rows,
    "ttft": _ttft_rows,
    "load": _load_rows,
    "gaps": _gaps_rows,
    "swap": _swap_rows,
}


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


# -- from flags ---------------------------------------------------------------------------------------------------------


def _settings(args: argparse.Namespace) -> "Settings":
    from quire.bench.engine_measures import Settings

    if (args.batch is None) != (args.context is None):
        raise ConfigError("--batch and --context name one decode case together; give both or none")
    chosen: dict[str, Any] = {"ttft_beside": args.beside, "num_requests": args.requests, "on_progress": _say, "arrivals": args.arrivals}
    if args.batch is not None:
        chosen |= {"decode_cases": ((args.batch, args.context),), "gaps_case": (args.batch, args.context)}
    elif args.decode_cases is not None:
        chosen["decode_cases"] = args.decode_cases
    if args.load_cases is not None:
        chosen["load_cases"] = args.load_cases
    if args.prefill_cases is not None:
        chosen["prefill_cases"] = args.prefill_cases
    if args.repetitions is not None:
        chosen |= dict.fromkeys(("repetitions", "prefill_repetitions", "ttft_repetitions"), args.repetitions)
    return Settings(**chosen)


def _plan(args: argparse.Namespace) -> "ModelPlan":
    from quire.common.config import plan_model, resolve_config

    flags = {name: getattr(args, name) for name, _ in _NUMBERS if getattr(args, name) is not None}
    flags |= {name: getattr(args, name) for name in ("device", "dtype", "model_backend", "preemption", "dummy_weights")}
    if args.swap_memory is not None:
        flags["swap_memory"] = args.swap_memory
    if args.model_config is not None:
        flags["model"] = str(model_config_folder(args.model_config))
    return plan_model(resolve_config(flags, environ={}).models[0])


def model_config_folder(name: str) -> Path:
    """The folder with this name: one of ours, which hold shapes without weights, or the user's."""
    own = _model_configs() / name
    return own if name and Path(name).name == name and own.is_dir() else Path(name).expanduser().absolute()


def _model_configs() -> Path:
    return Path(str(importlib.resources.files("quire.bench") / "model_configs"))


def _absolute(folder: Path | None) -> Path | None:
    return None if folder is None else folder.expanduser().absolute()


def _workloads(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in WORKLOADS:
            raise argparse.ArgumentTypeError(f"{name!r} is no workload; there are {', '.join(WORKLOADS)}")
    return names


def _cases(text: str) -> tuple[tuple[int, int], ...]:
    cases = []
    for part in text.split(","):
        count, _, length = part.strip().partition("x")
        cases.append((_count(count), _count(length)))
    return tuple(cases)


def _load_cases(text: str) -> tuple[tuple[int, int, int], ...]:
    cases = []
    for part in text.split(","):
        numbers = [_count(number) for number in part.strip().split("x")]
        if len(numbers) != 3:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} is not callers x prompt tokens x tokens to generate, such as 64x128x128")
        cases.append((numbers[0], numbers[1], numbers[2]))
    return tuple(cases)


def _arrivals(text: str) -> "tuple[Arrivals, ...]":
    from quire.bench.engine_measures import Arrivals

    try:
        loads = json.loads(Path(text).read_bytes())
        found = tuple(Arrivals(load["prompt_tokens"], load["tokens"], tuple(sorted(map(float, load["arrivals_s"])))) for load in loads)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} holds no list of loads: {type(error).__name__}: {error}") from None
    if not all(load.prompt_tokens > 0 and load.num_tokens > 0 and load.arrivals_s for load in found) or not found:
        raise argparse.ArgumentTypeError(f"{text!r} holds a load without prompt_tokens, tokens or arrivals_s, or none at all")
    return found


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


# -- for the report -----------------------------------------------------------------------------------------------------


def _report(plan: "ModelPlan") -> dict[str, Any]:
    return {
        "model": plan.name,
        "family": plan.folder.model_type,
        "device": plan.device,
        "device_name": _device_name(plan.device),
        "dtype": plan.dtype,
        "dummy_weights": plan.dummy_weights,
        "model_backend": plan.model_backend,
        "tensor_parallel_size": plan.tensor_parallel_size,
        "block_size": plan.block_size,
        "max_sequences": plan.max_sequences,
        "max_batched_tokens": plan.max_batched_tokens,
        "max_model_len": plan.max_model_len,
        "date": time.strftime("%Y-%m-%d"),
        "versions": _versions(("quire", "torch", "triton", "transformers")),
    }


def _engine_facts(engine: "Engine") -> dict[str, Any]:
    assert engine.ready is not None, "an engine that was entered is ready"
    return {
        "gpu_blocks": engine.ready.num_gpu_blocks,
        "swap_blocks": engine.ready.num_cpu_blocks,
        "block_bytes": engine.ready.block_bytes,
        "startup_s": engine.startup_s,
    }


def _versions(names: Sequence[str]) -> dict[str, str]:
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # quire itself, where it is only on the path
            continue
    return versions


def _device_name(device: str) -> str:
    """Of the first GPU, asked of its driver: this process must not take memory there. On CPU the processor's."""
    try:
        if device == "cuda":
            query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
            found = subprocess.run(query, capture_output=True, text=True, timeout=_GPU_NAME_TIMEOUT_S, check=True).stdout.splitlines()
        else:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            found = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    except (OSError, subprocess.SubprocessError):
        found = []
    return found[0].strip() if found else device


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
