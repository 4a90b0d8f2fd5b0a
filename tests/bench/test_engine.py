import json
from pathlib import Path
from typing import Any

import pytest

from quire.bench.engine import model_config_folder
from quire.bench.engine_cluster import Engine
from quire.bench.engine_swap import measure_policy
from quire.bench.engine_workloads import azure_conv400, fit, mixed256
from quire.cli.main import main
from quire.common.config import ModelConfig, plan_model
from quire.common.errors import Unavailable
from quire.common.model_folder import read_model_folder

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 256,
}


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    """A folder with a config.json alone."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").write_text(json.dumps(TINY))
    return tmp_path / "tiny"


def bench(folder: Path, *flags: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The report of a run on dummy weights."""
    command = ["bench", "engine", "--device", "cpu", "--model-config", str(folder), "--dummy-weights", "--num-threads", "1", "--json"]
    assert main([*command, *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert isinstance(report, dict)
    return report


def test_one_start_serves_every_workload(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--decode-cases", "1x16,3x24", "--prefill-cases", "2x40", "--requests", "4", "--repetitions", "2", "--beside", "2")
    loads = ("--load-cases", "2x16x8,3x12x8")
    workload = "decode,prefill,mixed256,azure_conv400,ttft,load"
    logs = tiny_config.parent / "logs"
    report = bench(tiny_config, "--workload", workload, *sizes, *loads, "--log-folder", str(logs), capsys=capsys)
    assert (report["model"], report["device"], report["dtype"], report["dummy_weights"]) == ("tiny", "cpu", "float32", True)
    assert {"total", "torch", "weights", "pool", "warm-up"} <= set(report["startup_s"])
    assert report["gpu_blocks"] > 0
    assert {path.name for path in logs.iterdir()} == {"scheduler.log", "rank-0.log"}
    results = report["workloads"]
    assert list(results) == workload.split(",")
    assert [(row["batch"], row["context"], len(row["repetitions"])) for row in results["decode"]] == [(1, 16, 2), (3, 24, 2)]
    for row in results["decode"]:
        # All decode together for 130 steps but the few in which prompts are computed.
        assert row["median_steady_step_ms"] > 0
        assert all(repetition["long_s"] > repetition["short_s"] > 0 for repetition in row["repetitions"])
        assert all(repetition["cached_tokens"] == 0 for repetition in row["repetitions"]), "an earlier run's work is found again"
    [prefill] = results["prefill"]
    assert (prefill["prompts"], prefill["length"], len(prefill["repetitions_s"])) == (2, 40, 2)
    for name, requests in (("mixed256", mixed256(500)), ("azure_conv400", azure_conv400(500))):
        fitted, num_shortened = fit(requests[:4], max_request_tokens=256)
        assert (results[name]["requests"], results[name]["shortened"]) == (4, num_shortened)
        for run in results[name]["repetitions"]:
            assert run["output_tokens"] == sum(count for _, count in fitted), "nothing ends early"
            assert run["prompt_tokens"] == sum(len(prompt) for prompt, _ in fitted)
    ttft = results["ttft"]
    assert (ttft["beside"], len(ttft["idle_repetitions_s"]), len(ttft["beside_repetitions_s"])) == (2, 2, 2)
    assert [(row["callers"], row["requests"], row["prompt_tokens"]) for row in results["load"]] == [(2, 4, 16), (3, 4, 12), (None, 4, 12)]
    assert results["load"][2]["rate_per_s"] == pytest.approx(0.7 * 4 / results["load"][1]["total_s"])
    assert all(row["ttft_p50_ms"] > 0 and row["itl_p99_ms"] >= row["itl_p50_ms"] > 0 for row in results["load"])


def test_preemption_by_swap_is_seen_in_the_journal(tiny_config: Path) -> None:
    config = ModelConfig(model=str(tiny_config), device="cpu", dummy_weights=True, num_threads=1, gpu_blocks=24, preemption="swap")
    requests, _ = fit(mixed256(500)[:4], max_request_tokens=256)
    run = measure_policy(plan_model(config), requests, logs=None, start_timeout_s=60, repetitions=2)
    assert (run["gpu_blocks"], run["swap_blocks"], len(run["total_s"])) == (24, 24, 2)
    assert run["preemptions"] > 0
    assert run["swapped_tokens"] > 0
    assert run["recomputed_tokens"] == 0
    assert run["spared_requests"] + run["preemptions"] >= 8


def test_a_load_is_sent_as_it_once_arrived(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrivals = tiny_config.parent / "arrivals.json"
    loads = [{"prompt_tokens": 12, "tokens": 4, "arrivals_s": [0.6, 0.0, 0.3]}, {"prompt_tokens": 8, "tokens": 6, "arrivals_s": [0.0]}]
    arrivals.write_text(json.dumps(loads))
    rows = bench(tiny_config, "--workload", "load", "--arrivals", str(arrivals), capsys=capsys)["workloads"]["load"]
    assert [(row["requests"], row["prompt_tokens"], row["tokens"], row["callers"]) for row in rows] == [(3, 12, 4, None), (1, 8, 6, None)]
    assert rows[0]["total_s"] > 0.6 > rows[0]["ttft_p50_ms"] / 1e3  # each counts from its arrival


@pytest.mark.slow
def test_swap_is_held_against_recompute_and_a_large_pool(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(tiny_config, "--workload", "swap", "--gpu-blocks", "24", "--requests", "6", capsys=capsys)
    swap = report["workloads"]["swap"]
    runs = swap["runs"]
    assert list(runs) == ["swap", "recompute", "auto", "large pool, as few at once"]
    assert all(runs[policy]["preemptions"] > 0 and runs[policy]["gpu_blocks"] == 24 for policy in ("swap", "recompute", "auto"))
    assert runs["swap"]["swapped_tokens"] > 0
    assert runs["recompute"]["swapped_tokens"] == 0
    assert runs["recompute"]["recomputed_tokens"] > 0
    assert runs["recompute"]["stolen_recompute_s"] > 0
    assert swap["auto_by_better"] > 0
    few = runs["large pool, as few at once"]
    assert (few["preemptions"], few["gpu_blocks"]) == (0, swap["needed_blocks"])
    assert few["median_running"] <= max(1, round(runs["swap"]["median_running"]))
    assert swap["spared_itl_p99_by_large_pool"]["swap"] > 0


def test_a_rank_that_cannot_start_is_named_with_its_reason(tiny_config: Path) -> None:
    (tiny_config / "config.json").write_text(json.dumps({**TINY, "model_type": "no_such_family"}))
    plan = plan_model(ModelConfig(model=str(tiny_config), device="cpu", dummy_weights=True))
    with pytest.raises(Unavailable, match=r"rank-0 cannot start: .*no_such_family"), Engine(plan, start_timeout_s=60):
        raise AssertionError("it cannot be entered")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch", "3"), "--batch and --context name one decode case together"),
        (("--model-config", "no-such-shape"), "no-such-shape is not a folder"),
        (("--workload", "gaps"), "gaps are those of a GPU's kernels, and this engine would compute on cpu"),
        (("--model-config", "llama-8b"), "llama-8b has no tokenizer.json"),
        (("--tensor-parallel-size", "3"), "query heads cannot be split over 3 ranks"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "engine", "--device", "cpu", *flags]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [("--arrivals", "/nowhere"), ("--workload", "decode,sleep"), ("--decode-cases", "3x"), ("--load-cases", "3x4"), ("--gpu-blocks", "0")],
)
def test_a_flag_that_is_no_number_or_name_is_a_usage_error(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "engine", *flags])
    assert flags[0] in capsys.readouterr().err


def test_the_workloads_are_those_that_others_were_measured_on() -> None:
    mixed = mixed256(151936)
    assert (len(mixed), sum(len(prompt) for prompt, _ in mixed), sum(count for _, count in mixed)) == (256, 144_831, 144_160)
    azure = azure_conv400(151936)
    assert (len(azure), sum(len(prompt) for prompt, _ in azure), sum(count for _, count in azure)) == (400, 371_046, 104_009)
    assert (mixed[0][0][:3], azure[-1][0][-3:]) == ((18586, 79353, 105698), (18311, 21584, 89759))
    assert len({prompt for prompt, _ in (*mixed, *azure)}) == 656


@pytest.mark.parametrize(
    ("request_lengths", "fitted"), [((100, 50), (100, 50)), ((100, 300), (100, 156)), ((900, 20), (236, 20)), ((900, 900), (128, 128))]
)
def test_requests_that_are_too_long_are_shortened(request_lengths: tuple[int, int], fitted: tuple[int, int]) -> None:
    num_prompt, count = request_lengths
    [(prompt, kept)], num_shortened = fit([((7,) * num_prompt, count)], max_request_tokens=256)
    assert (len(prompt), kept) == fitted
    assert num_shortened == (request_lengths != fitted)


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("llama-8b", 8_030_261_248), ("llama-13b", 13_015_864_320), ("llama-70b", 70_553_706_496), ("qwen3-0.6b", 596_049_920)],
)
def test_shapes_of_known_models_come_with_the_program(name: str, num_parameters: int) -> None:
    folder = read_model_folder(model_config_folder(name), needs_weights=False)
    assert (folder.num_parameters, folder.dtype) == (num_parameters, "bfloat16")
