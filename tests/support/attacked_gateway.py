"""A gateway process under attack: an honest client is answered all the while, and the process is measured from outside."""

import asyncio
import contextlib
import os
import resource
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from fake_scheduler import FakeController, FakeScheduler, Script, demo_files
from gateway_parts import LIMITS, read_report, until

from quire.common.child_process import start_child, stop_child
from quire.common.messages import Cancel, Submit
from quire.v1.inference_pb2 import GenerateRequest, StoppingParams
from quire.v1.inference_pb2_grpc import InferenceServiceStub

CANARY: Final = GenerateRequest(text="Once", stopping=StoppingParams(max_tokens=2))
CANARY_IDS: Final = [5, 0]
ENDLESS_SCRIPT: Final = Script([5], ends=False)
# A canary that gets no answer for so long has none.
CANARY_TIMEOUT_S: Final = 30.0
CANARY_PAUSE_S: Final = 0.05
START_TIMEOUT_S: Final = 30.0


@dataclass(repr=False)
class AttackedGateway:
    """What a test looks at."""

    process: "subprocess.Popen[bytes]"
    scheduler: FakeScheduler
    address: str
    log_path: Path
    num_canaries: int = 0
    longest_s: float = 0.0  # of the canaries
    most_fds: int = 0
    most_bytes: int = 0
    is_over: bool = False

    def __repr__(self) -> str:
        return (
            f"{self.num_canaries} canaries, the longest {self.longest_s:.3f} s; {self.most_fds} files, {self.most_bytes / 2**20:.0f} MiB; "
            f"{len(self.submits_of_attackers())} submits of attackers"
        )

    def num_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def submits_of_attackers(self) -> list[Submit]:
        return [submit for submit in self.scheduler.of_kind(Submit) if not is_canary(submit)]

    def are_all_cancelled(self) -> bool:
        """Whether nothing that attackers asked for goes on."""
        cancelled = {cancel.request_id for cancel in self.scheduler.of_kind(Cancel)}
        return all(submit.request_id in cancelled for submit in self.submits_of_attackers())

    async def sing(self, stub: Any) -> None:
        while not self.is_over:
            start_s = time.monotonic()
            answer = await stub.Generate(CANARY, timeout=CANARY_TIMEOUT_S)
            assert list(answer.completions[0].token_ids) == CANARY_IDS
            self.longest_s = max(self.longest_s, time.monotonic() - start_s)
            self.num_canaries += 1
            self.most_fds = max(self.most_fds, self.num_fds())
            self.most_bytes = max(self.most_bytes, self.resident_bytes())
            await asyncio.sleep(CANARY_PAUSE_S)


@contextlib.asynccontextmanager
async def attacked_gateway(
    tmp_path: Path, *, bounds: dict[str, Any] | None = None, endless: Script = ENDLESS_SCRIPT, **settings: Any
) -> AsyncIterator[AttackedGateway]:
    """A gateway process whose canary, on a connection from before the attack, is answered again and again until the attack is over.

    endless: what requests of attackers are answered
    bounds, settings: of the gateway

    Afterwards a new client must get in, and nothing of the attack may be left: no call at the scheduler, no open file.
    """
    report, log_path = tmp_path / "report.json", tmp_path / "gateway.log"
    support = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [support, os.environ.get("PYTHONPATH")]))
    scheduler = FakeScheduler(script=lambda submit: Script(CANARY_IDS) if is_canary(submit) else endless, limits=LIMITS)
    async with scheduler, FakeController(scheduler.address) as controller:
        controller.serve(demo_files())
        spec = {
            "listen": "127.0.0.1:0",
            "discovery_address": controller.address,
            "report_path": str(report),
            "bounds": bounds or {},
            **settings,
        }
        process = start_child("bounded_gateway", spec, log_path=log_path, environ={"PYTHONPATH": path})
        exit_code = 0
        try:
            await until(lambda: report.exists() or process.poll() is not None, timeout_s=START_TIMEOUT_S)
            address = (read_report(report) or {})["address"]
            gateway = AttackedGateway(process, scheduler, address, log_path)
            async with open_channel(address, settings) as channel:
                canary = asyncio.create_task(gateway.sing(InferenceServiceStub(channel)))
                await until(lambda: canary.done() or gateway.num_canaries > 0, timeout_s=CANARY_TIMEOUT_S)
                num_fds_before = gateway.num_fds()
                try:
                    yield gateway
                    num_before = gateway.num_canaries
                    await until(lambda: canary.done() or gateway.num_canaries > num_before + 1, timeout_s=CANARY_TIMEOUT_S)
                finally:
                    gateway.is_over = True
                    await canary
            async with open_channel(address, settings) as channel:
                await InferenceServiceStub(channel).Generate(CANARY, timeout=CANARY_TIMEOUT_S, wait_for_ready=True)
            await until(gateway.are_all_cancelled, timeout_s=30)
            await until(lambda: gateway.num_fds() <= num_fds_before, timeout_s=30)
            assert "Traceback" not in log_path.read_text(), log_path.read_text()[-2000:]
        finally:
            exit_code = stop_child(process)
        print(gateway)  # shown with a failure, or by pytest -s
        assert exit_code == 0, f"the gateway ended with {exit_code}: {log_path.read_text()[-2000:]}"


def is_canary(submit: Submit) -> bool:
    return submit.max_tokens == CANARY.stopping.max_tokens


def open_channel(address: str, settings: dict[str, Any]) -> grpc.aio.Channel:
    """With TLS if the gateway has it."""
    if "tls_cert" not in settings:
        return grpc.aio.insecure_channel(address)
    credentials = grpc.ssl_channel_credentials(Path(settings["tls_cert"]).read_bytes())
    return grpc.aio.secure_channel(address.replace("127.0.0.1", "localhost"), credentials)
