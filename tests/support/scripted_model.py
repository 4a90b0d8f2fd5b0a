"""The pretended model, with words put into its mouth: a story may say what comes next, and the hash of the tokens says the rest."""

from collections.abc import Sequence
from typing import Final

from fake_ranks import VOCAB_SIZE, beam_candidates, draw, encode_tokens

from quire.common.messages import SamplingState

# Words have ids behind those that the hash can give.
FIRST_WORD: Final = VOCAB_SIZE + 3
# The best path of a step has this many nats less than the best one of the step before, each further path a hundredth less.
NATS_PER_STEP: Final = 1.0
# What no story has chosen is so unlikely that no search takes it while it has a choice.
UNLIKELY: Final = -1000.0


class ScriptedModel:
    """Words and their ids, what sequences say next, and which beams go on."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._words: dict[int, str] = {}
        self._said: dict[tuple[bytes, int], int] = {}  # by (tokens so far, sequence)
        self._candidates: dict[bytes, list[tuple[int, float]]] = {}  # by tokens so far
        # Beams of a search after each choice, best first: (tokens, sum of log probabilities); by prompt.
        self._paths: dict[bytes, list[tuple[list[int], float]]] = {}

    # -- words --------------------------------------------------------------------------------------------------------

    def ids(self, words: Sequence[str]) -> list[int]:
        for word in words:
            if word not in self._ids:
                self._ids[word] = FIRST_WORD + len(self._ids)
                self._words[self._ids[word]] = word
        return [self._ids[word] for word in words]

    def word(self, token_id: int) -> str:
        """The word, or the number of a token that the hash drew."""
        return self._words.get(token_id, str(token_id))

    # -- what the story says --------------------------------------------------------------------------------------------

    def say(self, prompt_ids: Sequence[int], index: int, words: Sequence[str]) -> None:
        """Have one sequence of a request begin its completion with these words."""
        so_far = list(prompt_ids)
        for token_id in self.ids(words):
            self._said[bytes(encode_tokens(so_far)), index] = token_id
            so_far.append(token_id)

    def choose(self, prompt_ids: Sequence[int], choices: Sequence[tuple[int, str]]) -> None:
        """Have a beam search go on with these (place of the parent, word), best first."""
        prompt = bytes(encode_tokens(prompt_ids))
        parents = self._paths.get(prompt, [(list(prompt_ids), 0.0)])
        depth = len(parents[0][0]) - len(prompt_ids) + 1
        paths = []
        for place, (parent, word) in enumerate(choices):
            tokens, total = parents[parent]
            wanted = -NATS_PER_STEP * (depth + place / 100)
            (token_id,) = self.ids([word])
            self._candidates.setdefault(bytes(encode_tokens(tokens)), []).append((token_id, wanted - total))
            paths.append(([*tokens, token_id], wanted))
        self._paths[prompt] = paths

    # -- what the ranks ask ---------------------------------------------------------------------------------------------

    def draw(self, encoded: bytes | bytearray, sampling: SamplingState, index: int) -> int:
        token_id = self._said.get((bytes(encoded), index))
        return draw(encoded, sampling, index) if token_id is None else token_id

    def candidates(self, encoded: bytes | bytearray, sampling: SamplingState, count: int, num_tokens: int) -> tuple[tuple[int, float], ...]:
        if not self._candidates:
            return beam_candidates(encoded, sampling, count, num_tokens)
        chosen = self._candidates.get(bytes(encoded), [])
        return (*chosen, *((token_id, UNLIKELY - token_id) for token_id in range(count - len(chosen))))
