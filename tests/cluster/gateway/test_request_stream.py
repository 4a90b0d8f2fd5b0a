"""What a stream knows: offsets, its one end, and that nothing is lost or doubled."""

import random

import pytest
from fake_scheduler import DEMO_MODEL
from tokenizers import Tokenizer

from quire.cluster.gateway.completion import Completion
from quire.cluster.gateway.detokenizer import DetokenizerFactory
from quire.cluster.gateway.request_stream import RequestStream, TokenEntry
from quire.cluster.gateway.stop_strings import StopStrings
from quire.common.errors import InternalError, Unavailable
from quire.common.messages import EndReason, Finished, Spans, UsageCounts


def finished(num_tokens: int, *, stop_id: int | None = None) -> Finished:
    return Finished(7, 0, EndReason.STOP, stop_id, True, UsageCounts(3, 0, num_tokens), Spans(0, 0, 0, 0))


def test_duplicates_are_dropped_and_the_rest_of_the_message_counts() -> None:
    stream = RequestStream("r", 1, max_tokens=10)
    stream.receive(sequence=0, first_offset=0, token_ids=[10, 11, 12])
    stream.receive(sequence=0, first_offset=1, token_ids=[11, 12])
    stream.receive(sequence=0, first_offset=2, token_ids=[12, 13])
    assert stream.sequences[0].take(max_tokens=3) == ([10, 11, 12], [])
    assert stream.sequences[0].take(max_tokens=99) == ([13], [])
    assert stream.sequences[0].take(max_tokens=99) == ([], [])
    assert not stream.is_over


@pytest.mark.parametrize(
    ("sequence", "first_offset", "token_ids", "reason"),
    [(0, 2, [5], "TOKENS_LOST"), (1, 0, [5], "TOKENS_LOST"), (0, 1, [5, 6, 7, 8], "TOO_MANY_TOKENS")],
)
def test_a_gap_or_one_too_many_fails_the_request(sequence: int, first_offset: int, token_ids: list[int], reason: str) -> None:
    stream = RequestStream("r", 1, max_tokens=4)
    stream.receive(sequence=0, first_offset=0, token_ids=[1])
    stream.receive(sequence=sequence, first_offset=first_offset, token_ids=token_ids)
    assert isinstance(stream.error, InternalError)
    assert stream.error.reason == reason
    assert stream.sequences[0].unsent == [1]


def test_an_end_that_counts_more_tokens_than_came_is_a_gap() -> None:
    stream = RequestStream("r", 1, max_tokens=4)
    stream.receive(sequence=0, first_offset=0, token_ids=[1])
    stream.finish(finished(2))
    assert isinstance(stream.error, InternalError)


def test_only_the_first_end_counts() -> None:
    stream = RequestStream("r", 1, max_tokens=4)
    stream.receive(sequence=0, first_offset=0, token_ids=[1])
    stream.finish(finished(1))
    stream.fail(Unavailable("late"))
    stream.receive(sequence=0, first_offset=1, token_ids=[2])
    assert (stream.error, stream.sequences[0].num_received) == (None, 1)
    assert stream.finished == finished(1)


# -- several sequences, log probabilities -----------------------------------------------------------------------------


def end(sequence: int, *, num_tokens: int, is_last: bool = False) -> Finished:
    """num_tokens: of all sequences that ended so far"""
    return Finished(7, sequence, EndReason.STOP, None, is_last, UsageCounts(3, 0, num_tokens), Spans(0, 0, 0, 0))


def entries(*logprobs: float) -> list[TokenEntry]:
    return [TokenEntry(logprob, 1, (5,), (logprob,)) for logprob in logprobs]


def reason_of(stream: RequestStream) -> str | None:
    return stream.error.reason if stream.error is not None else None


def test_sequences_end_one_by_one_and_the_last_ends_the_request() -> None:
    stream = RequestStream("r", 1, max_tokens=4, num_sequences=2)
    stream.receive(sequence=1, first_offset=0, token_ids=[7, 8, 9])
    stream.receive(sequence=0, first_offset=0, token_ids=[1])
    stream.finish(end(1, num_tokens=3))
    assert not stream.is_over
    stream.receive(sequence=1, first_offset=3, token_ids=[5])  # after its end
    stream.receive(sequence=0, first_offset=1, token_ids=[2])
    stream.finish(end(0, num_tokens=5, is_last=True))
    assert (stream.is_over, stream.error) == (True, None)
    assert [sequence.unsent for sequence in stream.sequences] == [[1, 2], [7, 8, 9]]


@pytest.mark.parametrize(
    "ends",
    [
        [end(0, num_tokens=2)],  # one token came
        [end(1, num_tokens=0), end(0, num_tokens=2)],
        [end(0, num_tokens=1), end(0, num_tokens=1)],
        [end(2, num_tokens=0)],
        [end(1, num_tokens=0, is_last=True)],  # nothing is said of the first one's end
    ],
)
def test_ends_that_do_not_add_up_fail_the_request(ends: list[Finished]) -> None:
    stream = RequestStream("r", 1, max_tokens=4, num_sequences=2)
    stream.receive(sequence=0, first_offset=0, token_ids=[1])
    for each in ends:
        stream.finish(each)
    assert reason_of(stream) == "TOKENS_LOST"


def test_a_dropped_sequence_keeps_count_and_nothing_else() -> None:
    stream = RequestStream("r", 1, max_tokens=4)
    stream.receive(sequence=0, first_offset=0, token_ids=[1])
    stream.sequences[0].drop()
    stream.receive(sequence=0, first_offset=1, token_ids=[2, 3])
    assert (stream.sequences[0].unsent, stream.sequences[0].num_received, stream.error) == ([], 3, None)


def test_log_probabilities_stay_beside_their_tokens() -> None:
    stream = RequestStream("r", 1, max_tokens=9, has_entries=True)
    stream.receive(sequence=0, first_offset=0, token_ids=[1, 2], entries=entries(-1, -2))
    stream.receive(sequence=0, first_offset=1, token_ids=[2, 3], entries=entries(-2, -3))  # one of them again
    assert stream.sequences[0].take(max_tokens=1) == ([1], entries(-1))
    assert stream.sequences[0].take(max_tokens=9) == ([2, 3], entries(-2, -3))
    stream.receive(sequence=0, first_offset=3, token_ids=[4])
    assert reason_of(stream) == "LOGPROBS_LOST"


def test_a_prompts_log_probabilities_come_in_order_and_before_the_first_token() -> None:
    stream = RequestStream("r", 1, max_tokens=9, num_prompt_entries=3)
    stream.receive_prompt(first_position=1, entries=entries(-1, -2))
    stream.receive_prompt(first_position=2, entries=entries(-2, -3))  # one of them again
    assert stream.prompt_entries == entries(-1, -2, -3)
    stream.receive(sequence=0, first_offset=0, token_ids=[1])
    assert stream.error is None
    for first_position, values in ((2, (-1.0,)), (1, (-1.0, -2.0, -3.0, -4.0))):
        stream = RequestStream("r", 1, max_tokens=9, num_prompt_entries=3)
        stream.receive_prompt(first_position=first_position, entries=entries(*values))
        assert reason_of(stream) == "LOGPROBS_LOST"
    stream = RequestStream("r", 1, max_tokens=9, num_prompt_entries=3)
    stream.receive(sequence=0, first_offset=0, token_ids=[1])
    assert reason_of(stream) == "LOGPROBS_LOST"


# -- completions ------------------------------------------------------------------------------------------------------

TOKENIZER = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
FACTORY = DetokenizerFactory(TOKENIZER)


def completion(*stop_strings: str, include: bool = False, stop_ids: tuple[int, ...] = (0,), max_tokens: int = 1000) -> Completion:
    detokenizer = FACTORY.start(skip_special_tokens=False)
    return Completion(detokenizer, StopStrings(stop_strings, include=include), stop_ids=stop_ids, max_tokens=max_tokens)


def test_the_stop_token_is_among_the_ids_but_gives_no_text() -> None:
    ids = TOKENIZER.encode("once upon a time").ids
    for stop_id in (0, ids[1]):
        made = completion(stop_ids=(stop_id,))
        pieces = [made.push([token_id]) for token_id in [*ids[:1], stop_id]]
        assert "".join(piece.text for piece in pieces) + made.finish(stop_id=stop_id) == TOKENIZER.decode(ids[:1])
        assert [token_id for piece in pieces for token_id in piece.token_ids] == [ids[0], stop_id]
        assert made.own_end() is None or made.num_tokens == 2


def test_a_stop_token_that_did_not_end_the_sequence_gives_its_text_after_all() -> None:
    ids = TOKENIZER.encode("once upon a time").ids
    made = completion(stop_ids=(ids[1], ids[-1]))
    text = "".join(made.push([token_id]).text for token_id in ids) + made.finish(stop_id=None)
    assert text == "once upon a time"


def test_tokens_after_the_one_that_completes_a_stop_string_are_not_kept() -> None:
    """However the tokens are grouped, and the same with or without the stop string in the text."""
    ids = TOKENIZER.encode("once upon a time there was a small fox. The end").ids
    stop = "there was"
    num_kept = next(n for n in range(len(ids)) if stop in TOKENIZER.decode(ids[:n]))
    rng = random.Random(3)
    for _ in range(50):
        include = rng.random() < 0.5
        made = completion(stop, "never", include=include)
        texts: list[str] = []
        kept: list[int] = []
        start = 0
        while start < len(ids):
            size = rng.randrange(1, 6)
            piece = made.push(ids[start : start + size])
            texts.append(piece.text)
            kept += piece.token_ids
            start += size
        assert "".join(texts) + made.finish(stop_id=None) == ("once upon a time there was" if include else "once upon a time ")
        assert (made.stop_string, kept, made.num_tokens) == (stop, ids[:num_kept], num_kept)
        assert made.own_end() == (EndReason.STOP, None)


def test_a_stop_string_in_the_held_back_text_is_found_at_the_end() -> None:
    ids = TOKENIZER.encode("€").ids  # several bytes
    made = completion("\ufffd", stop_ids=())
    assert made.push(ids[:2]).text == ""
    assert made.finish(stop_id=None) == ""
    assert made.stop_string == "\ufffd"


def test_the_tokens_show_an_end_by_length_or_stop_token() -> None:
    made = completion(max_tokens=3)
    made.push([5, 6])
    assert made.own_end() is None
    made.push([7])
    assert made.own_end() == (EndReason.LENGTH, None)
    made = completion(max_tokens=3)
    made.push([5, 0])
    assert made.own_end() == (EndReason.STOP, 0)
