"""NEVER: requests that no group could hold, or that the queue has no place for, and the arithmetic for the client."""

from collections.abc import Mapping, Sequence

from quire.cluster.scheduler.group import Group
from quire.cluster.scheduler.request import num_sequences
from quire.cluster.scheduler.waiting_queue import WaitingQueue
from quire.common.errors import StatusCode
from quire.common.messages import Rejected, Submit


def refusal(message: Submit, groups: Sequence[Group], queue: WaitingQueue, *, retry_after_s: float) -> Rejected | None:
    """Why a request can not be queued; None when it can.

    groups: those that serve its model
    """

    def rejected(code: StatusCode, reason: str, text: str, numbers: Mapping[str, int], retry_after_s: float | None = None) -> Rejected:
        named = {name: str(number) for name, number in numbers.items()}
        return Rejected(message.request_id, message.attempt, code, reason, text, named, retry_after_s)

    if not groups:
        text = f"no worker group of model {message.model} is ready; try again in {retry_after_s:g} s"
        return rejected(StatusCode.UNAVAILABLE, "NO_READY_GROUP", text, {}, retry_after_s)
    num_prompt_tokens = len(message.prompt_ids)
    if not message.prompt_ids or not message.sequences or any(len(s.resumed_ids) >= message.max_tokens for s in message.sequences):
        return rejected(StatusCode.INVALID_ARGUMENT, "NOTHING_TO_GENERATE", "the prompt is empty or nothing is left to generate", {})
    num_tokens = num_prompt_tokens + message.max_tokens
    limit = max(group.max_request_tokens for group in groups)
    if num_tokens > limit:
        text = (
            f"prompt has {num_prompt_tokens} tokens and max_tokens is {message.max_tokens}, {num_tokens} together; "
            f"the largest group holds {limit}; shorten the prompt or lower max_tokens"
        )
        numbers = {"prompt_tokens": num_prompt_tokens, "max_tokens": message.max_tokens, "limit": limit}
        return rejected(StatusCode.INVALID_ARGUMENT, "REQUEST_TOO_LONG", text, numbers)
    width = num_sequences(message)
    most_rows = max(group.batch.num_rows for group in groups)
    if width > most_rows:
        text = f"the request has {width} sequences; the largest group runs {most_rows} at once (max_sequences); ask for fewer"
        return rejected(StatusCode.INVALID_ARGUMENT, "TOO_MANY_SEQUENCES", text, {"sequences": width, "limit": most_rows})
    if not any(group.can_ever_hold(message) for group in groups):
        group = max(groups, key=lambda group: group.pool.num_blocks)
        num_blocks = group.most_blocks(message)
        text = (
            f"{width} sequences of {num_prompt_tokens} + {message.max_tokens} tokens take up to {num_blocks} blocks of "
            f"{group.config.block_size} tokens; the largest group has {group.pool.num_blocks}; lower n or max_tokens"
        )
        numbers = {"sequences": width, "blocks": num_blocks, "limit": group.pool.num_blocks}
        return rejected(StatusCode.INVALID_ARGUMENT, "REQUEST_TOO_LARGE", text, numbers)
    if not queue.has_room(num_prompt_tokens):
        text = (
            f"the queue holds {len(queue)} requests of {queue.max_requests} and {queue.num_tokens} prompt tokens "
            f"of {queue.max_tokens}; try again in {retry_after_s:g} s"
        )
        numbers = {"waiting_requests": len(queue), "waiting_tokens": queue.num_tokens}
        return rejected(StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", text, numbers, retry_after_s)
    return None
