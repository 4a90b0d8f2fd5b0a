"""The golden scripts: what each command prints is what the script says that it prints.

QUIRE_REWRITE_SCRIPTS=1 pytest tests/cluster/scheduler/test_scripts.py     writes down what they print now; read the difference
"""

import difflib
import os
from pathlib import Path
from typing import Final

import pytest
from story_script import perform

SCRIPTS: Final = Path(__file__).parent / "scripts"
REWRITE: Final = "QUIRE_REWRITE_SCRIPTS"

# The PagedAttention paper's own block tables, which no rewriting may lose: lines of a script, in this order.
FIGURES: Final = {
    "figure_6": ["A  7 1", "  grow     A by block 3", "A  7 1 3"],
    "figure_8": ["A.0  7 1", "A.1  7 1", "block 1 is held 2 times", "  copy     block 1 to 3 for A.0", "A.0  7 3", "A.1  7 1"],
    "figure_9": [
        "B.0  0 1 3 5",
        "B.1  0 1 3 6",
        "B.2  0 1 3 7",
        "B.3  0 2 4 8",
        "given back: 2 4 5 8",
        "B.0  0 1 3 6 9",
        "B.1  0 1 3 6 10",
        "B.2  0 1 3 7 11",
        "B.3  0 1 3 7 12",
        "handed out: 9 10 11 12",
    ],
}


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.txt")), ids=lambda path: path.stem)
def test_a_script_comes_true(path: Path) -> None:
    script = path.read_text(encoding="utf-8")
    performed = perform(script)
    if performed != script and os.environ.get(REWRITE):
        path.write_text(performed, encoding="utf-8")
        pytest.fail(f"{path.name} is rewritten; read the difference before you commit it")
    assert performed == script, _difference(script, performed)


@pytest.mark.parametrize("figure", FIGURES)
def test_the_block_tables_of_the_papers_figures_stand_in_their_scripts(figure: str) -> None:
    lines = iter((SCRIPTS / f"{figure}.txt").read_text(encoding="utf-8").splitlines())
    missing = [line for line in FIGURES[figure] if line not in lines]  # each search goes on behind the line found last
    assert missing == []


def test_a_script_that_does_not_tell_the_truth_is_found() -> None:
    script = (SCRIPTS / "figure_6.txt").read_text(encoding="utf-8")
    lie = script.replace("A  7 1 3", "A  7 1 4")
    assert lie != script
    assert perform(lie) == script
    assert "-A  7 1 4\n+A  7 1 3" in _difference(lie, perform(lie))


def _difference(script: str, performed: str) -> str:
    lines = difflib.unified_diff(script.splitlines(), performed.splitlines(), "the script says", "it happens", lineterm="")
    return "\n".join(["", *lines, f"if what happens is right: {REWRITE}=1"])
