"""A request whose scheduler was lost, for the next scheduler: pure, without socket or clock."""

from typing import Final

from msgspec.structs import replace

from quire.cluster.gateway.request_stream import RequestStream, SequenceStream
from quire.common.messages import EndReason, SequenceStart, Submit

# A request that was at this many schedulers when they were lost may be what ends them, and is not given to another.
MAX_LOSSES: Final = 4


def end_what_has_ended(submit: Submit, stream: RequestStream) -> None:
    """End the sequences whose tokens show an end that the lost scheduler could not tell any more.

    Not those of a beam search: it brings its sequences whole, and only its own account says that there are no more.
    """
    if submit.beam is not None:
        return
    for start in submit.sequences:
        sequence = stream.sequences[start.index]
        stop_id = _stop_id(submit, sequence)
        if sequence.is_dropped or stop_id is not None:
            stream.end_here(start.index, EndReason.STOP, stop_id=None if sequence.is_dropped else stop_id)
        elif sequence.num_received >= submit.max_tokens:
            stream.end_here(start.index, EndReason.LENGTH)


def next_attempt(submit: Submit, stream: RequestStream, *, elapsed_s: float) -> Submit:
    """The first Submit of a request, `elapsed_s` old, as the attempt behind the stream's: what has not ended goes on behind the
    tokens that came, with the same seed. The stream expects that attempt from now on.

    Token ids travel, never their text: tokenized again, a text may give other ids. A beam search begins anew, for the tokens
    of its beams never left the scheduler; it finds the same sequences, and those that came before are known.
    """
    is_repeated = submit.beam is not None
    starts = submit.sequences if is_repeated else tuple(_resumed(stream, start) for start in submit.sequences if _is_open(stream, start))
    sampling = submit.sampling
    if sampling.num_prompt_logprobs is not None and stream.has_prompt_entries:
        sampling = replace(sampling, num_prompt_logprobs=None)  # so that the prompt may be found in the prefix cache
    stream.begin_attempt(stream.attempt + 1, is_repeated=is_repeated)
    return replace(
        submit,
        attempt=stream.attempt,
        sequences=starts,
        sampling=sampling,
        time_left_s=max(0.0, submit.time_left_s - elapsed_s),
        age_s=submit.age_s + elapsed_s,
    )


def _stop_id(submit: Submit, sequence: SequenceStream) -> int | None:
    """The stop token that ended a sequence, if one did: as the scheduler judges it."""
    if sequence.num_received <= submit.sampling.min_tokens or sequence.token_ids[-1] not in submit.sampling.stop_ids:
        return None
    return sequence.token_ids[-1]


def _is_open(stream: RequestStream, start: SequenceStart) -> bool:
    return stream.sequences[start.index].finished is None


def _resumed(stream: RequestStream, start: SequenceStart) -> SequenceStart:
    sequence = stream.sequences[start.index]
    return SequenceStart(start.index, tuple(sequence.token_ids), sequence.cumulative_logprob)
