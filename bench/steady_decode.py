"""Many sequences in steady decode, from 1k tokens each on, of which none ends."""

from dataclasses import dataclass
from typing import Final

from quire.bench.scheduler_feed import BLOCK_SIZE, MAX_BATCHED_TOKENS, attach_group, rank_hello, submit
from quire.common.messages import AttachGroup, RankHello, Submit

GROUP_ID: Final = "g0"
# Prompts have from MIN_PROMPT_TOKENS on all lengths of one block, so that every step meets the same share of blocks that fill.
MIN_PROMPT_TOKENS: Final = 1000 - BLOCK_SIZE // 2
MAX_PROMPT_TOKENS: Final = MIN_PROMPT_TOKENS + BLOCK_SIZE - 1
# Steps until the last prompt is computed, during which the first ones decode already: 8/7 · MAX_PROMPT_TOKENS · num_running
# tokens over max_batched_tokens, which is at least 8 · num_running, and as many again to spare.
MAX_FILLING_STEPS: Final = 320


@dataclass(frozen=True, slots=True)
class SteadyDecode:
    """One group with num_running sequences, which can decode for num_steps steps from when all of them do."""

    num_running: int
    num_steps: int

    @property
    def max_tokens(self) -> int:
        return self.num_steps + MAX_FILLING_STEPS

    def attach(self) -> AttachGroup:
        return attach_group(
            GROUP_ID,
            max_sequences=self.num_running,
            max_model_len=MAX_PROMPT_TOKENS + self.max_tokens,
            max_batched_tokens=max(MAX_BATCHED_TOKENS, 8 * self.num_running),
        )

    def hello(self) -> RankHello:
        most_blocks = (MAX_PROMPT_TOKENS + self.max_tokens) // BLOCK_SIZE + 2
        # A quarter more than is ever held: no step evicts or preempts, and admission finds its headroom.
        return rank_hello(GROUP_ID, num_gpu_blocks=self.num_running * most_blocks * 5 // 4, max_rows=self.num_running)

    def submits(self) -> list[Submit]:
        return [
            submit(number, num_prompt_tokens=MIN_PROMPT_TOKENS + number % BLOCK_SIZE, max_tokens=self.max_tokens)
            for number in range(self.num_running)
        ]
