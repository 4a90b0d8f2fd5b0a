"""Quotas, by a clock of their own."""

import contextlib

import pytest

from quire.cluster.gateway.quota import Quotas
from quire.cluster.gateway.tenants import LOCAL_CALLER, Caller, Limits, Role
from quire.common.errors import Overloaded


def test_no_more_requests_are_in_flight_than_the_tenant_may_have() -> None:
    quotas = Quotas()
    acme = Caller("acme", Role.USER, Limits(max_requests=2))
    with contextlib.ExitStack() as held:
        for _ in range(2):
            held.enter_context(quotas.hold_request(acme, now_s=0))
        with pytest.raises(Overloaded, match="2 requests in flight of 2") as caught, quotas.hold_request(acme, now_s=0):
            pass
        assert (caught.value.reason, caught.value.retry_after_s) == ("TOO_MANY_REQUESTS_OF_TENANT", 1.0)
        with quotas.hold_request(Caller("umbrella", Role.USER, acme.limits), now_s=0):
            pass
    with quotas.hold_request(acme, now_s=0):
        pass


def test_tokens_come_back_evenly_and_a_debt_is_paid_first() -> None:
    quotas = Quotas()
    acme = Caller("acme", Role.USER, Limits(tokens_per_minute=60))
    with quotas.hold_request(acme, now_s=100):
        quotas.charge(acme, 70, now_s=100)
    with pytest.raises(Overloaded, match="60 tokens per minute; try again in 11 s") as caught, quotas.hold_request(acme, now_s=100):
        pass
    assert caught.value.reason == "TOKEN_QUOTA_USED_UP"
    assert caught.value.retry_after_s == pytest.approx(11)
    with pytest.raises(Overloaded), quotas.hold_request(acme, now_s=110.9):
        pass
    with quotas.hold_request(acme, now_s=111.1):
        pass
    quotas.charge(acme, 59, now_s=10_000)  # never more than a minute's worth has come back
    with quotas.hold_request(acme, now_s=10_000):
        quotas.charge(acme, 1, now_s=10_000)
    with pytest.raises(Overloaded), quotas.hold_request(acme, now_s=10_000):
        pass


def test_a_tenant_without_limits_has_none() -> None:
    quotas = Quotas()
    with contextlib.ExitStack() as held:
        for _ in range(1000):
            held.enter_context(quotas.hold_request(LOCAL_CALLER, now_s=0))
            quotas.charge(LOCAL_CALLER, 10**9, now_s=0)


def test_of_many_prompts_at_once_those_behind_the_limit_are_refused() -> None:
    quotas = Quotas()
    acme = Caller("acme", Role.USER, Limits(tokens_per_minute=100))
    with contextlib.ExitStack() as held:
        for _ in range(5):
            held.enter_context(quotas.hold_request(acme, now_s=0))
        quotas.charge_prompt(acme, 80, now_s=0)
        quotas.charge_prompt(acme, 80, now_s=0)
        for _ in range(3):
            with pytest.raises(Overloaded, match=r"try again in 36\.6 s"):
                quotas.charge_prompt(acme, 80, now_s=0)


def test_who_had_no_limit_owes_nothing_when_one_comes() -> None:
    quotas = Quotas()
    for _ in range(100):
        quotas.charge(Caller("acme", Role.USER, Limits()), 8000, now_s=0)
    limited = Caller("acme", Role.USER, Limits(tokens_per_minute=60))
    with quotas.hold_request(limited, now_s=1):
        quotas.charge_prompt(limited, 60, now_s=1)
    with pytest.raises(Overloaded), quotas.hold_request(limited, now_s=1):
        pass
