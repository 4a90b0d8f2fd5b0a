"""How long a group's steps take, learned from what its ranks report: for time-outs, and for the price of preemptions."""

from typing import Final

# Weight of the newest measurement in a running mean: the mean follows a change within about ten steps.
NEWEST_WEIGHT: Final = 0.2
# The same for steps beside which copies run, which differ by little from others: of about fifty.
COPIES_WEIGHT: Final = 0.04
# Steps with fewer prompt tokens say little about the speed of prefill.
MIN_PREFILL_TOKENS: Final = 32


class StepMeter:
    """Running means of one group. Everything is in seconds and tokens; None means not known yet."""

    def __init__(self, *, prefill_tokens_per_s: tuple[tuple[int, float], ...], copy_bytes_per_s: float, block_bytes: int) -> None:
        self._prefill_table = prefill_tokens_per_s  # (prompt length, speed), ascending: measured at load
        self._prefill_tokens_per_s: float | None = None
        self._decode_step_s: float | None = None
        self._longest_s: float | None = None  # a step without copies, of any kind, slowly forgotten
        self._block_copy_s = block_bytes / copy_bytes_per_s if copy_bytes_per_s > 0 else 0.0
        # Of steps beside which copies ran, the same mean of both: how much longer they took than without, and how many copies that
        # was. Signed: most steps are slowed by less than they vary, and only of their sum something can be told.
        self._inflation_s = 0.0
        self._copies_beside = 0.0

    def observe(self, *, device_s: float, num_prefill_tokens: int, num_decoding: int, num_copies: int) -> None:
        """Take in one step."""
        if device_s <= 0 or not (num_prefill_tokens or num_decoding):
            return
        expected_s = self.predict(num_prefill_tokens=num_prefill_tokens, num_decoding=num_decoding)
        if num_copies:
            if expected_s is not None:
                self._inflation_s += COPIES_WEIGHT * (device_s - expected_s - self._inflation_s)
                self._copies_beside += COPIES_WEIGHT * (num_copies - self._copies_beside)
            return  # a step slowed by copies says nothing about steps without them
        if not num_prefill_tokens:
            self._decode_step_s = _mean(self._decode_step_s, device_s)
        elif num_prefill_tokens >= MIN_PREFILL_TOKENS:
            prefill_s = max(device_s - (self._decode_step_s or 0.0) * bool(num_decoding), device_s / 2)
            self._prefill_tokens_per_s = _mean(self._prefill_tokens_per_s, num_prefill_tokens / prefill_s)
        self._longest_s = max(device_s, (self._longest_s or 0.0) * (1 - NEWEST_WEIGHT / 10))

    def predict(self, *, num_prefill_tokens: int, num_decoding: int) -> float | None:
        """How long a step will take on the device."""
        total_s = 0.0
        if num_decoding:
            if self._decode_step_s is None:
                return None
            total_s += self._decode_step_s
        if num_prefill_tokens:
            speed = self._prefill_speed(num_prefill_tokens)
            if speed is None:
                return None
            total_s += num_prefill_tokens / speed
        return total_s

    def time_out_s(self, *, num_prefill_tokens: int, num_decoding: int, factor: float) -> float | None:
        """`factor` times the longer of what is predicted and what was seen."""
        predicted_s = self.predict(num_prefill_tokens=num_prefill_tokens, num_decoding=num_decoding)
        if predicted_s is None or self._longest_s is None:
            return None
        return factor * max(predicted_s, self._longest_s)

    def recompute_s(self, num_tokens: int) -> float | None:
        """GPU time that computing so many tokens anew takes from others."""
        speed = self._prefill_speed(num_tokens)
        return None if speed is None else num_tokens / speed

    def swap_s(self, num_blocks: int, *, backlog: int) -> float:
        """GPU time that swapping so many blocks out and in takes from others, and the wait behind `backlog` copies under way."""
        per_copy_s = max(0.0, self._inflation_s) / self._copies_beside if self._copies_beside else 0.0
        return 2 * num_blocks * per_copy_s + backlog * self._block_copy_s

    def copy_steps(self, num_blocks: int) -> int:
        """About how many whole decode steps pass while so many blocks are copied one way; 0 while that is not known."""
        return int(num_blocks * self._block_copy_s / self._decode_step_s) if self._decode_step_s else 0

    def _prefill_speed(self, num_tokens: int) -> float | None:
        if self._prefill_tokens_per_s is not None:
            return self._prefill_tokens_per_s
        if not self._prefill_table:
            return None
        return next((speed for length, speed in self._prefill_table if length >= num_tokens), self._prefill_table[-1][1])


def _mean(mean: float | None, newest: float) -> float:
    return newest if mean is None else mean + NEWEST_WEIGHT * (newest - mean)
