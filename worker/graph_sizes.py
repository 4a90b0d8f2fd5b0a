"""Of which sizes a rank's CUDA graphs are. A step runs as the smallest graph that holds it; what is left of that is padding."""

from typing import Final

# Steps that decode alone, in tokens: each row of padding costs its share of the products.
_DECODE: Final = (1, 2, 4, *range(8, 129, 8), *range(144, 257, 16), *range(288, 1025, 32))
# Steps with chunks, in tokens, whatever the model.
_MIXED: Final = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# Above them so many sizes from one power of two to the next: a step is padded by a sixteenth on average.
_SIZES_PER_OCTAVE: Final = 8
# What the host takes to launch a layer's kernels one by one, in seconds (0.8 to 1.1 ms: cProfile of eager steps of Llama 3 8B's and
# Qwen3 0.6B's shapes beside an NVIDIA H100 80GB HBM3, 2026-11-25), and the operations per second that large products reach there.
_LAUNCH_S_PER_LAYER: Final = 1.2e-3
_OPERATIONS_PER_S: Final = 600e12
# Chunks of a step: each may add a piece of attention that is not full, and the graph launches as many as there may be.
_MIN_CHUNKS: Final = 16
_TOKENS_PER_CHUNK: Final = 128


def decode_sizes(max_rows: int) -> list[int]:
    """Of steps in which each row computes one token; ascending, the last is max_rows."""
    return [size for size in _DECODE if size < max_rows] + [max_rows]


def mixed_sizes(max_tokens: int, *, launch_bound_tokens: int) -> list[int]:
    """Of steps with chunks, ascending, none above max_tokens.

    launch_bound_tokens: above so many, launching kernel by kernel takes less time than computing: no graphs are needed there
    """
    sizes = list(_MIXED)
    while sizes[-1] < min(max_tokens, launch_bound_tokens):
        octave = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(sizes[-1] + octave // _SIZES_PER_OCTAVE)
    return [size for size in sizes if size <= max_tokens]


def max_chunks(size: int) -> int:
    """The most chunks of several tokens that a mixed graph of this size takes."""
    return max(_MIN_CHUNKS, size // _TOKENS_PER_CHUNK)


def launch_bound_tokens(*, layer_parameters: int) -> int:
    """Steps of fewer tokens take the host longer to launch kernel by kernel than the GPU to compute.

    layer_parameters: weights of one layer on one rank
    """
    return int(_LAUNCH_S_PER_LAYER * _OPERATIONS_PER_S / (2 * layer_parameters))


def warmed(sizes: list[int]) -> set[int]:
    """Those of a kind that run once before any is captured: kernels are compiled and loaded by the size's power of two and by
    whether it is a multiple of 16. The largest is among them, because it sets up what all of them share."""
    kinds: dict[tuple[int, bool], int] = {}
    for size in sorted(sizes, reverse=True):
        kinds.setdefault(((size - 1).bit_length(), size % 16 == 0), size)
    return set(kinds.values())
