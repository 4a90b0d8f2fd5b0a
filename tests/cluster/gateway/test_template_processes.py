"""Templates that run away: their process ends, the thread that asked is free again, and the next conversation is answered."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from quire.cluster.gateway.template_child import MAX_MEMORY_BYTES
from quire.cluster.gateway.template_processes import MAX_TEMPLATES, HostedTemplate, TemplateProcesses
from quire.common.errors import ConfigError, InvalidRequest, Unavailable

GOOD = {"default": "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"}


@pytest.fixture
def templates() -> Iterator[TemplateProcesses]:
    with TemplateProcesses(num_processes=1, reply_timeout_s=20.0) as processes:
        yield processes


def render(template: HostedTemplate, content: str = "x", **options: Any) -> str:
    settings = {"tools": None, "add_generation_prompt": True, "max_chars": 10_000} | options
    return template.render([{"role": "user", "content": content}], **settings)


RUNAWAYS = [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "CHAT_TEMPLATE_TIMEOUT", "processor time"),
    ("{% set m = messages[0].content|int %}{{ ((m ** m) ** m) is odd }}", "CHAT_TEMPLATE_TIMEOUT", "processor time"),
    ("{% set m = messages[0].content|int %}{{ ('x' * (m * m * m * m * m))|length }}", "CHAT_TEMPLATE_MEMORY", "of memory"),
    ("{{ messages[0].content.ljust(99999999999) }}", "CHAT_TEMPLATE_MEMORY", "of memory"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "CHAT_TEMPLATE_FAILED", "RecursionError"),
]


@pytest.mark.parametrize(("source", "reason", "words"), RUNAWAYS)
def test_what_a_template_may_take_is_limited_and_the_next_conversation_is_answered(
    templates: TemplateProcesses, source: str, reason: str, words: str
) -> None:
    bad, good = templates.load({"default": source}, {}), templates.load(GOOD, {})
    with pytest.raises(InvalidRequest, match=words) as refused:
        render(bad, "4321")
    assert refused.value.reason == reason
    assert "4321" not in refused.value.message
    assert render(good) == "user:x;"
    assert len(templates.idle_pids) == 1


def test_a_process_that_gets_no_processor_time_is_ended_by_the_clock() -> None:
    with TemplateProcesses(num_processes=1, reply_timeout_s=2.0) as templates:
        good = templates.load(GOOD, {})
        (pid,) = templates.idle_pids
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(Unavailable, match="within 2 s; this machine is busy") as refused:
            render(good)
        assert (refused.value.reason, refused.value.retry_after_s) == ("TEMPLATE_TIMEOUT", 1.0)
        assert not os.path.exists(f"/proc/{pid}")


def test_a_constant_that_takes_for_ever_is_found_when_the_template_is_compiled(templates: TemplateProcesses) -> None:
    with pytest.raises(ConfigError, match="when it is compiled") as refused:
        templates.load({"default": "{{ (7 ** (9 ** 9)) is odd }}"}, {})
    assert refused.value.reason == "CHAT_TEMPLATE_TIMEOUT"
    assert render(templates.load(GOOD, {})) == "user:x;"


def test_one_process_serves_many_models_and_a_killed_one_is_replaced(templates: TemplateProcesses) -> None:
    first, second = templates.load(GOOD, {}), templates.load({"default": "{{ bos_token }}{{ tools|tojson }}"}, {"bos_token": "<s>"})
    assert (first.takes_tools, second.takes_tools) == (False, True)
    assert (render(first), render(second, tools=[{"a": 1}])) == ("user:x;", '<s>[{"a": 1}]')
    (pid,) = templates.idle_pids
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    text = "😀" + "é" * 9000
    assert render(first, text) == f"user:{text};"
    assert templates.idle_pids != [pid]


def test_a_process_that_is_killed_at_work_is_not_the_conversations_fault(templates: TemplateProcesses) -> None:
    slow = templates.load({"default": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"}, {})
    (pid,) = templates.idle_pids
    killer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(Unavailable, match="ended from outside \\(signal 9\\); try again") as lost:
        render(slow)
    killer.join()
    assert lost.value.reason == "TEMPLATE_PROCESS_LOST"
    assert render(templates.load(GOOD, {})) == "user:x;"


def test_a_process_that_knows_many_templates_is_replaced(templates: TemplateProcesses) -> None:
    first = templates.load(GOOD, {})
    (pid,) = templates.idle_pids
    for number in range(MAX_TEMPLATES):
        templates.load({"default": f"{number}"}, {})
    assert templates.idle_pids != [pid]
    assert render(first) == "user:x;"


def test_the_process_is_small_and_loads_neither_torch_nor_a_tokenizer(templates: TemplateProcesses) -> None:
    code = (
        "import sys, quire.cluster.gateway.template_child; print([n for n in ('torch', 'ray', 'tokenizers', 'grpc') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    templates.load(GOOD, {})
    (pid,) = templates.idle_pids
    with open(f"/proc/{pid}/statm") as statm:
        num_pages = int(statm.read().split()[0])
    assert num_pages * os.sysconf("SC_PAGE_SIZE") < MAX_MEMORY_BYTES / 4


PARENT = """
import sys, time
from quire.cluster.gateway.template_processes import TemplateProcesses
templates = TemplateProcesses()
templates.load({"default": "x"}, {})
print(templates.idle_pids[0], flush=True)
time.sleep(60)
"""


def test_a_process_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline_s = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}") and _state(pid) != "Z":
        assert time.monotonic() < deadline_s, "it outlives its parent"
        time.sleep(0.05)


def test_after_close_no_process_is_started() -> None:
    templates = TemplateProcesses()
    good = templates.load(GOOD, {})
    (pid,) = templates.idle_pids
    templates.close()
    assert not os.path.exists(f"/proc/{pid}")
    with pytest.raises(Unavailable, match="stopping"):
        render(good)


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]
