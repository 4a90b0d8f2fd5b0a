"""How tokens are chosen: the request's sampling parameters and the model's defaults to a SamplingState within its limits."""

from collections.abc import Iterable, Sequence
from typing import Final

from quire.cluster.gateway.field_checks import check_token_ids, in_range
from quire.cluster.gateway.served_model import ServedModel
from quire.common.errors import InvalidRequest
from quire.common.messages import SamplingState
from quire.v1 import inference_pb2

MAX_TEMPERATURE: Final = 100.0
# A penalty nearer to 0 makes logits infinite, and so the row fails.
MIN_REPETITION_PENALTY: Final = 0.01
MAX_REPETITION_PENALTY: Final = 100.0
MAX_ADDED_PENALTY: Final = 2.0
MAX_BIAS: Final = 100.0
MAX_LOGPROBS: Final = 20
MAX_BAD_WORD_CHARS: Final = 256


def sampling_state(request: inference_pb2.GenerateRequest, model: ServedModel) -> SamplingState:
    """What the request says of drawing and of log probabilities; what it does not say, the model's generation_config does.

    Raises:
        InvalidRequest: a value is outside its limits.
    """
    given = request.sampling

    def pick(name: str, neutral: float, low: float, high: float, *, excludes_low: bool = False) -> float:
        sources = (source for source in (given, model.default_sampling) if source.HasField(name))  # type: ignore[arg-type]  # the stubs take literal names only
        value = next((float(getattr(source, name)) for source in sources), neutral)
        return in_range(f"sampling.{name}", value, low=low, high=high, excludes_low=excludes_low)

    return SamplingState(
        temperature=pick("temperature", 1.0, 0.0, MAX_TEMPERATURE),
        top_k=int(pick("top_k", 0, 0, 2**32 - 1)),
        top_p=pick("top_p", 1.0, 0.0, 1.0, excludes_low=True),
        min_p=pick("min_p", 0.0, 0.0, 1.0),
        typical_p=pick("typical_p", 1.0, 0.0, 1.0, excludes_low=True),
        repetition_penalty=pick("repetition_penalty", 1.0, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
        presence_penalty=pick("presence_penalty", 0.0, -MAX_ADDED_PENALTY, MAX_ADDED_PENALTY),
        frequency_penalty=pick("frequency_penalty", 0.0, -MAX_ADDED_PENALTY, MAX_ADDED_PENALTY),
        bias=_bias(given, model),
        allowed_ids=_token_ids(given.allowed_token_ids.ids, "allowed_token_ids", model) if given.HasField("allowed_token_ids") else None,
        bad_ids=_token_ids(given.bad_token_ids.ids, "bad_token_ids", model),
        num_logprobs=_num_logprobs(request.output, "logprobs", model),
        num_prompt_logprobs=_num_logprobs(request.output, "prompt_logprobs", model),
    )


def check_drawable(state: SamplingState, *, logits_size: int) -> None:
    """Refuse what forbids every token: nothing could ever be drawn.

    Raises:
        InvalidRequest: nothing is left, at least not before min_tokens.
    """
    if state.allowed_ids is None and len(state.bad_ids) + len(state.stop_ids) < logits_size:
        return
    allowed = set(range(logits_size)) if state.allowed_ids is None else set(state.allowed_ids)
    left = allowed.difference(state.bad_ids)
    field = "sampling.bad_token_ids" if state.allowed_ids is None else "sampling.allowed_token_ids"
    numbers = {"allowed": str(len(allowed)), "bad": str(len(state.bad_ids))}
    if not left:
        text = f"{len(allowed)} tokens are allowed and {len(state.bad_ids)} are bad, which leaves none to draw; allow another one"
        raise InvalidRequest(text, reason="NO_ALLOWED_TOKEN", field=field, metadata=numbers)
    if state.min_tokens > 0 and left.issubset(state.stop_ids):
        text = (
            f"only {len(left)} tokens may be drawn, all of which end the sequence, and min_tokens is {state.min_tokens}; "
            "allow another one, or set min_tokens to 0"
        )
        raise InvalidRequest(text, reason="NO_ALLOWED_TOKEN", field=field, metadata={**numbers, "min_tokens": str(state.min_tokens)})


def bad_words(words: Sequence[str], model: ServedModel) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The tokens of words that must not be completed: single ones, and sequences. Each word counts at the start of a text and
    behind a space, which most tokenizers write differently.

    Raises:
        InvalidRequest: a word is empty or too long.
    """
    field = "sampling.bad_words"
    for word in words:
        if not 1 <= len(word) <= MAX_BAD_WORD_CHARS or not word.strip():
            text = f"a bad word has {len(word)} characters; it takes 1 to {MAX_BAD_WORD_CHARS}, not all of them spaces"
            raise InvalidRequest(text, field=field)
    forms = dict.fromkeys(form for word in words for form in (word, f" {word.lstrip()}"))
    sequences = dict.fromkeys(tuple(model.tokenizer.encode(form, add_special_tokens=False, parse_special_tokens=False)) for form in forms)
    # An id beyond the model's width is never drawn, and so its sequence is never completed.
    known = [ids for ids in sequences if ids and max(ids) < model.logits_size]
    return tuple(ids[0] for ids in known if len(ids) == 1), tuple(ids for ids in known if len(ids) > 1)


def _bias(given: inference_pb2.SamplingParams, model: ServedModel) -> tuple[tuple[int, float], ...]:
    field = "sampling.logit_bias"
    check_token_ids(list(given.logit_bias), below=model.logits_size, field=field, what="logit_bias")
    return tuple((token_id, in_range(field, bias, low=-MAX_BIAS, high=MAX_BIAS)) for token_id, bias in sorted(given.logit_bias.items()))


def _token_ids(ids: Iterable[int], name: str, model: ServedModel) -> tuple[int, ...]:
    distinct = tuple(dict.fromkeys(ids))
    check_token_ids(distinct, below=model.logits_size, field=f"sampling.{name}", what=name)
    return distinct


def _num_logprobs(output: inference_pb2.OutputParams, name: str, model: ServedModel) -> int | None:
    if not output.HasField(name):  # type: ignore[arg-type]  # the stubs take literal names only
        return None
    return int(in_range(f"output.{name}", getattr(output, name), low=0, high=min(MAX_LOGPROBS, model.logits_size)))
