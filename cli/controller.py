"""`quire controller`: a cluster on a Ray that is there already. Gateways find it at the address where its discovery listens."""

import argparse
import sys
from pathlib import Path
from typing import Final

from quire.cli.serve import check_tokenizer
from quire.cli.setting_flags import add_setting_arguments, read_settings
from quire.cluster.controller.listen_address import check_scheduler_address, split_address
from quire.cluster.controller.ray_environment import prepare_joined_ray
from quire.cluster.controller.stop_signals import StopSignals
from quire.common.cluster_tls import is_loopback
from quire.common.config import plan_model
from quire.common.curve import CurveKeys
from quire.common.errors import ConfigError
from quire.common.files import write_json_atomically

# Settings of the edge, which other processes have.
_EDGE_SETTINGS: Final = (
    "listen",
    "metrics_listen",
    "gateways",
    "insecure",
    "max_request_bytes",
    "token_file",
    "tls_cert",
    "tls_key",
    "tls_client_ca",
    "request_timeout_s",
    "drain_timeout_s",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run the controller, the scheduler and the worker groups of a model on a Ray that is there already, and end them on SIGTERM. The "
        "rest of that Ray is left alone. Set RAY_AUTH_MODE, and the token, as that Ray was started with. Settings are as for quire serve."
    )
    parser.add_argument("--ray-address", metavar="auto|HOST:PORT", default="auto", help="the Ray to join (default: auto)")
    parser.add_argument(
        "--discovery-listen",
        metavar="HOST:PORT",
        default="127.0.0.1:50050",
        help="where gateways ask, by TLS with the cluster's key unless it is a loopback address (default: 127.0.0.1:50050)",
    )
    parser.add_argument(
        "--scheduler-listen",
        metavar="IP:PORT",
        help="where gateways of other hosts reach the scheduler, and ranks at the next port, encrypted; groups may be on any host of that "
        "Ray then. When not given, all is on this host",
    )
    parser.add_argument(
        "--cluster-key",
        metavar="FILE",
        help="the file cluster_key of `quire key new`; when not given, new ones are made in the run's folder",
    )
    parser.add_argument("--stop", action="store_true", help="end the controller that another process started there, and all of it")
    parser.add_argument("--ready-file", metavar="FILE", help="write the address of discovery here, as JSON, once every group is ready")
    add_setting_arguments(parser, without=_EDGE_SETTINGS)


def run(args: argparse.Namespace) -> int:
    if args.stop:
        prepare_joined_ray()
        from quire.cluster.controller.joined_cluster import RayConnection, leave_ray  # not before: it imports ray

        with RayConnection(args.ray_address):
            leave_ray()
        print("ended; Ray stays")
        return 0
    config = read_settings(args)
    plan = plan_model(config.models[0])
    split_address(args.discovery_listen)
    if args.scheduler_listen is not None:
        check_scheduler_address(args.scheduler_listen)
    keys = read_cluster_key(args.cluster_key)
    check_tokenizer(plan)
    prepare_joined_ray()
    from quire.cluster.controller.joined_cluster import JoinedCluster, RayConnection

    ready_file = Path(args.ready_file).absolute() if args.ready_file else None
    stop = StopSignals()
    print(f"starting {plan.name} on Ray at {args.ray_address}", flush=True)
    with RayConnection(args.ray_address):
        stop.install()  # behind Ray, which puts handlers of its own
        cluster = JoinedCluster(
            config, plan, stop, discovery_listen=args.discovery_listen, scheduler_listen=args.scheduler_listen, keys=keys
        )
        try:
            address = cluster.start()
            if address:
                if ready_file:
                    found = {"address": address, "metrics": {"controller": cluster.metrics_address}, "cluster_key": cluster.cluster_key}
                    write_json_atomically(ready_file, found)
                print(f"ready: {plan.name}, discovery at {address} (Ctrl-C stops it)", flush=True)
                if args.scheduler_listen is not None or not is_loopback(address):
                    print(f"key of gateways on other hosts: {cluster.cluster_key}", flush=True)
                print(f"metrics: http://{cluster.metrics_address}/metrics", flush=True)
                cluster.run()
            print("stopping; Ray stays", flush=True)
        finally:
            cluster.stop(keep_logs=sys.exc_info()[0] is not None)
    return 0


def read_cluster_key(path: str | None) -> CurveKeys | None:
    """
    Raises:
        ConfigError: it is not there, or only gateways' part.
    """
    if path is None:
        return None
    keys = CurveKeys.read(Path(path).expanduser())
    if keys.server_secret is None:
        raise ConfigError(f"{path} is the part of a cluster's key that gateways have; give the controller the file cluster_key beside it")
    return keys
