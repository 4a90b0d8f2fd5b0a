"""Step plans as text, with sequences called by their names."""

from collections.abc import Callable, Iterable, Mapping

from quire.cluster.scheduler.request import Sequence
from quire.common.messages import StepPlan


class PlanTeller:
    """Follows the plans of one group, as its ranks do: which rows there are, and which of them decode."""

    def __init__(self, *, block_size: int, name: Callable[[Sequence], str], word: Callable[[int], str]) -> None:
        self._block_size = block_size
        self._name = name
        self._word = word
        self._rows: dict[int, str] = {}  # names, by row
        self._sticky: set[int] = set()
        self._held: set[int] = set()

    def tell(self, plan: StepPlan, sequences: Mapping[int, Sequence]) -> list[str]:
        """What a rank does for the plan, in the order in which it does so.

        sequences: those with a row, by row, when the plan was made
        """
        lines: list[str] = []

        def line(what: str, items: Iterable[str]) -> None:
            text = ", ".join(items)
            if text:
                lines.append(f"  {what:<8} {text}")

        line("leave", (f"{self._rows[row]} from row {row}" for row in plan.remove_rows))
        self._change_rows(plan, sequences)
        rows = self._rows
        for add in plan.add_rows:
            cached = f", {_span(0, add.num_computed)} already there" if add.num_computed else ""
            line("enter", [f"{rows[add.row]} in row {add.row} with blocks {' '.join(map(str, add.block_ids))}{cached}"])
        line("fork", (f"{rows[target]} in row {target} from {rows[source]}" for source, target, _ in plan.forks))
        line("append", (f"{self._word(token)} to {rows[row]}" for row, token in zip(plan.append_rows, plan.append_ids, strict=True)))
        line("grow", (f"{rows[row]} by block {block}" for row, block in zip(plan.grow_rows, plan.grow_block_ids, strict=True)))
        line("hold", (rows[row] for row in plan.hold_rows if row >= 0 and not _is_beam(sequences[row])))
        line("release", (rows[~row] for row in plan.hold_rows if row < 0))
        line("copy", (f"block {source} to {target} for {rows[row]}" for row, source, target in plan.cow))
        line("swap in", (f"cpu {cpu} to {gpu} (copy {copy_id})" for copy_id, gpu, cpu in plan.swap_in))
        line("wait for", (f"copy {copy_id}" for copy_id in plan.wait_copies))
        line("prefill", (f"{rows[chunk.row]} {_span(chunk.start, chunk.start + chunk.count)}" for chunk in plan.chunks))
        line("decode", (self._decoded(row, sequences[row]) for row in sorted(self._sticky - self._held)))
        line("propose", (rows[row] for _, row in plan.samples if _is_beam(sequences[row])))
        drawn = [(source, row) for source, row in plan.samples if not _is_beam(sequences[row])]
        line("sample", (rows[row] if source == row else f"{rows[row]} from {rows[source]}" for source, row in drawn))
        self._sticky |= {row for _, row in plan.samples}
        line("swap out", (f"{gpu} to cpu {cpu} (copy {copy_id})" for copy_id, gpu, cpu in plan.swap_out))
        return lines

    def _change_rows(self, plan: StepPlan, sequences: Mapping[int, Sequence]) -> None:
        for row in plan.remove_rows:
            del self._rows[row]
            self._sticky.discard(row)
            self._held.discard(row)
        for row in [*self._rows, *(add.row for add in plan.add_rows), *(target for _, target, _ in plan.forks)]:
            self._rows[row] = self._name(sequences[row])  # known ones too: beams change places
        self._sticky |= {target for source, target, _ in plan.forks if source in self._sticky}
        self._held |= {row for row in plan.hold_rows if row >= 0}
        self._held -= {~row for row in plan.hold_rows if row < 0}

    def _decoded(self, row: int, sequence: Sequence) -> str:
        position = sequence.num_planned - 1
        return f"{self._rows[row]} token {position} in block {sequence.block_table[position // self._block_size]}"


def _is_beam(sequence: Sequence) -> bool:
    return sequence.request.beam is not None


def _span(start: int, end: int) -> str:
    return f"token {start}" if end - start == 1 else f"tokens {start}-{end - 1}"
