"""The README's table names tests that exist, for each mechanism of the paper that the scheduler is to have."""

import ast
import re
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
MECHANISMS: Final = ["M2", "M3", *(f"M{number}" for number in range(5, 13))]
# file::test, and the script in brackets
_TEST: Final = re.compile(r"`(\w+\.py)::(\w+)(?:\[(\w+)\])?`")


def test_each_mechanism_of_the_paper_names_tests_that_exist() -> None:
    rows = re.findall(r"^\| (M\d+) \|(.*)\|$", (HERE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [mechanism for mechanism, _ in rows] == MECHANISMS
    for mechanism, row in rows:
        tests = _TEST.findall(row)
        assert tests, f"{mechanism} names no test"
        for file, name, script in tests:
            assert name in functions_of(HERE / file), f"{mechanism}: {file} has no {name}"
            assert not script or (HERE / "scripts" / f"{script}.txt").is_file(), f"{mechanism}: there is no script {script}"


def functions_of(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}
