"""`quire serve`: a cluster on this machine, in the foreground."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import yaml

from quire.cli.setting_flags import add_setting_arguments, read_settings
from quire.cluster.controller.discovery import served_model, tokenizer_files
from quire.cluster.controller.listen_address import check_listen_address
from quire.cluster.controller.ray_environment import prepare_local_ray
from quire.cluster.controller.stop_signals import StopSignals
from quire.cluster.gateway.served_model import load_served_model
from quire.cluster.gateway.template_processes import TemplateProcesses
from quire.cluster.gateway.tls import Certificates, TlsFiles
from quire.cluster.gateway.tokens import TokenFile
from quire.common.config import ModelPlan, ServeConfig, config_as_dict, plan_model
from quire.common.errors import ConfigError
from quire.common.files import write_json_atomically


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serve a model over gRPC. Every setting below is also an environment variable (QUIRE_MAX_MODEL_LEN for --max-model-len) "
        "and a key of the config file; flags go before the environment, the environment before the file."
    )
    add_setting_arguments(parser)
    parser.add_argument("--print-config", action="store_true", help="print the settings as resolved, as YAML, and exit")
    parser.add_argument("--ready-file", metavar="FILE", help="write the address here, as JSON, once the cluster serves")


def run(args: argparse.Namespace) -> int:
    config = read_settings(args)
    plan = plan_model(config.models[0])
    if args.print_config:
        yaml.safe_dump(config_as_dict(config, plan), sys.stdout, sort_keys=False)
        return 0
    ready_file = Path(args.ready_file).absolute() if args.ready_file else None
    check_listen_address(
        config.listen, insecure=config.insecure, has_tls=config.tls_cert is not None, has_tokens=config.token_file is not None
    )
    check_credentials(config)
    check_tokenizer(plan)
    stop = StopSignals()
    started_s = time.monotonic()
    program = own_command()
    print(
        f"starting {plan.name} ({plan.folder.model_type}, {plan.dtype}, {plan.device}; {_kv_cache(plan)})",
        flush=True,
    )
    if plan.whole_on_each_rank:
        print(f"note: each of the {plan.tensor_parallel_size} ranks holds {plan.whole_on_each_rank}")
    num_tokens = plan.max_model_len if plan.num_gpu_blocks is None else plan.num_gpu_blocks * plan.block_size
    if num_tokens < plan.max_model_len:
        print(f"warning: the KV cache holds {num_tokens} tokens, less than max_model_len {plan.max_model_len}: requests are capped at that")
    prepare_local_ray()
    from quire.cluster.controller.local_cluster import LocalCluster  # not before: it imports ray

    with LocalCluster(config, plan, stop) as cluster:
        address = cluster.start()
        if address:
            if ready_file:
                write_json_atomically(ready_file, {"address": address, "metrics": cluster.metrics_addresses})
            print(f"ready: {plan.name} at {address} after {time.monotonic() - started_s:.1f} s (Ctrl-C stops it)", flush=True)
            print(f"metrics: {', '.join(f'http://{at}/metrics ({who})' for who, at in cluster.metrics_addresses.items())}", flush=True)
            print(f'try:   {program} generate --address {address}{client_flags(config)} "Once upon a time"', flush=True)
            cluster.run()
        print(f"stopping (streams get up to {config.drain_timeout_s:g} s to finish; Ctrl-C again ends them)", flush=True)
    return 0


def check_credentials(config: ServeConfig) -> None:
    """Read the token file and the certificate as the gateway will.

    Raises:
        ConfigError: they cannot be used.
    """
    if config.token_file is not None:
        TokenFile(Path(config.token_file).expanduser())
    if config.tls_cert is not None and config.tls_key is not None:
        client_ca = Path(config.tls_client_ca).expanduser() if config.tls_client_ca is not None else None
        Certificates(TlsFiles(Path(config.tls_cert).expanduser(), Path(config.tls_key).expanduser(), client_ca))


def client_flags(config: ServeConfig) -> str:
    """What a client has to say besides the address."""
    tls = " --tls-ca CA.pem" if config.tls_cert is not None else ""
    own = " --tls-cert CLIENT.pem --tls-key CLIENT.key" if config.tls_client_ca is not None else ""
    return f"{tls}{own}{' --api-key-file TOKEN' if config.token_file is not None else ''}"


def _kv_cache(plan: ModelPlan) -> str:
    if plan.num_gpu_blocks is None:
        return "the KV cache takes what each GPU has left"
    num_bytes = plan.num_gpu_blocks * plan.block_bytes
    return f"{plan.num_gpu_blocks} blocks of {plan.block_size} tokens, {num_bytes / 2**20:.0f} MiB of KV cache per rank"


def check_tokenizer(plan: ModelPlan) -> None:
    """Load the model's tokenizer and chat template as a gateway will, so that a broken one is known before anything starts.

    Raises:
        ConfigError: they cannot be used.
    """
    files = tokenizer_files(plan)
    if plan.dummy_weights and not any(file.name == "tokenizer.json" for file in files):
        raise ConfigError(
            f"{plan.folder.path} has no tokenizer.json, which the gateway needs even for dummy weights; copy that of the model there, or "
            "measure without a gateway: quire bench engine --model-config FOLDER --dummy-weights",
            reason="NO_TOKENIZER_JSON",
        )
    contents = {file.name: file.path.read_bytes() for file in files}
    with TemplateProcesses(num_processes=1) as templates:
        load_served_model(served_model(plan, files, max_request_tokens=0), contents, templates)


def own_command() -> str:
    """How the user can call this program: by its name if that finds it, else by its path from here."""
    program = Path(sys.argv[0]).absolute()
    if program.name != "quire":
        return f"{sys.executable} -m quire.cli.main"
    found = shutil.which("quire")
    return "quire" if found and Path(found).absolute() == program else os.path.relpath(program)
