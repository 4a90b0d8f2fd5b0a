"""docs/operate.md says of the chart what is so."""

import re
from pathlib import Path
from typing import Any

import yaml
from helm_chart import CHART, render

TEXT = (Path(__file__).parents[2] / "docs" / "operate.md").read_text()
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())


def named(path: str) -> bool:
    """Whether values.yaml has a value of this path."""
    values: Any = VALUES
    for key in re.sub(r"\[(\d)\]", r".\1", path).split("."):
        if isinstance(values, list):
            values = values[int(key)]
        elif isinstance(values, dict) and key in values:
            values = values[key]
        else:
            return False
    return True


def test_the_example_values_are_taken() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    rendered = render(yaml.safe_load(block) | {"security": {"insecure": True}})
    assert rendered.one("Deployment")["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2


def test_values_that_are_named_exist() -> None:
    set_flags = re.findall(r"--set ([\w.\[\]]+)=", TEXT)
    mentioned = re.findall(r"`((?:gateway|ray|security|models\[0\]|huggingFace|monitoring|tests|networkPolicy|config)\.[\w.\[\]]+)`", TEXT)
    assert len(set_flags) >= 5
    assert len(mentioned) >= 5
    assert [path for path in {*set_flags, *mentioned} if not named(path)] == []


def test_files_that_are_named_exist() -> None:
    root = Path(__file__).parents[2]
    paths = set(re.findall(r"(?:deploy|helm|tests)/[\w./-]+", TEXT))
    assert [path for path in paths if not (root / path.rstrip(".")).exists()] == []
