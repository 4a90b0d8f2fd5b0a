"""A collector beside a real cluster with too little memory: the phases of its requests, and what preemption took."""

import asyncio
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any, Final

import pytest
from otlp_receiver import OtlpReceiver, attributes
from serving import ServeProcess

from quire.client import AsyncClient
from quire.client.results import Generation

NUM_REQUESTS: Final = 8
MAX_TOKENS: Final = 48
# What the clocks of a request's two ends and the rounding of its spans may differ by.
SLACK_NS: Final = 5_000_000


@pytest.mark.slow
def test_each_request_of_a_crowd_is_a_trace_that_accounts_for_its_time(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    memory = ("--gpu-blocks", "10", "--swap-memory", "64Mi", "--preemption", "swap")
    with OtlpReceiver() as collector:
        with ServeProcess(tmp_path, *memory, "--otlp-endpoint", collector.address, "--scheduler-journal", str(journal)) as serve:
            address = serve.wait_ready()

            async def crowd() -> list[Generation]:
                async with AsyncClient(address) as client:
                    calls = [
                        client.generate(f"There were {n} of them", max_tokens=MAX_TOKENS, ignore_eos=True) for n in range(NUM_REQUESTS)
                    ]
                    return list(await asyncio.gather(*calls))

            before_ns = time.time_ns()
            generations = asyncio.run(crowd())
            after_ns = time.time_ns()
            assert json.loads((tmp_path / "ready.json").read_text())["address"] == address
        traces: dict[bytes, dict[str, Any]] = {}
        for span in collector.spans:  # the cluster has ended, so all of them have come
            traces.setdefault(span.trace_id, {})[span.name] = span
    assert len(traces) == NUM_REQUESTS
    for spans in traces.values():
        server = spans["generate quire-tales"]
        assert before_ns - SLACK_NS <= server.start_time_unix_nano <= server.end_time_unix_nano <= after_ns + SLACK_NS
        assert attributes(server)["gen_ai.usage.output_tokens"] == MAX_TOKENS
        phases = [spans[name] for name in ("quire.queue", "quire.prefill", "quire.decode")]
        for earlier, later in itertools.pairwise(phases):
            assert abs(later.start_time_unix_nano - earlier.end_time_unix_nano) <= SLACK_NS
        assert phases[-1].end_time_unix_nano - phases[-1].start_time_unix_nano > 0
    preempted = [spans["quire.preempted"] for spans in traces.values() if "quire.preempted" in spans]
    counted = sum(attributes(span)["quire.preemption.count"] for span in preempted)
    assert counted == sum(generation.timings.num_preemptions for generation in generations) > 0
    # The journal names each request's trace, so that what the scheduler did can be found from a span.
    told = set(re.findall(rb"00-([0-9a-f]{32})-[0-9a-f]{16}-01", journal.read_bytes()))
    assert told == {trace_id.hex().encode() for trace_id in traces}
