"""What refusing a bad request costs the gateway: `python tests/support/measure_refusals.py`. Prints processor time per request.

Each request of bad_requests.py goes to Generate of a real cluster, one at a time.
"""

import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Final

import grpc
from bad_requests import CASES, MAX_REQUEST_TOKENS
from serving import ServeProcess
from tiny_models import save_tiny_llama

from quire.v1 import inference_pb2_grpc

NUM_REPEATS: Final = 20
CALL_TIMEOUT_S: Final = 30.0


def processor_ms(pid: int) -> float:
    """What a process has used so far, over its threads."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) * 1e-6


def main() -> None:
    """Measure and print, dearest first."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = save_tiny_llama(Path(folder) / "tiny-llama")
        settings = ["--block-size", "4", "--gpu-blocks", str(MAX_REQUEST_TOKENS // 4)]
        serve = stack.enter_context(ServeProcess(Path(folder), str(model), *settings))
        channel = stack.enter_context(grpc.insecure_channel(serve.wait_ready()))
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        pid = serve.process_of("quire.cluster.gateway.main")
        costs_ms: dict[str, float] = {}
        for case in CASES:
            request = case.request()
            start_ms = 0.0
            for repeat in range(1 + NUM_REPEATS):
                if repeat == 1:  # the first one warms up
                    start_ms = processor_ms(pid)
                with contextlib.suppress(grpc.RpcError):
                    stub.Generate(request, timeout=CALL_TIMEOUT_S)
            costs_ms[case.name] = (processor_ms(pid) - start_ms) / NUM_REPEATS
    dearest = sorted(costs_ms.items(), key=lambda item: -item[1])
    print(f"{len(dearest)} kinds, median {statistics.median(costs_ms.values()):.2f} ms")
    for name, cost_ms in dearest[:8]:
        print(f"{cost_ms:8.2f} ms  {name}")


if __name__ == "__main__":
    main()
