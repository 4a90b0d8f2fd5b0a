"""Whether the ranks of a group still hold the same: every step's checksums of their block tables, compared."""

from quire.common.messages import StepAck


class RankChecks:
    """Of one group. Steps are forgotten when all ranks have spoken of them, and no more are under way than have been planned."""

    def __init__(self, *, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._said: dict[int, dict[int, int]] = {}  # by step: what each rank said

    def objection(self, ack: StepAck) -> str:
        """What is wrong with a rank's acknowledgement beside those of the others; "" if nothing is. Each is asked about once."""
        said = self._said.setdefault(ack.step_id, {})
        for rank, checksum in said.items():
            if checksum != ack.checksum:
                both = f"{checksum:#010x} and {ack.checksum:#010x}"
                return f"the block tables of ranks {rank} and {ack.rank} differ after step {ack.step_id}: {both}"
        said[ack.rank] = ack.checksum
        if len(said) == self._num_ranks:
            del self._said[ack.step_id]
        return ""
