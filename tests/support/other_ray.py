"""Somebody's Ray on this machine, with an actor of theirs: `python -P other_ray.py FOLDER`. A program: Ray's workers could not import it.

Prints its address as JSON once it is there. For each line on its input it prints what is free and whose named actors are alive; at
the end of its input it ends.
"""

import json
import sys

import ray

NUM_CPUS = 6


class Somebody:
    def __init__(self) -> None:
        self.num_calls = 0

    def call(self) -> int:
        self.num_calls += 1
        return self.num_calls


def main(folder: str) -> None:
    ray.init(
        address="local",
        namespace="others",
        num_cpus=NUM_CPUS,
        num_gpus=0,
        include_dashboard=False,
        _temp_dir=folder,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
    )
    somebody = ray.remote(num_cpus=1)(Somebody).options(name="somebody", lifetime="detached").remote()
    ray.get(somebody.call.remote())
    print(json.dumps({"address": ray.get_runtime_context().gcs_address}), flush=True)
    for _ in sys.stdin:
        free = ray.available_resources().get("CPU", 0.0)
        names = sorted(actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True))
        print(json.dumps({"free_cpus": free, "actors": names, "num_calls": ray.get(somebody.call.remote())}), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
