"""Paged attention on the GPU: right first, then timed over tiles, block sizes and the pool's two layouts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quire.bench.attention_cases import (
    DecodeCase,
    Pool,
    PrefillCase,
    cudnn_seconds,
    decode_batches,
    make_pool,
    pieces_of,
    prefill_batches,
)
from quire.bench.gpu_timing import relative_error, seconds_per_launch
from quire.kernels.attention_tiles import DecodeTile, PrefillTile, prefill_tile
from quire.kernels.decode_plan import allocate_decode_plan, plan_decode_reference
from quire.kernels.paged_decode import attention_reference, paged_decode_reference
from quire.kernels.paged_prefill import PrefillChunk, paged_prefill

NUM_LAYERS = 32
# Pieces per multiprocessor, fewest tokens of a piece.
_DECODE_CUTS = ((4, 128), (4, 256), (8, 128))
NUM_DECODE_CUTS = len(_DECODE_CUTS)
DECODE_TILES = [
    DecodeTile(num_keys, num_warps, num_stages, pieces, least)
    for num_keys, num_warps, num_stages in (
        (32, 2, 2),
        (32, 2, 3),
        (64, 4, 2),
        (64, 4, 3),
        (64, 4, 4),
        (64, 8, 3),
        (128, 8, 2),
        (128, 8, 3),
    )
    for pieces, least in _DECODE_CUTS
]
LAYOUT_TILES = [DecodeTile(64, 4, 2, 4, 128), DecodeTile(64, 4, 3, 4, 128)]
PREFILL_TILES = [
    PrefillTile(*numbers)
    for numbers in ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3), (128, 32, 4, 3), (128, 64, 8, 3, True))
]
OTHER_HEADS = {
    "qwen3-0.6b": (16, 8, 128),
    "llama-13b (MHA)": (40, 40, 128),
    "llama-8b, rank of 2": (16, 4, 128),
    "llama-8b, rank of 8": (4, 1, 128),
    "MQA 32/1": (32, 1, 128),
    "d64 32/8": (32, 8, 64),
    "d80 32/32": (32, 32, 80),
    "d96 32/8": (32, 8, 96),
    "d256 8/4": (8, 4, 256),
}
OTHER_DECODE_TILES = [DecodeTile(*numbers, 4, 128) for numbers in ((32, 2, 2), (64, 4, 2), (64, 4, 3))]
OTHER_PREFILL_HEADS = ("qwen3-0.6b", "d64 32/8", "d80 32/32", "d96 32/8", "d256 8/4")
OTHER_PREFILL_TILES = [
    PrefillTile(*numbers) for numbers in ((128, 64, 8, 3), (128, 64, 8, 3, True), (128, 64, 8, 2), (128, 64, 8, 2, True))
]


@dataclass(frozen=True)
class Check:
    """One comparison with the float32 reference."""

    kind: str  # decode, prefill
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False


def attention_checks() -> list[Check]:
    shapes: list[dict[str, Any]] = [
        {"heads": (32, 8, 128, 16)},
        {"heads": (16, 8, 128, 16)},
        {"heads": (12, 12, 64, 16)},
        {"heads": (8, 1, 128, 32)},
        {"heads": (71, 1, 64, 16)},
        {"heads": (8, 8, 80, 16)},
        {"heads": (14, 2, 96, 16)},
        {"heads": (32, 8, 128, 64)},
        {"heads": (32, 8, 128, 128)},
        {"heads": (8, 4, 256, 16), "softcap": 30.0},
        {"heads": (32, 8, 128, 64), "window": 128},
        {"heads": (64, 8, 64, 16), "window": 200, "has_sinks": True},
    ]
    checks = []
    for kind in ("decode", "prefill"):
        for dtype in ("bfloat16", "float16", "float32"):
            for shape in shapes[::4] if dtype == "float32" else shapes:
                options = dict(shape)
                heads = options.pop("heads")
                checks.append(Check(kind, dtype, *heads, **options))
    return checks


def run_attention_check(check: Check) -> dict[str, Any]:
    """bf16 or fp16 against float32: outputs poisoned, unused slots NaN."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    dtype = getattr(torch, check.dtype)
    options: dict[str, Any] = {"softcap": check.softcap, "sinks": torch.randn(check.num_heads, device="cuda") if check.has_sinks else None}
    run = _check_decode if check.kind == "decode" else _check_prefill
    lengths = [4096, 1, 17, 129, 300, 1000, 511, 2]
    error = run(dtype, check.num_heads, check.num_kv_heads, check.head_dim, check.block_size, check.window, options, lengths)
    bound = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    return {**asdict(check), "relative_error": error, "ok": error < bound}


def warm_up(tile: DecodeTile | PrefillTile, block_size: int, heads: tuple[int, int, int] = (32, 8, 128)) -> None:
    """Compile a tile's kernel into the disk's cache; what fails here shows again when it is timed."""
    num_heads, num_kv_heads, head_dim = heads
    pool = make_pool(2**28)
    layers = pool.layers(num_layers=4, num_kv_heads=num_kv_heads, block_size=block_size, head_dim=head_dim)
    try:
        if isinstance(tile, DecodeTile):
            DecodeCase(layers, [1024], num_heads=num_heads, tile=tile).launch(layers[1])
        else:
            PrefillCase(layers, [PrefillChunk(0, 0, 256)], num_heads=num_heads).launch(tile, layers[1])
        torch.cuda.synchronize()
    except Exception as error:
        print("warm-up", tile, block_size, heads, type(error).__name__, str(error)[:200], flush=True)


def _check_decode(
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    options: dict[str, Any],
    lengths: list[int],
) -> float:
    layers = _poisoned(dtype, num_kv_heads, head_dim, block_size, num_blocks=sum(-(-n // block_size) for n in lengths))
    case = DecodeCase(layers, lengths, num_heads=num_heads, window=window)
    _poison_tails(case.layers[1], case.block_tables, lengths, block_size)
    expected_plan = allocate_decode_plan(
        num_rows=len(lengths), num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, device=case.query.device,
        dtype=dtype, sliding_window=window,
    )  # fmt: skip
    plan_decode_reference(expected_plan, case.lengths, case.rows)
    count = int(expected_plan.first_pieces[-1])
    assert torch.equal(expected_plan.pieces[:count], case.plan.pieces[:count])
    expected = paged_decode_reference(
        case.query.float(), case.layers[1].float(), case.block_tables, lengths=case.lengths, rows=case.rows, scale=case.scale,
        sliding_window=window, **options,
    )  # fmt: skip
    worst = 0.0
    for _ in range(5):  # a race would show as an error that comes and goes
        case.output.fill_(float("nan"))
        worst = max(worst, relative_error(case.launch(case.layers[1], **options), expected))
    return worst


def _check_prefill(
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    options: dict[str, Any],
    lengths: list[int],
) -> float:
    layers = _poisoned(dtype, num_kv_heads, head_dim, block_size, num_blocks=sum(-(-n // block_size) for n in lengths))
    case = DecodeCase(layers, lengths, num_heads=num_heads)
    _poison_tails(case.layers[1], case.block_tables, lengths, block_size)
    chunks = [PrefillChunk(row, max(0, length - 700), min(length, 700)) for row, length in enumerate(lengths)]
    query = torch.randn(sum(chunk.num_tokens for chunk in chunks), num_heads, head_dim, device="cuda").to(dtype)
    tile = prefill_tile(head_dim=head_dim, num_bytes=query.element_size(), block_size=block_size)
    pieces = pieces_of(chunks, tile, num_heads // num_kv_heads)
    output = torch.full_like(query, float("nan"))
    tables = case.block_tables
    paged_prefill(query, layers[1], tables, pieces, scale=case.scale, sliding_window=window, output=output, tile=tile, **options)
    wide = layers[1].float()
    expected = [
        attention_reference(
            part.float(), wide, tables[chunk.row], first_position=chunk.start, scale=case.scale, sliding_window=window, **options
        )
        for chunk, part in zip(chunks, query.split([chunk.num_tokens for chunk in chunks]), strict=True)
    ]
    return relative_error(output, torch.cat(expected))


def _poisoned(dtype: torch.dtype, num_kv_heads: int, head_dim: int, block_size: int, *, num_blocks: int) -> list[Tensor]:
    pool = torch.randn(num_blocks + 1, 3, 2, num_kv_heads, block_size, head_dim, device="cuda").to(dtype)
    return list(pool.unbind(1))


def _poison_tails(layer: Tensor, block_tables: Tensor, lengths: Sequence[int], block_size: int) -> None:
    for row, length in enumerate(lengths):
        if length % block_size:
            layer[block_tables[row, length // block_size], :, :, length % block_size :] = float("nan")


def time_decode_tiles(pool: Pool, read_bytes_per_s: float) -> list[dict[str, Any]]:
    """Every tile over every batch, of an 8B Llama's heads."""
    rows = []
    layers = pool.layers(num_layers=NUM_LAYERS, num_kv_heads=8, block_size=16, head_dim=128)
    for name, lengths in decode_batches().items():
        case = DecodeCase(layers, lengths, num_heads=32)
        for tile in DECODE_TILES:
            case.cut(tile)
            seconds = case.seconds()
            rows.append({"batch": name, **asdict(tile), "us": seconds * 1e6, "share_of_read": case.num_bytes / seconds / read_bytes_per_s})
        best = min(rows[-len(DECODE_TILES) :], key=lambda row: row["us"])
        print(f"decode {name:24s} best {best['us']:8.1f} us {best['share_of_read']:.3f} {list(best.values())[1:6]}", flush=True)
        plan_s = seconds_per_launch([case.make_plan] * 8)
        rows.append({"batch": name, "plan_us": plan_s * 1e6})
    return rows


def time_decode_heads(pool: Pool, read_bytes_per_s: float) -> list[dict[str, Any]]:
    """Some tiles over other models' heads."""
    rows = []
    for name, (num_heads, num_kv_heads, head_dim) in OTHER_HEADS.items():
        layers = pool.layers(num_layers=8, num_kv_heads=num_kv_heads, block_size=16, head_dim=head_dim)
        num_rows = max(1, round(2**29 / (1024 * 4 * num_kv_heads * head_dim)))
        case = DecodeCase(layers, [1024] * num_rows, num_heads=num_heads)
        for tile in OTHER_DECODE_TILES:
            case.cut(tile)
            seconds = case.seconds()
            share = case.num_bytes / seconds / read_bytes_per_s
            rows.append({"heads": name, "rows": num_rows, **asdict(tile), "us": seconds * 1e6, "share_of_read": share})
        print(
            f"decode heads {name:20s} {num_rows} x 1024 " + " ".join(f"{r['share_of_read']:.3f}" for r in rows[-len(OTHER_DECODE_TILES) :]),
            flush=True,
        )
    return rows


def time_layouts(pool: Pool, read_bytes_per_s: float, tiles: Sequence[DecodeTile]) -> list[dict[str, Any]]:
    """Block-major against layer-major, and block sizes, over random blocks of the whole pool."""
    rows = []
    for name in ("32 x 1024 (128 MiB)", "128 x 1024 (512 MiB)", "256 x 1024 (1 GiB)", "65536 and 63 x 512"):
        for block_size in (16, 32, 64):
            for block_major in (True, False, True, False):  # twice: the difference between equal runs is the noise
                layers = pool.layers(num_layers=NUM_LAYERS, num_kv_heads=8, block_size=block_size, head_dim=128, block_major=block_major)
                case = DecodeCase(layers, decode_batches()[name], num_heads=32)
                for tile in tiles:
                    case.cut(tile)
                    seconds = case.seconds()
                    share = case.num_bytes / seconds / read_bytes_per_s
                    layout = "block-major" if block_major else "layer-major"
                    rows.append(
                        {
                            "batch": name,
                            "block_size": block_size,
                            "layout": layout,
                            **asdict(tile),
                            "us": seconds * 1e6,
                            "share_of_read": share,
                        }
                    )
                print(
                    f"layout {name:24s} bs{block_size} {rows[-1]['layout']} " + " ".join(f"{row['us']:.1f}" for row in rows[-len(tiles) :]),
                    flush=True,
                )
    return rows


def time_prefill(pool: Pool) -> list[dict[str, Any]]:
    """Tiles over chunks with and without context, of an 8B Llama's heads; torch's cuDNN attention beside."""
    rows: list[dict[str, Any]] = []
    for name, chunks in prefill_batches().items():
        for block_size in (16, 64):
            layers = pool.layers(num_layers=NUM_LAYERS, num_kv_heads=8, block_size=block_size, head_dim=128)
            case = PrefillCase(layers, chunks, num_heads=32)
            timed = [case.row(tile) for tile in _fitting(PREFILL_TILES, block_size)]
            rows += [{"chunks": name, "block_size": block_size, **row} for row in timed]
            print(f"prefill {name} bs{block_size} {_short(timed)}", flush=True)
        if all(chunk.start == 0 for chunk in chunks):
            seconds = cudnn_seconds(len(chunks), chunks[0].num_tokens)
            rows.append({"chunks": name, "torch_cudnn_us": seconds * 1e6, "tflops": case.num_operations / seconds / 1e12})
            print(f"prefill {name} cuDNN {case.num_operations / seconds / 1e12:.0f}", flush=True)
    return rows


def time_prefill_heads(pool: Pool) -> list[dict[str, Any]]:
    """Tiles over other models' heads, one prompt of 8192."""
    rows: list[dict[str, Any]] = []
    for name in OTHER_PREFILL_HEADS:
        num_heads, num_kv_heads, head_dim = OTHER_HEADS[name]
        for block_size in (16, 64):
            layers = pool.layers(num_layers=4, num_kv_heads=num_kv_heads, block_size=block_size, head_dim=head_dim)
            case = PrefillCase(layers, [PrefillChunk(0, 0, 8192)], num_heads=num_heads)
            timed = [case.row(tile) for tile in _fitting(OTHER_PREFILL_TILES, block_size)]
            rows += [{"heads": name, "block_size": block_size, **row} for row in timed]
            print(f"prefill heads {name} bs{block_size} {_short(timed)}", flush=True)
    return rows


def _fitting(tiles: Sequence[PrefillTile], block_size: int) -> list[PrefillTile]:
    """Without those whose copy engine would not be used."""
    return [tile for tile in tiles if not tile.uses_copy_engine or block_size % tile.num_keys == 0]


def _short(rows: Sequence[dict[str, Any]]) -> str:
    return " ".join(
        f"{row['num_rows']},{row['num_keys']},{row['num_warps']},{row['num_stages']}{',copy' if row['uses_copy_engine'] else ''}:"
        f"{row.get('tflops', float('nan')):.0f}"
        for row in rows
    )
