"""The picture in the README says what the tables say."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
TOOL = CHECKOUT / "tools/draw_performance.py"


def test_the_picture_is_that_of_the_tables() -> None:
    result = subprocess.run([sys.executable, "-P", str(TOOL), "--check"], check=False)
    assert result.returncode == 0, "run python tools/draw_performance.py"
    picture = ElementTree.parse(CHECKOUT / "docs/performance.svg")
    bars = [rect for rect in picture.iter() if rect.tag.endswith("rect")]
    assert len(bars) == 30, "of every row that vLLM has, a bar"


@pytest.mark.parametrize(
    ("row", "times"), [("x decode, ms, 1 x 2 | **2.0, 3.0** | 5.0", "2.00"), ("x prefill, thousand tokens/s | 30 | 40", "0.75")]
)
def test_times_and_rates_are_both_speeds(row: str, times: str) -> None:
    command = f"""
import runpy, sys
tool = runpy.run_path({str(TOOL)!r})
text = "## The worker on a GPU\\n\\n| | Quire | vLLM | floor |\\n|---|---|---|---|\\n| {row} | |\\n"
print([f"{{bar.times:.2f}}" for bar in tool["bars"](text, "## The worker on a GPU")])
"""
    result = subprocess.run([sys.executable, "-P", "-c", command], check=True, stdout=subprocess.PIPE, text=True)
    assert result.stdout.strip() == f"['{times}']"
