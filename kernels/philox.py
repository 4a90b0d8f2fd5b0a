"""Philox4x32-10, the counter-based generator of every draw: random words as a pure function of (key, counter)."""

from typing import Final

import torch
from torch import Tensor

NUM_ROUNDS: Final = 10

# Multipliers and key increments of Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)
_WORD: Final = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for each counter under its key.

    counter, key: words in [0, 2**32), int64 tensors of shapes that broadcast together
    result:       words in [0, 2**32), int64, of the broadcast shape

    The same on every device: integers only. int64 holds the words because torch has no full set of operations on uint32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_STEPS[0]) & _WORD
        k1 = (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a 64-bit product. It may pass 2**63 and wrap; the mask after the shift takes the sign off."""
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD


def philox_reference(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One counter, in Python's whole numbers."""
    words, keys = list(counter), list(key)
    for _ in range(NUM_ROUNDS):
        products = (words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1])
        words = [
            (products[1] >> 32) ^ words[1] ^ keys[0],
            products[1] & _WORD,
            (products[0] >> 32) ^ words[3] ^ keys[1],
            products[0] & _WORD,
        ]
        keys = [(k + step) & _WORD for k, step in zip(keys, _KEY_STEPS, strict=True)]
    return words[0], words[1], words[2], words[3]


def words_of(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high word of 64-bit seeds.

    seed: int64, the bits of the unsigned seed
    """
    return seed & _WORD, torch.bitwise_right_shift(seed, 32) & _WORD
