"""What is printed after an install: its commands work."""

import argparse
import shlex

import pytest
from helm_chart import render, value_sets

from quire.cli import generate

CASES = value_sets()


def commands(notes: str) -> list[list[str]]:
    """The indented lines, without what the shell does with them."""
    lines = [line for line in notes.splitlines() if line.startswith("  ")]
    return [shlex.split(line.partition(" >")[0].removesuffix("&")) for line in lines]


@pytest.mark.parametrize("name", CASES)
def test_every_command_names_what_is_there(name: str) -> None:
    rendered = render(CASES[name])
    found = commands(rendered.notes)
    assert [words[0] for words in found if words[0] != "kubectl"] == ["quire", "helm"]
    there = {f"{item['kind'].lower()}/{item['metadata']['name']}" for item in rendered.objects}
    for words in found:
        if words[0] == "kubectl":
            assert words[1:3] == ["--namespace", "llm"]
            assert words[3] == "get" or next(word for word in words if "/" in word) in there
        if words[0] == "helm":
            assert words == ["helm", "--namespace", "llm", "test", "demo"]


@pytest.mark.parametrize("name", CASES)
def test_the_first_request_is_one_that_the_program_reads(name: str) -> None:
    (words,) = [words for words in commands(render(CASES[name]).notes) if words[0] == "quire"]
    assert words[1] == "generate"
    parser = argparse.ArgumentParser(allow_abbrev=False)
    generate.add_arguments(parser)
    args = parser.parse_args(words[2:])
    security = CASES[name]["security"]
    assert (args.api_key_file is not None, args.tls_ca is not None) == ("tokens" in security, "tls" in security)


def test_what_is_weak_is_said() -> None:
    assert "WARNING: security.insecure" in render(CASES["demo"]).notes
    assert "WARNING" not in render(CASES["secure"]).notes
    assert "ray.gcsFaultTolerance keeps it in Redis" in render(CASES["gpu"]).notes
    assert "gcsFaultTolerance" not in render(CASES["multi-host"]).notes
    assert "asks for health alone" in render(CASES["mutual-tls"]).notes
