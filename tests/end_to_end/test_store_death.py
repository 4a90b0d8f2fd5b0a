"""The death of Ray's own store (the GCS)."""

import os
import signal
from pathlib import Path
from typing import Final

import pytest
from serving import ServeProcess, wait_for
from streams import Streams

pytestmark = pytest.mark.chaos

NUM_STREAMS: Final = 16
NUM_TOKENS: Final = 100
TIMEOUT_S: Final = 60.0


def test_streams_end_well_before_a_local_cluster_without_its_store_ends(tmp_path: Path) -> None:
    with ServeProcess(tmp_path) as serve:
        address = serve.wait_ready()
        expected = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS).wait()
        streams = Streams(address, num_streams=NUM_STREAMS, num_tokens=NUM_TOKENS)
        wait_for(lambda: streams.num_tokens >= streams.num_wanted // 10, timeout_s=TIMEOUT_S)
        os.kill(serve.process_with("gcs_server "), signal.SIGKILL)
        assert streams.wait() == expected
        assert serve.wait_end() == 1, serve.output
        assert "Ray's store (gcs_server) ended with code -9" in serve.output
        serve.wait_gone(timeout_s=TIMEOUT_S)
