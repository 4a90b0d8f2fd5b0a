"""Tile sizes of the attention kernels: a committed table, so that nothing is tuned while serving.

Chosen from what tools/gpu/kernels.py measured on an NVIDIA H100 80GB HBM3 and an NVIDIA H200, Triton 3.6, 2026-11-25, bf16:
decode by the geometric mean over eight batches, from one row of 128 tokens to 256 of 1024 and one of 65536 among 63 short
ones; prefill by prompts of 8192, 2048 and 8 x 1024 tokens and chunks behind a context. docs/kernel_notes.md has the numbers.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """How one program of the decode kernel reads the keys of one head."""

    num_keys: int  # keys and values of one turn of the loop
    num_warps: int
    num_stages: int  # turns whose loads are in flight, the one that computes included
    pieces_per_multiprocessor: int  # into how many pieces a batch is cut, for each multiprocessor
    min_piece_tokens: int  # a multiple of 64; less is not worth its partial result


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """How one program of the prefill kernel covers queries and keys."""

    num_rows: int  # queries times the heads that share their keys
    num_keys: int
    num_warps: int
    num_stages: int
    # Whether the copy engine reads keys and values, where blocks hold whole tiles: fewer instructions, but a second loop for
    # the tiles that need a mask.
    uses_copy_engine: bool = False


def decode_tile(*, head_dim: int, num_bytes: int) -> DecodeTile:
    """The tile for heads of `head_dim` numbers of `num_bytes` each."""
    if num_bytes == 4:  # only tests run in float32
        return DecodeTile(num_keys=16, num_warps=4, num_stages=2, pieces_per_multiprocessor=4, min_piece_tokens=128)
    if head_dim > 128:
        return DecodeTile(num_keys=32, num_warps=2, num_stages=2, pieces_per_multiprocessor=4, min_piece_tokens=128)
    return DecodeTile(num_keys=64, num_warps=4, num_stages=2, pieces_per_multiprocessor=4, min_piece_tokens=128)


def prefill_tile(*, head_dim: int, num_bytes: int, block_size: int) -> PrefillTile:
    """The tile for heads of `head_dim` numbers of `num_bytes` each, in blocks of `block_size` tokens."""
    if num_bytes == 4:
        return PrefillTile(num_rows=32, num_keys=16, num_warps=4, num_stages=2)
    has_whole_tiles = block_size % 64 == 0
    if head_dim > 128:
        return PrefillTile(num_rows=128, num_keys=64, num_warps=8, num_stages=2, uses_copy_engine=has_whole_tiles)
    return PrefillTile(num_rows=128, num_keys=64, num_warps=8, num_stages=3, uses_copy_engine=has_whole_tiles and head_dim != 128)
