"""Groups and gateways on two hosts, which are network namespaces of this one, and the cable between them cut under load."""

from pathlib import Path
from typing import Final

import pytest
from serving import wait_for
from streams import Streams
from two_hosts import TwoHosts

from quire.client import Client

NUM_STREAMS: Final = 12
NUM_TOKENS: Final = 80
TIMEOUT_S: Final = 120.0


@pytest.mark.chaos
def test_two_hosts_serve_together_and_one_goes_on_without_the_other(tmp_path: Path) -> None:
    with TwoHosts(num_cpus=1) as hosts:
        found = hosts.start(tmp_path, "--groups", "2")
        ranks = hosts.pids("-m quire.worker.rank_process")
        assert sorted(map(hosts.host_of, ranks)) == ["head", "worker"]
        (far_rank,) = [pid for pid in ranks if hosts.host_of(pid) == "worker"]
        assert list(map(hosts.host_of, hosts.pids("-m quire.cluster.scheduler"))) == ["head"]
        address = hosts.gateway(tmp_path, found, on_worker=False)
        far_address = hosts.gateway(tmp_path, found, on_worker=True)
        with Client(address) as client:
            expected = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS).wait()
            assert Streams(far_address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS).wait() == expected

            streams = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
            wait_for(lambda: streams.num_tokens > streams.num_wanted / 4, timeout_s=TIMEOUT_S)
            assert all(group.num_running_sequences for group in client.cluster.groups()), "one group has nothing to lose"
            hosts.cut()
            assert streams.wait() == expected
            print(f"cable cut: longest pause {streams.longest_pause_s:.1f} s")
            assert Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS).wait() == expected
            # Nobody tells the rank on the other side; it goes by itself when no plan comes.
            wait_for(lambda: not Path(f"/proc/{far_rank}").exists(), timeout_s=TIMEOUT_S)


@pytest.mark.slow
def test_a_group_on_two_hosts_draws_what_one_rank_draws(built_in: str, tmp_path: Path) -> None:
    expected = Streams(built_in, num_streams=4, num_tokens=20).wait()
    with TwoHosts(num_cpus=1) as hosts:
        found = hosts.start(tmp_path, "--tensor-parallel-size", "2")
        assert sorted(map(hosts.host_of, hosts.pids("-m quire.worker.rank_process"))) == ["head", "worker"]
        address = hosts.gateway(tmp_path, found, on_worker=False)
        assert Streams(address, num_streams=4, num_tokens=20).wait() == expected
