"""What one message of an answer may hold: gRPC's clients take 4 MiB by default, and a longer one would fail them without a reason."""

from typing import Final

from google.protobuf.message import Message

from quire.common.errors import InvalidRequest

MAX_ANSWER_BYTES: Final = 4 * 2**20
MIN_ID_BYTES: Final = 1  # of a token id in a message
MIN_HEAD_BYTES: Final = 2  # tag and length of a message inside another


def check_fits(answer: Message, *, advice: str) -> None:
    """Refuse an answer that is too large for one message.

    Raises:
        InvalidRequest: says how large it is, and the advice.
    """
    check_num_bytes(answer.ByteSize(), advice=advice)


def check_num_bytes(num_bytes: int, *, advice: str) -> None:
    """The same for one that is not complete yet, as far as it has come."""
    if num_bytes > MAX_ANSWER_BYTES:
        raise InvalidRequest(
            f"the answer has {num_bytes} bytes or more; one message takes {MAX_ANSWER_BYTES}; {advice}",
            reason="ANSWER_TOO_LARGE",
            metadata={"bytes": str(num_bytes), "max_bytes": str(MAX_ANSWER_BYTES)},
        )
