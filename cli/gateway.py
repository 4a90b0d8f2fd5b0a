"""`quire gateway`: gateways that join a cluster by its controller's discovery, in the foreground."""

import argparse
import re
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Final

from quire.cli.serve import check_credentials, client_flags, own_command
from quire.cli.setting_flags import add_setting
from quire.cluster.controller.gateways import POLL_S, Gateways, gateway_spec
from quire.cluster.controller.listen_address import check_listen_address
from quire.cluster.controller.stop_signals import StopSignals
from quire.common.cluster_tls import is_local
from quire.common.config import ServeConfig, resolve_config
from quire.common.curve import CurveKeys
from quire.common.errors import ConfigError, Unavailable
from quire.common.files import write_json_atomically

# Of the settings of `quire serve`, those that gateways have.
SETTINGS: Final = (
    "listen",
    "gateways",
    "insecure",
    "token_file",
    "tls_cert",
    "tls_key",
    "tls_client_ca",
    "max_request_bytes",
    "request_timeout_s",
    "drain_timeout_s",
    "start_timeout_s",
    "log_level",
    "metrics_listen",
    "otlp_endpoint",
    "trace_sample_ratio",
)
_DISCOVERY: Final = re.compile(r"unix:/.+|(\[[0-9a-fA-F:]+\]|[^:/\s]+):\d{1,5}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Join a running cluster with more gateways, on its machine or on another. They learn everything else from its controller. "
        "Every setting below is also an environment variable, as for `quire serve`."
    )
    parser.add_argument("--discovery", metavar="ADDRESS", required=True, help="where the controller answers: HOST:PORT, or unix:/PATH")
    parser.add_argument(
        "--cluster-key",
        metavar="FILE",
        help="the file client_key of the cluster's run folder, or of `quire key new`: for a cluster that is reached over a network",
    )
    parser.add_argument("--ready-file", metavar="FILE", help="write the address here, as JSON, once all of them serve")
    for setting in fields(ServeConfig):
        if setting.name in SETTINGS:
            add_setting(parser, ServeConfig, setting.name, setting.default, setting.metadata)


def run(args: argparse.Namespace) -> int:
    config = resolve_config({name: value for name, value in vars(args).items() if name in SETTINGS})
    if not _DISCOVERY.fullmatch(args.discovery):
        raise ConfigError(f"--discovery is {args.discovery!r}; it takes HOST:PORT, or unix:/PATH of a socket on this machine")
    ready_file = Path(args.ready_file).absolute() if args.ready_file else None
    check_listen_address(
        config.listen, insecure=config.insecure, has_tls=config.tls_cert is not None, has_tokens=config.token_file is not None
    )
    check_credentials(config)
    if args.cluster_key is not None:
        keys = CurveKeys.read(Path(args.cluster_key).expanduser())
        if keys.certificates is None and not is_local(args.discovery):
            raise ConfigError(f"{args.cluster_key} has no certificates for discovery over a network; make keys with: quire key new")
    elif not is_local(args.discovery):
        raise ConfigError(f"discovery at {args.discovery} is reached over a network; give --cluster-key FILE, the cluster's client_key")
    stop = StopSignals()
    stop.install()
    with tempfile.TemporaryDirectory(prefix="quire-gateway-") as folder:
        gateways = Gateways(
            gateway_spec(config, args.discovery, cluster_key=args.cluster_key),
            listen=config.listen,
            count=config.gateways,
            folder=Path(folder),
            logs=None,
        )
        try:
            gateways.start()
            address = _wait_ready(gateways, stop, config, args.discovery)
            if address is not None:
                if ready_file:
                    write_json_atomically(ready_file, {"address": address, "metrics": gateways.metrics_addresses})
                print(f"ready: {config.gateways} gateway{'s' if config.gateways > 1 else ''} at {address} (Ctrl-C stops)", flush=True)
                print(f"metrics: {', '.join(f'http://{at}/metrics ({who})' for who, at in gateways.metrics_addresses.items())}", flush=True)
                print(f'try:   {own_command()} generate --address {address}{client_flags(config)} "Once upon a time"', flush=True)
            while not stop.is_set():
                gateways.tend(time.monotonic())
                time.sleep(POLL_S)
            print(f"stopping (streams get up to {config.drain_timeout_s:g} s to finish; Ctrl-C again ends them)", flush=True)
        finally:
            gateways.stop(drain_timeout_s=config.drain_timeout_s, at_once=lambda: stop.count > 1)
    return 0


def _wait_ready(gateways: Gateways, stop: StopSignals, config: ServeConfig, discovery: str) -> str | None:
    """The address, once all of them serve; None if a signal came before.

    Raises:
        Unavailable: they do not, within start_timeout_s.
    """
    deadline_s = time.monotonic() + config.start_timeout_s
    while not stop.is_set():
        gateways.tend(time.monotonic())
        if gateways.address is not None:
            return gateways.address
        if time.monotonic() > deadline_s:
            text = (
                f"no model and scheduler were found by {discovery} within {config.start_timeout_s:g} s; is the cluster's controller there?"
            )
            raise Unavailable(text)
        time.sleep(POLL_S)
    return None
