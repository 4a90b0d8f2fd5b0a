"""How many sequences a request generates and returns, and whether it searches for them."""

from dataclasses import dataclass
from typing import Final

from quire.cluster.gateway.field_checks import in_range
from quire.common.errors import InvalidRequest
from quire.common.messages import BeamSearch
from quire.v1 import inference_pb2

MAX_SEQUENCES: Final = 8
MIN_BEAMS: Final = 2
MAX_BEAMS: Final = 16
MAX_LENGTH_PENALTY: Final = 10.0  # either way; a length to this power is still a number

# What has no meaning in a search, with the values that say just that. The model's own defaults are no such wish.
_DRAWING: Final = {"temperature": (0.0, 1.0), "top_p": (1.0,), "top_k": (0.0,), "min_p": (0.0,), "typical_p": (1.0,)}


@dataclass(frozen=True, slots=True)
class SequenceCounts:
    """Sequences of a request."""

    # Invariant: n <= num_sequences; with beams num_sequences is 1, from which the search forks the others, and n <= num_beams.
    n: int = 1  # to return
    num_sequences: int = 1  # to start
    beam: BeamSearch | None = None

    @property
    def num_reported(self) -> int:
        """Those that the scheduler tells of."""
        return self.n if self.beam is not None else self.num_sequences

    @property
    def are_all_returned(self) -> bool:
        """Whether there is nothing to choose among what the scheduler tells of."""
        return self.num_reported == self.n


def sequence_counts(request: inference_pb2.GenerateRequest, *, is_greedy: bool) -> SequenceCounts:
    """What n, best_of and beam_search ask for.

    Raises:
        InvalidRequest: a number is outside its limits, or they do not go together.
    """
    n = _count(request, "n", 1)
    if request.HasField("beam_search"):
        if request.HasField("best_of"):
            raise InvalidRequest("best_of is for sampling; a beam search returns its n best anyway; leave it unset", field="best_of")
        beam = _beam_search(request.beam_search)
        if n > beam.num_beams:
            text = f"n is {n} and beam_count is {beam.num_beams}; n must not be more"
            raise InvalidRequest(text, field="n", metadata={"n": str(n), "beam_count": str(beam.num_beams)})
        return SequenceCounts(n=n, beam=beam)
    best_of = _count(request, "best_of", n)
    if best_of < n:
        text = f"best_of is {best_of} and n is {n}; best_of must not be less"
        raise InvalidRequest(text, field="best_of", metadata={"n": str(n), "best_of": str(best_of)})
    if is_greedy and best_of > 1:
        field, count = ("n", n) if n > 1 else ("best_of", best_of)
        text = f"{field} is {count} and temperature is 0; all sequences would be the same; ask for 1, or for a beam_search"
        raise InvalidRequest(text, field=field)
    return SequenceCounts(n=n, num_sequences=best_of)


def check_fits_beams(request: inference_pb2.GenerateRequest) -> None:
    """Refuse what a search does not honour.

    Raises:
        InvalidRequest: names the field.
    """
    for name, neutral in _DRAWING.items():
        if request.sampling.HasField(name) and getattr(request.sampling, name) not in neutral:  # type: ignore[arg-type]  # as above
            raise InvalidRequest(f"a beam search draws nothing; leave {name} unset", field=f"sampling.{name}")
    if request.stopping.stop_strings:
        raise InvalidRequest("a beam search ends at tokens, not at texts; leave stop_strings unset", field="stopping.stop_strings")
    if request.output.HasField("logprobs"):
        text = "a beam search gives the log probability of whole sequences (cumulative_logprob); leave logprobs unset"
        raise InvalidRequest(text, field="output.logprobs")


def _count(request: inference_pb2.GenerateRequest, name: str, default: int) -> int:
    if not request.HasField(name):  # type: ignore[arg-type]  # the stubs take literal names only
        return default
    return int(in_range(name, getattr(request, name), low=1, high=MAX_SEQUENCES))


def _beam_search(given: inference_pb2.BeamSearchParams) -> BeamSearch:
    if not given.HasField("beam_count"):
        text = f"beam_search has no beam_count; set it to {MIN_BEAMS} to {MAX_BEAMS}"
        raise InvalidRequest(text, field="beam_search.beam_count")
    num_beams = int(in_range("beam_search.beam_count", given.beam_count, low=MIN_BEAMS, high=MAX_BEAMS))
    penalty = given.length_penalty if given.HasField("length_penalty") else 1.0
    penalty = in_range("beam_search.length_penalty", penalty, low=-MAX_LENGTH_PENALTY, high=MAX_LENGTH_PENALTY)
    if given.early_stopping not in inference_pb2.EarlyStopping.values():
        text = f"early_stopping {int(given.early_stopping)} is not one of heuristic, first, never"
        raise InvalidRequest(text, field="beam_search.early_stopping")
    return BeamSearch(num_beams, penalty, int(given.early_stopping) or int(inference_pb2.EARLY_STOPPING_HEURISTIC))
