"""Tokens, roles, tenants and quotas at a real server."""

import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_scheduler import FakeScheduler, Script
from gateway_parts import details_of, refusal, running_gateway
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire.cluster.gateway.tenants import Caller, Limits, Role
from quire.cluster.gateway.tokens import token_line
from quire.common.messages import Submit
from quire.v1 import cluster_pb2, inference_pb2

GENERATE = inference_pb2.GenerateRequest(text="Once", stopping=inference_pb2.StoppingParams(max_tokens=4))
NO_LIMITS = Limits()
USER, ADMIN = "quire_marker_of_a_user", "quire_marker_of_an_admin"


def token_file(tmp_path: Path, *, limits: Limits = NO_LIMITS) -> str:
    path = tmp_path / "tokens"
    path.write_text(f"{token_line(USER, Caller('acme', Role.USER, limits))}\n{token_line(ADMIN, Caller('ops', Role.ADMIN))}\n")
    return str(path)


def bearing(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def test_calls_without_a_known_token_are_refused_and_no_token_reaches_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with running_gateway(tmp_path, token_file=token_file(tmp_path)) as running:
        wrong = "quire_marker_of_nobody"
        cases = [
            (None, "NO_TOKEN"),
            (bearing(wrong), "UNKNOWN_TOKEN"),
            ((("authorization", USER),), "UNKNOWN_TOKEN"),
            ((("authorization", f"Basic {USER}"),), "UNKNOWN_TOKEN"),
            ((*bearing(USER), *bearing(wrong)), "UNKNOWN_TOKEN"),
        ]
        calls: list[tuple[Any, Any]] = [(running.inference.Generate, GENERATE), (running.inference.GenerateStream, GENERATE)]
        calls += [(running.inference.ListModels, inference_pb2.ListModelsRequest())]
        calls += [(running.cluster.ListGroups, cluster_pb2.ListGroupsRequest())]
        calls += [(health_pb2_grpc.HealthStub(running.channel).Watch, health_pb2.HealthCheckRequest())]
        for metadata, reason in cases:
            for method, request in calls:
                error = await refusal(method(request, metadata=metadata))
                assert (error.code(), details_of(error)[0].reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)
                assert "marker" not in (error.details() or "")
        assert await running.health() == "SERVING"
        assert running.scheduler.of_kind(Submit) == []
        answer = await running.inference.Generate(GENERATE, metadata=(("authorization", f"bEARER {USER}"),))
        assert answer.usage.prompt_token_count == 1
    assert "marker" not in caplog.text


async def test_only_admins_see_and_steer_the_cluster(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, token_file=token_file(tmp_path)) as running:
        drain = cluster_pb2.DrainGroupRequest(group_id="g")
        for method, request in ((running.cluster.ListGroups, cluster_pb2.ListGroupsRequest()), (running.cluster.DrainGroup, drain)):
            error = await refusal(method(request, metadata=bearing(USER)))
            assert (error.code(), details_of(error)[0].reason) == (grpc.StatusCode.PERMISSION_DENIED, "NOT_ADMIN")
        await running.cluster.ListGroups(cluster_pb2.ListGroupsRequest(), metadata=bearing(ADMIN))


async def test_tenants_share_neither_cached_prompts_nor_request_ids(tmp_path: Path) -> None:
    scheduler = FakeScheduler(script=lambda _: Script([*range(300, 310), 0], delay_s=0.02))
    async with running_gateway(tmp_path, scheduler=scheduler, token_file=token_file(tmp_path)) as running:
        request = inference_pb2.GenerateRequest(text="Once", request_id="same")
        calls = [running.inference.Generate(request, metadata=bearing(token)) for token in (USER, ADMIN)]
        answers = [await call for call in calls]
        assert [answer.request_id for answer in answers] == ["same", "same"]
        first, second = running.scheduler.of_kind(Submit)
        assert {first.tenant, second.tenant} == {"acme", "ops"}
        assert first.prompt_ids == second.prompt_ids
        assert first.cache_root != second.cache_root


async def test_a_tenant_past_its_quota_is_refused_with_a_delay_and_others_are_not(tmp_path: Path) -> None:
    limits = Limits(max_requests=1, tokens_per_minute=3)
    scheduler = FakeScheduler(script=lambda _: Script([*range(300, 330), 0], delay_s=0.02))
    async with running_gateway(tmp_path, scheduler=scheduler, token_file=token_file(tmp_path, limits=limits)) as running:
        request = inference_pb2.GenerateRequest(text="Once")
        stream = running.inference.GenerateStream(request, metadata=bearing(USER))
        await stream.read()
        error = await refusal(running.inference.Generate(request, metadata=bearing(USER)))
        info, _, delay_s = details_of(error)
        assert (error.code(), info.reason, delay_s) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS_OF_TENANT", 1.0)
        other = running.inference.Generate(request, metadata=bearing(ADMIN))
        while await stream.read() is not grpc.aio.EOF:
            pass
        assert (await other).usage.completion_token_count > 3
        error = await refusal(running.inference.Generate(request, metadata=bearing(USER)))
        info, _, delay_s = details_of(error)
        assert (error.code(), info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOKEN_QUOTA_USED_UP")
        assert delay_s is not None
        assert delay_s > 60


async def test_without_a_token_file_everyone_is_the_local_tenant(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as running:
        await running.inference.Generate(GENERATE, metadata=bearing("whatever"))
        assert [submit.tenant for submit in running.scheduler.of_kind(Submit)] == ["local"]
        await running.cluster.ListGroups(cluster_pb2.ListGroupsRequest())
