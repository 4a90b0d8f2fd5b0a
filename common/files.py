"""Files that another process waits for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json_atomically(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object so that whoever sees the file sees all of it. The last of two writers wins."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(dict(values)))
    part.replace(path)
