import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels.philox import philox, philox_reference, words_of

# Known answers of Philox4x32-10, as published with Random123: (counter, key, words).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers_come_out_bit_by_bit(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    c0, c1, c2, c3, k0, k1 = (torch.tensor(word) for word in counter + key)
    tensors = philox((c0, c1, c2, c3), (k0, k1))
    assert tuple(int(word) for word in tensors) == words
    assert philox_reference(counter, key) == words


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 6), min_size=1, max_size=9))
def test_tensors_and_whole_numbers_agree(rows: list[tuple[int, int, int, int, int, int]]) -> None:
    c0, c1, c2, c3, k0, k1 = (torch.tensor(column) for column in zip(*rows, strict=True))
    words = torch.stack(philox((c0, c1, c2, c3), (k0, k1)), dim=1).tolist()
    assert words == [list(philox_reference(row[:4], row[4:])) for row in rows]


def test_a_seed_splits_into_its_two_words_whatever_its_sign_bit() -> None:
    for seed in (0, 1, 2**32 + 5, 2**63, 2**64 - 1):
        signed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
        assert [int(word) for word in words_of(signed)] == [seed & 0xFFFFFFFF, seed >> 32]
