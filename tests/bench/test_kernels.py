import pytest
import torch

from quire.bench.kernels import report_as_text
from quire.bench.torch_ops import torch_copy_blocks, torch_rms_norm, torch_rotary_store, torch_sample, torch_silu_mul, torch_store_kv
from quire.cli.main import main
from quire.kernels.copy_blocks import copy_blocks_reference
from quire.kernels.rms_norm import rms_norm_reference
from quire.kernels.rotary_store import rotary_store_reference, rotary_table
from quire.kernels.silu_mul import silu_mul_reference
from quire.kernels.store_kv import store_kv_reference


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_the_command_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels"]) == 1
    error = capsys.readouterr().err
    assert f"torch {torch.__version__} sees none here" in error
    assert len(error.strip().splitlines()) == 1


def test_a_part_that_does_not_exist_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "kernels", "--only", "small,tiny"])
    assert "'tiny' is no part; there are small, decode, prefill" in capsys.readouterr().err


def test_a_row_without_floor_or_torch_has_dashes() -> None:
    row = {"op": "prepare_inputs", "size": 32, "error": 0.0, "ok": True, "us": 3.25, "floor_us": 0.0, "torch_us": None}
    other = {"op": "paged_decode", "size": "1 x 128", "error": 1.0, "ok": False, "us": 8.0, "floor_us": 4.0, "torch_us": 16.0}
    rows = [{**row, "share_of_floor": None, "times_torch": None}, {**other, "share_of_floor": 0.5, "times_torch": 2.0}]
    ceilings = {"read_bytes_per_s": 4.36e12, "bf16_operations_per_s": 7.92e14}
    lines = report_as_text({"device_name": "NVIDIA H200", "date": "2026-11-25", "ceilings": ceilings, "kernels": rows}).splitlines()
    assert lines[0] == "NVIDIA H200, 2026-11-25: reads 4.36 TB/s, 792 TFLOP/s in bf16"
    assert lines[3].split() == ["prepare_inputs", "32", "3.2", "-", "-", "-", "-", "right"]
    assert lines[4].split() == ["paged_decode", "1", "x", "128", "8.0", "4.0", "50%", "16.0", "2.0", "WRONG"]


class TestTorchComputesTheSame:
    def test_rms_norm(self) -> None:
        hidden, residual, weight = torch.randn(7, 32), torch.randn(7, 32), torch.randn(32)
        ours, theirs = residual.clone(), residual.clone()
        expected = rms_norm_reference(hidden, weight, eps=1e-5, residual=ours)
        torch.testing.assert_close(torch_rms_norm(hidden, weight, eps=1e-5, residual=theirs), expected)
        torch.testing.assert_close(theirs, ours)

    def test_silu_mul(self) -> None:
        gate_up = torch.randn(7, 64)
        torch.testing.assert_close(torch_silu_mul(gate_up), silu_mul_reference(gate_up))

    @pytest.mark.parametrize("with_norm", [False, True])
    def test_rotary_store(self, with_norm: bool) -> None:
        query, key, value = torch.randn(9, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
        norms = {"query_norm": torch.randn(16), "key_norm": torch.randn(16)} if with_norm else {}
        positions, slots = torch.randint(0, 50, (9,)), torch.randperm(4 * 8)[:9]
        table = rotary_table(1e4 ** -(torch.arange(8) / 8), max_positions=50)
        pools = torch.zeros(2, 4, 3, 2, 2, 8, 16)  # a layer's view is strided
        output = torch.empty_like(query)
        rotary_store_reference(
            query, key, value, pools[0, :, 1], slots, positions, table, output=output,
            query_norm=norms.get("query_norm"), key_norm=norms.get("key_norm"),
        )  # fmt: skip
        actual = torch_rotary_store(
            query, key, value, pools[1, :, 1], slots, positions, table,
            query_norm=norms.get("query_norm"), key_norm=norms.get("key_norm"),
        )  # fmt: skip
        torch.testing.assert_close(actual, output)
        torch.testing.assert_close(pools[1], pools[0])

    def test_store_kv_and_copy_blocks(self) -> None:
        key, value = torch.randn(2, 9, 2, 16)
        slots = torch.randperm(6 * 8)[:9]
        pools = torch.zeros(2, 6, 2, 2, 8, 16)
        store_kv_reference(key, value, pools[0], slots)
        torch_store_kv(key, value, pools[1], slots)
        assert torch.equal(pools[1], pools[0])
        sources, targets = torch.tensor([0, 1]), torch.tensor([4, 5])
        copy_blocks_reference(pools[0], sources, targets)
        torch_copy_blocks(pools[1], sources, targets)
        assert torch.equal(pools[1], pools[0])

    @pytest.mark.parametrize(
        ("options", "possible"),
        [({"temperature": 0.0}, {4}), ({"top_k": 2}, {3, 4}), ({"top_p": 0.6}, {4}), ({"min_p": 0.2}, {3, 4}), ({}, {0, 1, 2, 3, 4})],
    )
    def test_sample(self, options: dict[str, float], possible: set[int]) -> None:
        # Probabilities e^0 .. e^4, normed: 0.012, 0.032, 0.086, 0.234, 0.636.
        torch.manual_seed(0)
        drawn = set(torch_sample(torch.arange(5.0).repeat(2000, 1), options).tolist())
        assert drawn == possible
