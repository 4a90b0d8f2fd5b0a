"""Draw docs/performance.svg from the tables of docs/performance.md that have a column for vLLM: how many times as fast Quire is.

python tools/draw_performance.py [--check]

With --check nothing is written; the exit code says whether the picture is that of the tables.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

DOCS: Final = Path(__file__).resolve().parents[1] / "docs"
# Headings of the sections with such a table, and what is written over their bars.
SECTIONS: Final = {"## The worker on a GPU": "one NVIDIA H200", "## Two GPUs, tensor parallel 2": "two NVIDIA H200, tensor parallel 2"}
_ROW_PX: Final = 20
_LABEL_PX: Final = 250
_PX_PER_TIMES: Final = 200
_WIDTH_PX: Final = 720
_FONT: Final = "font-family='system-ui, sans-serif' font-size='12'"


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    times: float  # as fast as vLLM


def bars(text: str, heading: str) -> Iterator[Bar]:
    """Of the rows of the first table of a section in which both have a number. Times of a rate and of a duration are both speeds."""
    section = text[text.index(heading) :].split("\n## ")[0]
    lines = section.splitlines()
    start = next(index for index, line in enumerate(lines) if re.match(r"\| *\| Quire \| vLLM \|", line))
    what, unit = "", ""
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        label, ours, theirs = (cell.strip() for cell in line.strip("|").split("|")[:3])
        case = label
        found = re.match(r"(.+?), (ms|s|thousand tokens/s)(?:, (.+)|)$", label)
        if found:
            what, unit, case = found[1], found[2], found[3] or ""
        numbers = [_numbers(cell) for cell in (ours, theirs)]
        if all(numbers):
            quire, vllm = (statistics.mean(each) for each in numbers)
            yield Bar(f"{what} {case}".strip(), quire / vllm if unit.startswith("thousand") else vllm / quire)


def draw(text: str) -> str:
    parts: list[str] = []
    top = 24
    for heading, title in SECTIONS.items():
        parts.append(f"<text x='0' y='{top}' fill='#57606a' font-weight='600'>{escape(title)}</text>")
        first = top + 10
        top = first
        for bar in bars(text, heading):
            length = bar.times * _PX_PER_TIMES
            colour = "#2f81f7" if bar.times >= 1 else "#8c959f"
            parts.append(f"<text x='{_LABEL_PX - 8}' y='{top + 14}' fill='#57606a' text-anchor='end'>{escape(bar.label)}</text>")
            parts.append(f"<rect x='{_LABEL_PX}' y='{top + 3}' width='{length:.0f}' height='{_ROW_PX - 6}' rx='2' fill='{colour}'/>")
            parts.append(f"<text x='{_LABEL_PX + max(length, _PX_PER_TIMES) + 6:.0f}' y='{top + 14}' fill='#57606a'>{bar.times:.2f}</text>")
            top += _ROW_PX
        line = _LABEL_PX + _PX_PER_TIMES
        parts.append(f"<line x1='{line}' y1='{first}' x2='{line}' y2='{top}' stroke='#d1242f' stroke-width='1.5'/>")
        top += 34
    note = "times as fast as vLLM 0.25.1 (red line); docs/performance.md has the numbers"
    parts.append(f"<text x='0' y='{top - 8}' fill='#57606a'>{note}</text>")
    head = f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH_PX}' height='{top}' viewBox='0 0 {_WIDTH_PX} {top}' {_FONT}>"
    return "\n".join([head, *parts, "</svg>", ""])


def _numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell)] if ";" not in cell else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the picture is not that of the tables")
    arguments = parser.parse_args()
    drawn, path = draw((DOCS / "performance.md").read_text()), DOCS / "performance.svg"
    if arguments.check:
        return int(not path.exists() or path.read_text() != drawn)
    path.write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
