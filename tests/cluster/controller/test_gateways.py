"""Gateway processes that share an address: real processes and sockets, and a clock that the test moves."""

import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from fake_scheduler import FakeController, FakeScheduler, Script, demo_files
from gateway_parts import LIMITS, until

from quire.cluster.controller.gateways import GatewayLife, Gateways, hold_address
from quire.cluster.controller.groups import MAX_RESTARTS_IN_A_ROW, STEADY_S
from quire.common.errors import ConfigError, Unavailable
from quire.v1.inference_pb2 import GenerateRequest
from quire.v1.inference_pb2_grpc import InferenceServiceStub

START_TIMEOUT_S = 30.0


def life(**known: float) -> GatewayLife:
    return GatewayLife(0, was_ready=True, **known)  # type: ignore[arg-type]  # all are times


def test_pauses_double_and_have_an_end() -> None:
    one = life(ready_at_s=0.0)
    pauses = []
    while (pause_s := one.die("it fell", now_s=1.0)) is not None:
        pauses.append(pause_s)
        one.ready_at_s = 1.0
    assert pauses == [0, 1, 2, 4, 8, 16]
    assert (one.reason, one.restart_at_s) == ("it fell", 1.0 + 16)


def test_one_that_served_for_a_while_has_failed_once() -> None:
    one = life(ready_at_s=10.0)
    one.num_failures = MAX_RESTARTS_IN_A_ROW
    assert one.die("it fell", now_s=10.0 + STEADY_S) == 0
    assert (one.num_failures, one.ready_at_s) == (1, None)


def test_one_that_never_served_is_not_started_anew() -> None:
    one = GatewayLife(0)
    assert one.die("no such file", now_s=1.0) is None
    assert one.reason == "no such file"


class Fleet:
    """Gateways between a fake scheduler and a fake controller, and the time that they are told."""

    def __init__(self, gateways: Gateways) -> None:
        self.gateways = gateways
        self.now_s = 1000.0

    async def until(self, condition: Callable[[], bool]) -> None:
        def holds() -> bool:
            self.gateways.tend(self.now_s)
            return condition()

        await until(holds, timeout_s=START_TIMEOUT_S)

    async def ready(self) -> str:
        await self.until(lambda: self.gateways.address is not None)
        assert self.gateways.address is not None
        return self.gateways.address

    async def kill(self, index: int) -> None:
        """Kill one, and wait until its death is known."""
        process = self.gateways.lives[index].process
        assert process is not None
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.gateways.tend(self.now_s)


@contextlib.asynccontextmanager
async def fleet(tmp_path: Path, count: int, *, listen: str = "127.0.0.1:0", **spec: str) -> AsyncIterator[Fleet]:
    scheduler = FakeScheduler(script=lambda _: Script([5, 0]), limits=LIMITS)
    async with scheduler, FakeController(scheduler.address) as controller:
        controller.serve(demo_files())
        spec_of_all = {"discovery_address": controller.address, **spec}
        gateways = Gateways(spec_of_all, listen=listen, count=count, folder=tmp_path, logs=tmp_path)
        gateways.start()
        try:
            yield Fleet(gateways)
        finally:
            gateways.stop(drain_timeout_s=1, at_once=lambda: False)


async def answers(address: str) -> bool:
    """Whether a new connection gets an answer."""
    async with grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        answer = await InferenceServiceStub(channel).Generate(GenerateRequest(text="x"), timeout=10)
        return list(answer.completions[0].token_ids) == [5, 0]


async def test_one_address_is_answered_as_long_as_one_of_them_lives(tmp_path: Path) -> None:
    async with fleet(tmp_path, 2) as running:
        address = await running.ready()
        for _ in range(8):
            assert await answers(address)
        await running.kill(0)
        for _ in range(8):
            assert await answers(address)
        assert running.gateways.address is None, "not all of them serve"
        running.gateways.tend(running.now_s)  # the first pause is 0
        assert await running.ready() == address
        await running.kill(1)
        assert await answers(address)


async def test_one_that_dies_again_and_again_is_given_up_and_the_other_goes_on(tmp_path: Path) -> None:
    async with fleet(tmp_path, 2) as running:
        address = await running.ready()
        for deaths in range(1 + MAX_RESTARTS_IN_A_ROW):
            await running.kill(0)
            if deaths < MAX_RESTARTS_IN_A_ROW:
                running.now_s += 16
                await running.until(lambda: running.gateways.lives[0].process is not None)
        assert await running.ready() == address, "the one that is given up is not waited for"
        assert await answers(address)
        running.now_s += 3600
        running.gateways.tend(running.now_s)
        assert [one.process is None for one in running.gateways.lives] == [True, False]


async def test_settings_that_no_gateway_can_start_with_are_named(tmp_path: Path) -> None:
    async with fleet(tmp_path, 2, token_file=str(tmp_path / "nowhere")) as running:
        with pytest.raises(Unavailable, match=r"the gateway cannot start: .*nowhere"):
            await running.ready()


def test_an_address_that_another_program_has_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot listen on {listen}: .*; choose another"):
            hold_address(listen)


def test_a_free_port_is_the_same_for_every_address_of_a_name() -> None:
    held = hold_address("localhost:0")
    assert len({holder.getsockname()[1] for holder in held}) == 1
    for holder in held:
        holder.close()
