"""values.schema.json, values.yaml and the config model say the same."""

import json
import subprocess
import sys
from dataclasses import fields
from typing import Any

import yaml
from helm_chart import CHART

from quire.common.config import ModelConfig, ServeConfig

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
TOOL = CHART.parents[1] / "tools" / "chart_files.py"


def test_schema_and_copies_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "-P", TOOL, "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_setting_of_the_command_line_is_a_value_or_the_charts_own() -> None:
    settings = SCHEMA["properties"]["config"]["properties"] | SCHEMA["properties"]["models"]["items"]["properties"]["config"]["properties"]
    missing = {f.name for cls in (ServeConfig, ModelConfig) for f in fields(cls)} - settings.keys()
    assert missing >= {"models", "listen", "insecure", "token_file", "tls_cert", "tls_key", "tls_client_ca", "model", "name", "groups"}
    assert missing <= {"models", "listen", "insecure", "token_file", "tls_cert", "tls_key", "tls_client_ca", "model", "name", "groups"} | {
        "metrics_listen",
        "controller_metrics_listen",
        "gateways",
    }


def test_every_value_that_may_be_set_stands_in_values_yaml() -> None:
    """So that `helm show values` is the whole reference; settings of `config:` are listed by `quire serve --help`."""

    def names(schema: dict[str, Any], path: str = "") -> set[str]:
        if schema.get("type") == "array" and "properties" in schema["items"]:
            return names(schema["items"], f"{path}[]")
        if "properties" not in schema or path.endswith("config"):
            return {path}
        return {name for key, part in schema["properties"].items() for name in names(part, f"{path}.{key}")}

    def there(values: Any, path: str) -> bool:
        for key in path.split("."):
            if key.endswith("[]"):
                values = values[key.removesuffix("[]")][0]
            elif key:
                if key not in values:
                    return False
                values = values[key]
        return True

    assert {path for path in names(SCHEMA) if not there(VALUES, path)} == set()
