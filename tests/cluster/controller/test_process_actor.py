"""What the actor of a scheduler or rank sees of its child, without Ray around it."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import wait_for

from quire.cluster.controller import process_actor
from quire.cluster.controller.process_actor import STOPPED, _ProcessActor, is_stopped
from quire.common.early_child import early_path, start_early


@pytest.fixture
async def actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(process_actor, "STOPPED_POLL_S", 0.05)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    actor = _ProcessActor()
    await actor.start("sleeping_child", {"seconds": 60, "report_path": str(tmp_path / "report")}, str(tmp_path / "run" / "logs" / "log"))
    yield actor
    await actor.kill()


async def test_a_child_that_is_stopped_is_told_of_and_one_that_goes_on_in_time_is_not(actor: _ProcessActor) -> None:
    pid = await actor.pid()
    assert pid is not None
    waiting = asyncio.ensure_future(actor.wait())
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(0.06)
    os.kill(pid, signal.SIGCONT)
    await asyncio.sleep(0.4)
    assert not waiting.done()
    os.kill(pid, signal.SIGSTOP)
    assert await asyncio.wait_for(waiting, 10) == STOPPED
    assert is_stopped(pid)


async def test_a_child_that_ends_is_told_of_by_its_code(actor: _ProcessActor) -> None:
    pid = await actor.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert await asyncio.wait_for(actor.wait(), 10) == -signal.SIGKILL
    assert not is_stopped(pid)


async def test_one_that_is_ended_before_its_child_is_known_starts_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An early child that does not answer keeps it waiting."""
    monkeypatch.setattr("quire.common.early_child.ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr("quire.common.early_child.END_TIMEOUT_S", 0.1)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    path = early_path(tmp_path, "cpu-0")
    spec = {"name": "early", "kind": "sleeper", "until": "/nowhere", "code": 0}
    early = start_early("early_sleeper", spec, path=path, log_path=tmp_path / "early.log", environ={})
    await asyncio.to_thread(wait_for, path.exists, timeout_s=20)
    os.kill(early.pid, signal.SIGSTOP)
    await asyncio.to_thread(wait_for, lambda: is_stopped(early.pid), timeout_s=20)
    actor = _ProcessActor()
    starting = asyncio.ensure_future(actor.start("early_sleeper", spec, str(tmp_path / "logs" / "log"), None, (str(tmp_path), "cpu-*")))
    await asyncio.sleep(0)
    assert await actor.kill() is None
    assert await starting == 0
    assert (await actor.pid(), await actor.wait()) == (None, 0)
    assert early.wait(20) == -signal.SIGKILL


async def test_the_report_of_a_child_is_read_on_its_host_and_its_folder_is_removed_there(actor: _ProcessActor, tmp_path: Path) -> None:
    assert await actor.report() == ""
    (tmp_path / "report").write_text("why")
    assert await actor.report() == "why"
    assert (tmp_path / "run" / "logs" / "log").exists()
    (tmp_path / "run" / "controller.json").touch()
    await actor.remove_folder(str(tmp_path / "run"))
    assert (tmp_path / "run").exists(), "the controller's own folder is its own to remove"
    (tmp_path / "run" / "controller.json").unlink()
    await actor.remove_folder(str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
