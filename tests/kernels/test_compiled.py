"""What the machine code for sm_90 must be like, read without a GPU.

Registers decide how many programs a multiprocessor holds, spills go through memory, HMMA and HGMMA are the tensor cores, and
LDGSTS and UTMALDG are the copies that run ahead of the computation.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compiled_kernels import CompiledKernel, compiling_for_sm90

from quire.kernels.all_reduce import MAX_PROGRAMS, Peers, all_gather, all_reduce, sum_norm
from quire.kernels.attention_tiles import prefill_tile
from quire.kernels.copy_blocks import copy_blocks
from quire.kernels.decode_plan import allocate_decode_plan, plan_decode
from quire.kernels.linear_tiles import LinearTile, few_rows_tile, head_tile, row_tile
from quire.kernels.mapped_copy import mapped_copy
from quire.kernels.paged_decode import paged_decode
from quire.kernels.paged_prefill import paged_prefill
from quire.kernels.prepare_inputs import allocate_step_tokens, append_tokens, prepare_inputs
from quire.kernels.rms_norm import rms_norm
from quire.kernels.rotary_store import rotary_store
from quire.kernels.sample import SamplingInputs, sample
from quire.kernels.silu_mul import silu_mul
from quire.kernels.skinny_linear import skinny_linear
from quire.kernels.store_kv import store_kv
from quire.kernels.vocab_shards import VocabShards
from quire.kernels.write_runs import write_runs

pytestmark = pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="interpreted kernels are not compiled")

CPU = torch.device("cpu")
HEADS = {
    "llama-8b": (32, 8, 128),
    "qwen3-0.6b": (16, 8, 128),
    "llama-13b": (40, 40, 128),
    "multi-query": (32, 1, 128),
    "64": (32, 8, 64),
    "80": (32, 32, 80),
    "96": (32, 8, 96),
    "256": (8, 4, 256),
}


def zeros(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(sizes, dtype=dtype)


def integers(*sizes: int) -> torch.Tensor:
    return torch.zeros(sizes, dtype=torch.int64)


def compiled(launch: Callable[[], object]) -> list[CompiledKernel]:
    with compiling_for_sm90() as kernels:
        launch()
    return kernels


@pytest.mark.parametrize(
    ("heads", "dtype"), [*((heads, torch.bfloat16) for heads in HEADS.values()), (HEADS["llama-8b"], torch.float16)], ids=str
)
def test_decode_runs_ahead_on_tensor_cores_without_spills(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_dim = heads
    layer = zeros(4, 2, 2, num_kv_heads, 16, head_dim, dtype=dtype)[:, 1]
    lengths, tables = integers(4), zeros(4, 64, dtype=torch.int32)
    plan = allocate_decode_plan(num_rows=4, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, device=CPU)
    query = zeros(4, num_heads, head_dim, dtype=dtype)
    decode, combine = compiled(lambda: paged_decode(query, layer, tables, plan, lengths=lengths, rows=lengths, scale=0.1))
    assert decode.stack_bytes == combine.stack_bytes == 0
    assert decode.num_registers <= 255
    assert combine.num_registers <= 128
    assert decode.count("HMMA", "HGMMA") > 0
    assert decode.count("LDGSTS") >= decode.count("LDG") // 2, "keys and values go to shared memory, block ids to registers"
    assert decode.shared_bytes <= 100_000, "two programs a multiprocessor at least"


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_prefill_uses_warpgroup_products(heads: tuple[int, int, int], block_size: int) -> None:
    num_heads, num_kv_heads, head_dim = heads
    layer = zeros(4, 2, 2, num_kv_heads, block_size, head_dim)[:, 1]
    tile = prefill_tile(head_dim=head_dim, num_bytes=2, block_size=block_size)
    pieces, tables = zeros(2, 4, dtype=torch.int32), zeros(4, 64, dtype=torch.int32)
    query = zeros(64, num_heads, head_dim)
    (prefill,) = compiled(lambda: paged_prefill(query, layer, tables, pieces, scale=0.1, tile=tile))
    assert prefill.count("HGMMA") > 0
    assert prefill.count("HMMA") == 0
    assert prefill.count("LDGSTS", "UTMALDG") > 0
    assert prefill.shared_bytes <= 227 * 1024
    # At head_dim 256 the numerators alone take half of all registers; a few others may be spilled outside the loop.
    assert prefill.stack_bytes <= (96 if head_dim == 256 else 0)


@pytest.mark.parametrize("num_rows", [1, 8, 32, 64])
def test_logits_of_few_rows_spill_nothing(num_rows: int) -> None:
    tile = head_tile(num_rows=num_rows, num_inputs=4096)
    assert tile is not None
    (kernel,) = compiled(lambda: skinny_linear(zeros(num_rows, 4096), zeros(128256, 4096), tile=tile))
    assert kernel.stack_bytes == 0
    assert kernel.num_registers <= 255
    assert (kernel.count("HMMA", "HGMMA") > 0) == (num_rows > 1)
    assert "ld.global.v4.b32" in kernel.ptx or kernel.count("LDGSTS") > 0, "16 bytes a load"


@pytest.mark.parametrize("num_rows", [16, 32, 64, 128])
def test_weights_as_the_left_factor_go_to_warpgroup_products_as_they_come(num_rows: int) -> None:
    tile = LinearTile(64, 128, 4, 4, has_weights_left=True)
    (kernel,) = compiled(lambda: skinny_linear(zeros(num_rows, 4096), zeros(8192, 4096), tile=tile))
    assert kernel.stack_bytes == 0
    assert kernel.count("HGMMA") > 0
    assert kernel.count("HMMA", "LDSM") == 0, "nothing goes through registers"
    assert kernel.count("LDGSTS", "UTMALDG") > 0


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "num_inputs"),
    [*((num_rows, *shape) for num_rows in (16, 32) for shape in ((5120, 8192), (8192, 4096), (8192, 14336))), (64, 8192, 14336)],
)
def test_few_rows_with_weights_left_fit_a_multiprocessor(num_rows: int, num_columns: int, num_inputs: int) -> None:
    tile = few_rows_tile(num_rows=num_rows, num_columns=num_columns, num_inputs=num_inputs)
    assert tile is not None
    weight = zeros(num_columns, num_inputs)
    (kernel,) = compiled(lambda: skinny_linear(zeros(num_rows, num_inputs), weight, tile=tile))
    assert kernel.stack_bytes == 0
    # 70 at most by both Tritons; a multiprocessor's shared memory holds one program of 128 threads, so that registers are no limit.
    assert kernel.num_registers <= 96
    assert kernel.count("HGMMA") > 0
    assert kernel.count("HMMA", "LDSM") == 0, "nothing goes through registers"
    assert kernel.count("LDGSTS", "UTMALDG") > 0
    assert kernel.shared_bytes <= 227 * 1024


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_inputs", [1024, 2048, 3072, 4096, 14336])
def test_products_of_a_row_spill_nothing_with_all_that_they_take_in(num_inputs: int, dtype: torch.dtype) -> None:
    row, norm = zeros(1, num_inputs, dtype=dtype), zeros(num_inputs, dtype=dtype)
    for has_norm in (True, False):
        options: dict[str, Any] = {"norm": norm, "eps": 1e-5} if has_norm else {"residual": zeros(1, 4096, dtype=dtype)}
        for is_gated in (False, True)[: 1 + has_norm]:
            tile = row_tile(num_inputs=num_inputs, is_gated=is_gated)
            assert tile is not None
            weight = zeros(8192 if is_gated else 4096, num_inputs, dtype=dtype)
            for kernel in compiled(partial(skinny_linear, row, weight, tile=tile, is_gated=is_gated, **options)):
                assert kernel.stack_bytes == 0
                assert "ld.global.v4.b32" in kernel.ptx, "16 bytes a load"


@pytest.mark.parametrize("width", [1024, 4096, 5120, 8192])
@pytest.mark.parametrize("size", [2, 4])
def test_sums_over_ranks_load_wide_and_wait_in_order(width: int, size: int) -> None:
    addresses = integers(size)
    peers = Peers(0, size, addresses, addresses, zeros(MAX_PROGRAMS, dtype=torch.int32))
    rows = zeros(64, width)

    def launch() -> None:
        sum_norm(peers, zeros(width), area=0, residual=rows, eps=1e-5, output=rows)
        all_reduce(peers, rows, area=0, slot_bytes=rows.nbytes)
        all_gather(peers, rows, zeros(size, 64, width), area=0, slot_bytes=rows.nbytes)

    for kernel in compiled(launch):
        assert kernel.stack_bytes == 0
        # Of others' memory; Triton 3.6 leaves ".cv" out.
        assert kernel.ptx.count("ld.global.cv.v4.b32") + kernel.ptx.count("ld.global.v4.b32") >= size, "16 bytes a load"
        assert kernel.ptx.count("atom.global.sys.release") == size - 1
        assert "sys.acquire" in kernel.ptx


@pytest.mark.parametrize("size", [2, 4])
def test_sums_in_two_shots_meet_twice(size: int) -> None:
    addresses, rows = integers(size), zeros(64, 4096)
    peers = Peers(0, size, addresses, addresses, zeros(MAX_PROGRAMS, dtype=torch.int32))
    for kernel in compiled(partial(all_reduce, peers, rows, area=0, slot_bytes=rows.nbytes, in_two_shots=True)):
        assert kernel.stack_bytes == 0
        # A thread has 8 numbers of its share of two ranks, 4 of four.
        wide = "v4.b32" if size == 2 else "v2.b32"
        assert kernel.ptx.count(f"ld.global.cv.{wide}") + kernel.ptx.count(f"ld.global.{wide}") >= 2 * size
        assert kernel.ptx.count("atom.global.sys.release") == 2 * (size - 1)
        assert "sys.acquire" in kernel.ptx


def small_launches() -> dict[str, Callable[[], object]]:
    qkv = zeros(4, 48, 128)
    query, key, value = qkv.split([32, 8, 8], dim=1)
    many = zeros(600, 48, 128).split([32, 8, 8], dim=1)
    layer = zeros(4, 2, 2, 8, 16, 128)[:, 1]
    norms: dict[str, Any] = {"query_norm": zeros(128), "key_norm": zeros(128)}
    step = allocate_step_tokens(256, CPU)
    plan = allocate_decode_plan(num_rows=256, num_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, device=CPU)
    doubles, rows = zeros(4, dtype=torch.float64), integers(4)
    inputs = SamplingInputs(rows, doubles, rows, doubles, doubles, doubles, rows, rows, rows)
    table = zeros(64, 128, dtype=torch.float32)
    spans = zeros(4, 4, dtype=torch.int32)
    return {
        "rotary_store": lambda: rotary_store(query, key, value, layer, integers(4), integers(4), table),
        "rotary_store with norms": lambda: rotary_store(query, key, value, layer, integers(4), integers(4), table, **norms),
        "rotary_store of many": lambda: rotary_store(
            many[0], many[1], many[2], layer, integers(600), integers(600), table, output=many[0], key_output=many[1]
        ),
        "store_kv": lambda: store_kv(key, value, layer, integers(4)),
        "rms_norm": lambda: rms_norm(zeros(4, 4096), zeros(4096), eps=1e-5, residual=zeros(4, 4096)),
        "rms_norm of 5120": lambda: rms_norm(zeros(4, 5120), zeros(5120), eps=1e-5, residual=zeros(4, 5120)),
        "silu_mul": lambda: silu_mul(zeros(4, 2 * 14336)),
        "mapped_copy": lambda: mapped_copy(integers(4, 256), integers(4, 256)),
        "copy_blocks": lambda: copy_blocks(zeros(4, 32, 2, 8, 16, 128), integers(3), integers(3)),
        "prepare_inputs": lambda: prepare_inputs(step, integers(4, 4096), integers(4), integers(4, 256), spans, block_size=16, max_count=1),
        "append_tokens": lambda: append_tokens(integers(4, 4096), integers(4), integers(4), integers(4)),
        "plan_decode": lambda: plan_decode(plan, integers(256), integers(256)),
        "sample": lambda: sample(zeros(4, 128256, dtype=torch.float32), inputs, purpose=0, broken=zeros(4, dtype=torch.bool)),
        "sample from bfloat16": lambda: sample(zeros(4, 151936), inputs, purpose=0),
        "write_runs": lambda: write_runs(integers(4096), integers(8, 3), integers(64), max_count=64),
    }


@pytest.mark.parametrize("name", small_launches())
def test_small_operations_spill_nothing_and_load_wide(name: str) -> None:
    for kernel in compiled(small_launches()[name]):
        assert kernel.stack_bytes == 0, kernel.name
        if name in ("rms_norm", "silu_mul", "copy_blocks", "rotary_store of many"):
            assert "ld.global.v4.b32" in kernel.ptx, "16 bytes a load"


@pytest.mark.parametrize("heads", [(16, 8, 128), (64, 8, 128), (32, 1, 128), (64, 1, 256)], ids=str)
def test_rotary_positions_of_many_tokens_stay_in_registers(heads: tuple[int, int, int]) -> None:
    num_heads, num_kv_heads, head_dim = heads
    query, key, value = zeros(600, num_heads + 2 * num_kv_heads, head_dim).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    layer = zeros(4, 2, 2, num_kv_heads, 16, head_dim)[:, 1]
    norms: dict[str, Any] = {"query_norm": zeros(head_dim), "key_norm": zeros(head_dim)}
    table, places = zeros(64, head_dim, dtype=torch.float32), integers(600)
    (kernel,) = compiled(lambda: rotary_store(query, key, value, layer, places, places, table, output=query, key_output=key, **norms))
    assert kernel.stack_bytes == 0
    assert kernel.num_registers <= 128


@pytest.mark.parametrize(("size", "vocab_size"), [(2, 128256), (2, 151936), (4, 128256), (8, 262144)])
def test_draws_of_a_group_spill_nothing_and_wait_in_order(size: int, vocab_size: int) -> None:
    addresses = integers(size)
    peers = Peers(size - 1, size, addresses, addresses, zeros(MAX_PROGRAMS, dtype=torch.int32))
    num_bytes = VocabShards.num_bytes(vocab_size=vocab_size, num_ranks=size, max_rows=4, dtype=torch.bfloat16)
    shards = VocabShards(peers, zeros(num_bytes, dtype=torch.uint8), vocab_size=vocab_size, max_rows=4, dtype=torch.bfloat16)
    doubles, rows = zeros(4, dtype=torch.float64), integers(4)
    inputs = SamplingInputs(rows, doubles, rows, doubles, doubles, doubles, rows, rows, rows)
    kernels = compiled(lambda: sample(shards.logits, inputs, purpose=0, broken=zeros(4, dtype=torch.bool), shards=shards))
    assert len(kernels) == 3
    assert all(kernel.stack_bytes == 0 for kernel in kernels)
    assert kernels[1].ptx.count("atom.global.sys.release") == size - 1
    assert "sys.acquire" in kernels[1].ptx
