"""Log probabilities as the client gets them."""

from collections.abc import Callable, Sequence

from quire.cluster.gateway.request_stream import TokenEntry
from quire.v1 import inference_pb2


def logprob_messages(
    token_ids: Sequence[int], entries: Sequence[TokenEntry], *, text_of: Callable[[int], str]
) -> list[inference_pb2.TokenLogprobs]:
    """A message per token. A prompt's can be tens of thousands: call it from a worker thread then."""

    def message(token_id: int, logprob: float, rank: int) -> inference_pb2.TokenLogprob:
        return inference_pb2.TokenLogprob(token_id=token_id, logprob=logprob, rank=rank, text=text_of(token_id))

    return [
        inference_pb2.TokenLogprobs(
            token=message(token_id, entry.logprob, entry.rank),
            top=[
                message(top_id, logprob, place)
                for place, (top_id, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1)
            ],
        )
        for token_id, entry in zip(token_ids, entries, strict=True)
    ]
