import torch

from quire.common.messages import Chunk, RowAdd, SamplingState
from quire.worker.batch import Batch
from quire.worker.step_inputs import build_step_inputs


def batch_of(*lengths: int) -> Batch:
    """Rows 0, 1, ... of these lengths; row i's token at position p is 100 * i + p, in blocks 10 * i, 10 * i + 1, ..."""
    batch = Batch(max_rows=8, max_tokens_per_row=64, block_size=4, num_blocks=100, vocab_size=1000, device="cpu")
    for row, length in enumerate(lengths):
        block_ids = tuple(range(10 * row, 10 * row + -(-length // 4)))
        batch.add([RowAdd(row, tuple(range(100 * row, 100 * row + length)), length, 0, block_ids, 0, SamplingState())])
    return batch


def test_chunks_of_one_token_lie_behind_the_longer_ones_and_are_attended_as_decodes_are() -> None:
    batch = batch_of(9, 30, 6, 5, 12)
    chunks = [Chunk(3, 4, 1, True), Chunk(0, 2, 3, False), Chunk(1, 17, 1, False), Chunk(4, 10, 2, True)]
    inputs = build_step_inputs(batch, chunks, [2])
    assert inputs.token_ids.tolist() == [2, 3, 4, 410, 411, 304, 117, 205]
    assert inputs.positions.tolist() == [2, 3, 4, 10, 11, 4, 17, 5]
    assert inputs.slot_mapping.tolist() == [2, 3, 4, 170, 171, 124, 57, 85]
    assert list(inputs.chunk_places) == [5, 0, 6, 3]
    assert list(inputs.decode_places) == [7]
    assert [(span.num_tokens, span.start, span.block_table.tolist()) for span in inputs.ragged.chunks] == [
        (3, 2, [0, 1]),
        (2, 10, [40, 41, 42]),
    ]
    # Of 2 blocks each, and of 5: the first are not padded to the other.
    short, long = inputs.ragged.decodes
    assert (short.tokens.tolist(), short.lengths.tolist(), short.block_tables.tolist()) == ([5, 7], [5, 6], [[30, 31], [20, 21]])
    assert (long.tokens.tolist(), long.lengths.tolist(), long.block_tables.tolist()) == ([6], [18], [[10, 11, 12, 13, 14]])


def test_a_step_of_decodes_alone_reads_each_rows_last_token() -> None:
    inputs = build_step_inputs(batch_of(1, 4, 5), [], [0, 1, 2])
    assert torch.equal(inputs.token_ids, torch.tensor([0, 103, 204]))
    assert list(inputs.decode_places) == [0, 1, 2]
    assert [spans.tokens.tolist() for spans in inputs.ragged.decodes] == [[0, 1], [2]]
