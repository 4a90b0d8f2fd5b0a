"""A Ray actor that starts one child process where Ray places it, and watches it. Used for the scheduler and for each rank.

The child is a process of its own so that no thread of Ray's runs beside a hot loop. It dies with this actor, however the
actor dies (common/child_process.py).
"""

import asyncio
import shutil
import signal
from pathlib import Path
from typing import Any, Final

import ray

from quire.cluster.controller.desired_state import has_state
from quire.cluster.controller.listen_address import free_port_pair
from quire.common.child_process import Child, start_child, stop_child
from quire.common.early_child import adopt_child

# What `wait` says of a child that SIGSTOP holds. Time-outs of steps would find it out too, but must allow for busy machines.
STOPPED: Final = -int(signal.SIGSTOP)
# How often is looked, and how often in a row it must be found stopped.
STOPPED_POLL_S: Final = 0.5
MAX_STOPPED_LOOKS: Final = 3


class _ProcessActor:
    """All methods run on the actor's one event loop, whose thread lives as long as the actor: the child's life hangs on it."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._report_path: str | None = None
        self._starting = asyncio.Lock()  # whoever asks for the child waits until it is known which one it is
        self._is_ended = False

    async def start(
        self, module: str, spec: dict[str, Any], log_path: str, environ: dict[str, str] | None = None, early: tuple[str, str] | None = None
    ) -> int:
        """Start `python -m module`; its process id, 0 if it was ended before it began. Its output is appended to `log_path`, on its own
        host.

        environ: variables that it has beside those of the actor, or instead of them
        early: folder and names of children that may be there already, of which one is taken instead
        """
        async with self._starting:
            return await self._start(module, spec, log_path, environ, early)

    async def _start(
        self, module: str, spec: dict[str, Any], log_path: str, environ: dict[str, str] | None, early: tuple[str, str] | None
    ) -> int:
        assert self._child is None, "one actor holds one child"
        self._report_path = spec.get("report_path") or None
        logs = Path(log_path).parent
        logs.parent.mkdir(mode=0o700, exist_ok=True)  # on a host where the controller is not
        logs.mkdir(exist_ok=True)
        if early is not None:
            self._child = await asyncio.to_thread(adopt_child, Path(early[0]), early[1], spec, log_path=Path(log_path))
        if self._child is None:
            if self._is_ended:
                return 0
            self._child = start_child(module, spec, log_path=Path(log_path), environ=environ)
        return self._child.pid

    async def meeting_place(self) -> tuple[str, str]:
        """The address of this host in Ray's network, and HOST:PORT of a port that is free there."""
        host = ray.util.get_node_ip_address()
        return host, f"{host}:{free_port_pair(host)}"

    async def gpus(self) -> list[str]:
        """The GPUs that Ray gave this actor, as CUDA names them."""
        return [str(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids()["GPU"]]

    async def pid(self) -> int | None:
        """The process id of the child, dead or alive; None if none was started."""
        async with self._starting:
            return None if self._child is None else self._child.pid

    async def wait(self) -> int:
        """Wait for the child's end; its exit code, negative for a signal. STOPPED when it has been stopped for a while: it lives, but
        only whoever stopped it knows for how long."""
        if self._child is None:
            assert self._is_ended, "start comes before wait"
            return 0
        end = asyncio.get_running_loop().run_in_executor(None, self._child.wait)
        num_looks = 0
        while num_looks < MAX_STOPPED_LOOKS:
            done, _ = await asyncio.wait([end], timeout=STOPPED_POLL_S)
            if done:
                return end.result()
            num_looks = num_looks + 1 if await asyncio.to_thread(is_stopped, self._child.pid) else 0
        return STOPPED

    async def report(self) -> str:
        """What the child left at its report_path, on its own host; "" if nothing."""
        return await asyncio.to_thread(_read, self._report_path)

    async def remove_folder(self, folder: str) -> None:
        """Remove a run's folder from this host, unless its controller is here, which does so by itself."""
        if not has_state(Path(folder)):
            shutil.rmtree(folder, ignore_errors=True)

    async def stop(self) -> int | None:
        """End the child in order; its exit code, None if none was started."""
        self._is_ended = True
        async with self._starting:
            if self._child is None:
                return None
        return await asyncio.get_running_loop().run_in_executor(None, stop_child, self._child)

    async def kill(self) -> int | None:
        """End the child at once, whatever it does, stopped ones included; its exit code, None if none was started."""
        self._is_ended = True
        async with self._starting:
            if self._child is None:
                return None
        self._child.kill()
        return await asyncio.get_running_loop().run_in_executor(None, self._child.wait)


def is_stopped(pid: int) -> bool:
    """Whether a process is held by SIGSTOP or the like; one that a debugger looks at is not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] == "T"


def _read(path: str | None) -> str:
    try:
        return "" if path is None else Path(path).read_text()
    except OSError:
        return ""


# max_restarts and max_task_retries stay 0: Ray restarts single actors, never a gang, and it would start a child twice.
# num_cpus is 0 because the placement group's bundle, not this actor, stands for what the child uses.
ProcessActor = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(_ProcessActor)
