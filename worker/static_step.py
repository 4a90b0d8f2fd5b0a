"""A step's inputs where CUDA graphs look for them: fixed buffers that the host fills with one copy, and only if they differ."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from quire.common.messages import Chunk
from quire.kernels.attention_tiles import PrefillTile
from quire.kernels.paged_prefill import PrefillChunk, cut_prefill
from quire.kernels.prepare_inputs import allocate_step_tokens
from quire.worker.batch import RowIds
from quire.worker.host_link import send

_SPAN = 4  # words of a span of prepare_inputs, and of a piece of paged_prefill


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Which tokens a step computes, in which order: chunks of several tokens, then one token for each row that decodes.

    A chunk that is its row's last token alone is a decode: the rows of a beam search share one launch then, and a sequence that
    is resumed with its last token computes what it would have decoded.
    """

    longer: tuple[Chunk, ...]
    decodes: RowIds
    chunk_places: tuple[int, ...]  # of each chunk of the plan: where its tokens begin
    num_chunk_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_chunk_tokens + len(self.decodes)


def lay_out(chunks: Sequence[Chunk], decoding: RowIds, lengths: npt.NDArray[np.int64]) -> StepLayout:
    """Order a step's tokens. lengths: [max_rows], tokens of each row."""
    if not chunks:
        return StepLayout((), decoding, (), 0)
    is_alone = [chunk.count == 1 and chunk.start + 1 == lengths[chunk.row] for chunk in chunks]
    longer = tuple(chunk for chunk, alone in zip(chunks, is_alone, strict=True) if not alone)
    lone = [chunk.row for chunk, alone in zip(chunks, is_alone, strict=True) if alone]
    num_chunk_tokens = sum(chunk.count for chunk in longer)
    places = []
    next_longer, next_lone = 0, num_chunk_tokens
    for chunk, alone in zip(chunks, is_alone, strict=True):
        places.append(next_lone if alone else next_longer)
        if alone:
            next_lone += 1
        else:
            next_longer += chunk.count
    decodes = np.concatenate((np.array(lone, dtype=np.int64), decoding)) if lone else decoding
    return StepLayout(longer, decodes, tuple(places), num_chunk_tokens)


class StaticStep:
    """The buffers, as large as the largest step.

    first_decode:  [1] int32; how many tokens come before those of decodes
    decode_rows:   [max_rows] int32; the batch row of each decode, then -1
    sample_places: [max_rows] int32; where the token of each sample lies among the step's, then 0
    logits_places: [max_rows] int32; where its hidden state lies, then 0
    sample_rows:   [max_rows] int32; the batch row of each sample, then -1
    spans:         [max_rows + 1, 4] int32, for prepare_inputs; the last one used is padding
    pieces:        [max_pieces, 4] int32, for paged_prefill; those behind the last have no queries
    """

    def __init__(self, *, max_rows: int, max_tokens: int, tile: PrefillTile, group: int, device: torch.device) -> None:
        self._tile = tile
        self._group = group
        self._max_rows = max_rows
        self._queries_per_piece = max(1, tile.num_rows // group)
        self.max_pieces = self.pieces_of(max_tokens, num_chunks=max_rows)
        self.tokens = allocate_step_tokens(max_tokens, device)
        sizes = {
            "first_decode": 4,  # one, and the next buffer begins at a multiple of 16 bytes
            "decode_rows": max_rows,
            "sample_places": max_rows,
            "logits_places": max_rows,
            "sample_rows": max_rows,
            "spans": (max_rows + 1) * _SPAN,
            "pieces": self.max_pieces * _SPAN,
        }
        sizes = {name: -(-size // 4) * 4 for name, size in sizes.items()}
        self._words = torch.zeros(sum(sizes.values()), dtype=torch.int32, device=device)
        self._host = np.zeros(self._words.shape, dtype=np.int32)  # what the device holds
        self._ranges: dict[str, slice] = {}
        first = 0
        for name, size in sizes.items():
            self._ranges[name] = slice(first, first + size)
            first += size
        self.first_decode = self._words[self._ranges["first_decode"]][:1]
        self.decode_rows = self._words[self._ranges["decode_rows"]][:max_rows]
        self.sample_places = self._words[self._ranges["sample_places"]][:max_rows]
        self.logits_places = self._words[self._ranges["logits_places"]][:max_rows]
        self.sample_rows = self._words[self._ranges["sample_rows"]][:max_rows]
        self.spans = self._words[self._ranges["spans"]][: (max_rows + 1) * _SPAN].view(-1, _SPAN)
        self.pieces = self._words[self._ranges["pieces"]].view(-1, _SPAN)

    def pieces_of(self, num_tokens: int, *, num_chunks: int) -> int:
        """The most pieces into which prefill of so many tokens, in so many chunks, is cut."""
        return num_tokens // self._queries_per_piece + num_chunks

    def fill(
        self,
        layout: StepLayout,
        *,
        num_padded: int,
        places: Sequence[int] | RowIds,
        sample_rows: Sequence[int] | RowIds,
        dense_rows: Container[int] = (),
        is_narrowed: bool = False,
    ) -> int:
        """Put a step in; returns its number of prefill pieces.

        num_padded:  tokens that will be computed, padding included
        places:      where the token of each sample lies
        sample_rows: the batch row of each sample
        dense_rows:  the batch rows of chunks that need no pieces
        is_narrowed: whether the hidden states of samples will lie behind each other, and there will be no others
        """
        host = self._host
        num_decodes, num_longer = len(layout.decodes), len(layout.longer)
        host[self._ranges["first_decode"].start] = layout.num_chunk_tokens
        self._put("decode_rows", layout.decodes, -1)
        self._put("sample_places", places, 0)
        self._put("logits_places", np.arange(len(places)) if is_narrowed else places, 0)
        self._put("sample_rows", sample_rows, -1)
        spans = host[self._ranges["spans"]].reshape(-1, _SPAN)
        place = 0
        for index, chunk in enumerate(layout.longer):
            spans[index] = chunk.row, chunk.start, chunk.count, place
            place += chunk.count
        decodes = spans[num_longer : num_longer + num_decodes]
        decodes[:, 0] = layout.decodes
        decodes[:, 1] = -1
        decodes[:, 2] = 1
        decodes[:, 3] = np.arange(place, place + num_decodes)
        rest = spans[num_longer + num_decodes :]
        rest[:] = -1, 0, 0, 0
        if layout.longer or num_padded - layout.num_tokens <= 1:
            if len(rest):
                rest[0] = -1, 0, num_padded - layout.num_tokens, layout.num_tokens
        else:  # a launch for decodes alone gives each span one token
            padding = rest[: num_padded - layout.num_tokens]
            padding[:, 2] = 1
            padding[:, 3] = np.arange(layout.num_tokens, num_padded)
        pieces = [piece for piece in self._cut(layout) if piece[3] not in dense_rows]
        end = self._ranges["pieces"].start + self._put_pieces(pieces)
        self._send(end)
        return len(pieces)

    def _cut(self, layout: StepLayout) -> list[tuple[int, int, int, int]]:
        if not layout.longer:
            return []
        chunks = [PrefillChunk(row=chunk.row, start=chunk.start, num_tokens=chunk.count) for chunk in layout.longer]
        return cut_prefill(chunks, tile=self._tile, group=self._group)

    def _put(self, name: str, values: Sequence[int] | RowIds, filler: int) -> None:
        part = self._host[self._ranges[name]]
        part[: len(values)] = values
        part[len(values) : self._max_rows] = filler

    def _put_pieces(self, pieces: list[tuple[int, int, int, int]]) -> int:
        """How many words hold pieces, with those of an earlier step made empty: graphs launch a fixed number."""
        flat = self._host[self._ranges["pieces"]].reshape(-1, _SPAN)
        num_before = int(np.count_nonzero(flat[:, 1])) if not pieces else 0
        flat[len(pieces) :, 1] = 0
        if pieces:
            flat[: len(pieces)] = pieces
            return flat.size
        return num_before * _SPAN

    def _send(self, end: int) -> None:
        if not self._words.is_cuda:
            self._words.copy_(torch.from_numpy(self._host))
            return
        message = torch.empty(end, dtype=torch.int32, pin_memory=True)
        message.numpy()[:] = self._host[:end]
        send(message, self._words[:end])
