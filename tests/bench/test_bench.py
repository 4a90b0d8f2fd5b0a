from typing import Any

import pytest

from quire.bench.percentile import percentile
from quire.bench.request_meter import RequestMeter, RequestRecord
from quire.bench.table import format_table
from quire.client import Delta, Usage


def test_columns_of_numbers_stand_to_the_right_and_totals_below_a_rule() -> None:
    assert format_table(("name", "ms"), [("a", "1.5"), ("bcdef", "-")], totals=("all", "10.5")).splitlines() == [
        "name     ms",
        "-----  ----",
        "a       1.5",
        "bcdef     -",
        "-----  ----",
        "all    10.5",
    ]


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 2.5), (90, 3.7), (100, 4)])
def test_percentiles_lie_between_neighbours(percent: float, value: float) -> None:
    assert percentile([4, 1, 3, 2], percent) == pytest.approx(value)
    assert percentile([5], percent) == 5


def delta(num_tokens: int, **given: Any) -> Delta:
    fields: dict[str, Any] = dict.fromkeys(Delta.__dataclass_fields__) | {"token_ids": tuple(range(num_tokens))} | given
    return Delta(**fields)


def test_the_meter_counts_from_the_call_and_divides_by_later_tokens() -> None:
    meter = RequestMeter(start_s=10.0)
    meter.add(delta(0), now_s=10.5)  # no token yet
    meter.add(delta(2), now_s=11.0)
    meter.add(delta(1), now_s=12.0)
    meter.add(delta(3), now_s=13.0)
    meter.add(delta(0, usage=Usage(num_prompt_tokens=5, num_cached_tokens=0, num_completion_tokens=6)), now_s=14.0)
    record = meter.record(now_s=14.0)
    assert record == RequestRecord(num_prompt_tokens=5, num_tokens=6, ttft_s=1.0, tpot_s=0.5, total_s=4.0, error=None, gaps_s=(1.0, 1.0))
    assert record.tokens_per_s == 1.5
    assert record.normalized_s == pytest.approx(4 / 6)


def test_a_request_without_later_tokens_has_no_time_per_token() -> None:
    meter = RequestMeter(start_s=0.0)
    assert meter.record(now_s=1.0, error="X: y") == RequestRecord(None, 0, None, None, 1.0, "X: y")
    meter.add(delta(3), now_s=0.5)
    assert meter.record(now_s=1.0).tpot_s is None
    assert meter.record(now_s=1.0).gaps_s == ()
