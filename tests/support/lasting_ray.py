"""A Ray whose store keeps everything in Redis, so that it may die: `python -P lasting_ray.py FOLDER REDIS_PORT`.

It prints its address as JSON once it is there, obeys a line "kill store" or "start store" on its input, answers each
with a line, and ends at the end of its input. In production Kubernetes or a service manager starts the store again.
"""

import json
import os
import signal
import sys

NUM_CPUS = 6
REDIS_PASSWORD = "of-a-test"


def main(folder: str, redis_port: str) -> None:
    # Read by Ray's processes, and before ray is imported.
    os.environ["RAY_REDIS_ADDRESS"] = f"127.0.0.1:{redis_port}"
    os.environ["RAY_external_storage_namespace"] = "quire"  # noqa: SIM112  # as Ray spells it
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": NUM_CPUS,
            "object_store_memory": 80 * 2**20,
            "include_dashboard": False,
            "temp_dir": folder,
            "redis_password": REDIS_PASSWORD,
        },
    )
    print(json.dumps({"address": cluster.address}), flush=True)
    for line in sys.stdin:
        if line.strip() == "kill store":
            (store,) = cluster.head_node.all_processes["gcs_server"]
            os.kill(store.process.pid, signal.SIGKILL)
            store.process.wait()
            cluster.head_node.kill_gcs_server(check_alive=False)  # so that it knows
        else:
            cluster.head_node.start_gcs_server()
        print(json.dumps({"done": line.strip()}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
