"""Rules, alerts, dashboards and their pages fit each other and the list of metrics. test_prometheus.py tries them on a live cluster."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest
import yaml
from monitoring import CHECKOUT, FOREIGN, PROMETHEUS, RULE_FILES, boards, expressions, metric_of, panels, rules, selectors

from quire.common.metric_names import METRICS

# It comes with Prometheus, which .ci/run installs; `make test` runs without.
needs_promtool = pytest.mark.slow

OBSERVE = CHECKOUT / "docs" / "observe.md"


def _promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_takes_the_configuration_and_the_rules() -> None:
    _promtool("check", "config", "prometheus.yml")
    _promtool("check", "rules", *RULE_FILES)


@needs_promtool
def test_the_rules_do_what_their_tests_say() -> None:
    _promtool("test", "rules", "alerts_test.yml")


def test_every_rule_has_a_test() -> None:
    cases = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in cases for case in test["alert_rule_test"] if case["exp_alerts"]}
    asked = " ".join(case["expr"] for test in cases for case in test.get("promql_expr_test", ()))
    assert [rule["alert"] for rule in rules() if "alert" in rule and rule["alert"] not in fired] == []
    assert [rule["record"] for rule in rules() if "record" in rule and rule["record"] not in asked] == []


def test_every_alert_says_how_bad_it_is_and_has_a_page_for_the_night() -> None:
    for rule in rules():
        if "alert" not in rule:
            continue
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
        page = CHECKOUT / rule["annotations"]["runbook_url"]
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# {rule['alert']}\n"), page
        for heading in ("## What it means", "## Look", "## Do", "## Afterwards"):
            assert f"\n{heading}\n" in text, (page.name, heading)


def test_every_page_belongs_to_an_alert() -> None:
    named = {Path(rule["annotations"]["runbook_url"]).name for rule in rules() if "alert" in rule}
    assert {path.name for path in (CHECKOUT / "docs/runbooks").glob("*.md")} == named


def test_the_dashboards_are_what_the_script_makes() -> None:
    script = runpy.run_path(str(CHECKOUT / "tools/make_dashboards.py"))
    made = {f"{board.name}.json": script["build"](board) for board in script["BOARDS"]}
    kept = {path.name: path.read_text() for path in (CHECKOUT / "deploy/grafana").glob("*.json")}
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == [], "run python tools/make_dashboards.py"


def test_every_panel_says_what_it_shows() -> None:
    for name, board in boards().items():
        titles = [panel["title"] for panel in panels(board)]
        assert len(set(titles)) == len(titles), name
        for panel in panels(board):
            assert panel["description"], (name, panel["title"])
            assert panel["fieldConfig"]["defaults"]["unit"], (name, panel["title"])
            assert panel["datasource"]["uid"] == "${datasource}", (name, panel["title"])


@needs_promtool
def test_every_expression_parses(tmp_path: Path) -> None:
    parsed = [{"record": f"x:expression_{index}:y", "expr": expression} for index, expression in enumerate(expressions().values())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "x", "rules": parsed}]}))
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_expressions_read_only_metrics_that_there_are() -> None:
    known = METRICS.keys() | FOREIGN | {rule["record"] for rule in rules() if "record" in rule}
    unknown = {where: read for where, text in expressions().items() if (read := {metric_of(s) for s in selectors(text)} - known)}
    assert unknown == {}


def test_every_metric_is_on_a_dashboard_or_in_a_rule() -> None:
    read = {metric_of(selector) for text in expressions().values() for selector in selectors(text)}
    assert sorted(METRICS.keys() - read) == []


def test_every_metric_is_explained_and_no_other() -> None:
    explained = set(re.findall(r"^\| `(quire_[a-z_]+)`", OBSERVE.read_text(encoding="utf-8"), re.MULTILINE))
    assert explained == METRICS.keys()
