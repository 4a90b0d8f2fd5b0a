"""The settings of `quire serve`: their names, units, defaults and checks, in one place.

A value comes from a flag, else the environment (QUIRE_MAX_MODEL_LEN for max_model_len), else the YAML file, else the
default. `resolve_config` turns the three sources into one ServeConfig; `plan_model` checks it against the model's folder.
"""

import difflib
import importlib.resources
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from quire.common.errors import ConfigError
from quire.common.gpu import torch_sees_gpu
from quire.common.model_folder import BUILT_IN_MODEL_NAME, ModelFolder, read_model_folder
from quire.common.model_hub import fetch_model, hub_name, is_hub_id

ENV_PREFIX: Final = "QUIRE_"
# Variables of ours that are no settings. Others are not ours and not our business: Kubernetes makes QUIRE_PORT of a service.
_OTHER_VARIABLES: Final = ("QUIRE_CONFIG", "QUIRE_ADDRESS", "QUIRE_API_KEY", "QUIRE_API_KEY_FILE", "QUIRE_RUN_FOLDER")
# A variable this close to a setting's is taken for a misspelt one.
_MISSPELT_RATIO: Final = 0.85

# What a batch holds when nobody says: (sequences, tokens of a step).
_BATCH_LIMITS: Final = {"cpu": (32, 512), "cuda": (256, 8192)}
# Largest KV cache on CPU when nobody says.
_CPU_KV_CACHE_BYTES: Final = 2**30
# Largest swap pool when nobody says. More blocks than the KV cache has would never be used at once.
_SWAP_BYTES: Final = {"cpu": 2**28, "cuda": 2**32}
# Of the numbers of ranks that heads can be split over, those up to here are worth naming.
_MAX_NAMED_RANKS: Final = 64

# A longer message is an attack or a mistake, whatever the model: it holds 4 million characters.
MAX_REQUEST_BYTES: Final = 4 * 2**20
# What the longest request of a model can need: tokens of text (4 bytes each as a rule), a list of any token ids, everything else.
_BYTES_PER_PROMPT_TOKEN: Final = 8
_BYTES_PER_LISTED_ID: Final = 5
_BYTES_OF_THE_REST: Final = 256 * 2**10
# More gateways than a machine has use for: each takes some 100 MiB, and a core when it is busy.
MAX_GATEWAYS: Final = 64
# Kernels have a program per token in the second dimension of a CUDA grid, which ends here.
MAX_BATCHED_TOKENS: Final = 65_535
# Where metrics are served when nobody says. If that port is taken, by another cluster on this machine for one, a free one is.
DEFAULT_METRICS_LISTEN: Final = {"gateway": "127.0.0.1:9400", "controller": "127.0.0.1:9401"}

_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def _setting(default: Any, help_text: str, *, choices: Sequence[str] | None = None, is_bytes: bool = False) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices, "is_bytes": is_bytes})


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One entry of `models:`. None means: decided from the model and the device, and logged."""

    model: str | None = _setting(None, "folder of the model, or its id on the hub; the built-in demo model when not given")
    name: str | None = _setting(None, "name that requests use; the folder's name or the id when not given")
    device: str = _setting(
        "auto", "where the ranks compute; auto: cuda if torch sees a GPU here, else cpu", choices=("auto", "cpu", "cuda")
    )
    dtype: str = _setting(
        "auto",
        "number format of weights and KV cache; auto: float32 on cpu, the checkpoint's on cuda",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    model_backend: str = _setting("auto", "how the model is run", choices=("auto", "native", "transformers"))
    tensor_parallel_size: int = _setting(1, "ranks over which one copy of the model is split")
    groups: int = _setting(1, "worker groups, each a copy of the model")
    block_size: int = _setting(16, "tokens per KV block")
    gpu_blocks: int | None = _setting(None, "KV blocks per group, exactly; instead of --kv-cache-memory")
    kv_cache_memory: int | None = _setting(None, "bytes of KV cache per rank (2Gi, 500M, ...)", is_bytes=True)
    swap_memory: int | None = _setting(
        None,
        "bytes of CPU memory per rank for preempted sequences; 0: none; when not given, as much as the KV cache has, within limits",
        is_bytes=True,
    )
    preemption: str = _setting("auto", "what happens to preempted sequences", choices=("auto", "swap", "recompute"))
    max_model_len: int | None = _setting(None, "most tokens of prompt and completion together; the model's own when not given")
    max_sequences: int | None = _setting(None, "most sequences in a batch; 256 on cuda, 32 on cpu")
    max_batched_tokens: int | None = _setting(None, "most tokens in a step; 8192 on cuda, 512 on cpu")
    dummy_weights: bool = _setting(False, "random weights of the model's shapes; config.json is enough then: to measure speed, not to read")
    num_threads: int | None = _setting(None, "threads that a rank computes with on cpu; when not given, all cores but one are shared out")


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Everything that `quire serve` needs to know."""

    listen: str = _setting("127.0.0.1:50051", "address of the gRPC edge; port 0 takes a free one")
    gateways: int = _setting(1, "gateway processes, which share the address; one that dies is started anew")
    insecure: bool = _setting(False, "allow an address that other hosts reach without TLS and tokens")
    token_file: str | None = _setting(
        None, "file of hashed tokens (`quire token new`), read again when it changes; not given: none are asked for"
    )
    tls_cert: str | None = _setting(None, "PEM file of the server's certificate chain, read again when it changes; not given: no TLS")
    tls_key: str | None = _setting(None, "PEM file of the certificate's key")
    tls_client_ca: str | None = _setting(None, "PEM file of who signs clients' certificates; when given, clients need one (mTLS)")
    max_waiting_requests: int = _setting(4096, "requests that may wait in the queue")
    max_waiting_tokens: int = _setting(8_000_000, "prompt tokens that may wait in the queue")
    max_request_bytes: int | None = _setting(
        None, "largest request that is received (1Mi, 500k, ...); when not given, what the model's longest can need", is_bytes=True
    )
    request_timeout_s: float = _setting(600.0, "seconds that a request without a deadline may take")
    drain_timeout_s: float = _setting(30.0, "seconds that running streams get to finish after SIGTERM")
    start_timeout_s: float = _setting(600.0, "seconds until every group must be ready")
    metrics_listen: str | None = _setting(
        None, "address of the gateway's metrics and status page; 127.0.0.1:9400 when not given, or a free port if that is taken"
    )
    controller_metrics_listen: str | None = _setting(
        None, "address of the controller's metrics, which are the scheduler's and the ranks' too; likewise with 9401"
    )
    otlp_endpoint: str | None = _setting(
        None, "OTLP collector that gateways send traces to by gRPC, such as http://127.0.0.1:4317; not given: no tracing"
    )
    trace_sample_ratio: float = _setting(1.0, "share of requests that are traced, from 0 to 1, where their client has not decided")
    log_level: str = _setting("info", "how much is logged", choices=("debug", "info", "warning", "error"))
    checks_ranks: bool = _setting(
        False,
        "compare the ranks' block tables after every step, and start a group anew whose ranks differ; each waits for the device",
    )
    scheduler_journal: str | None = _setting(None, "file for everything that the scheduler is told and plans, for `quire debug replay`")
    models: tuple[ModelConfig, ...] = (ModelConfig(),)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A ModelConfig with every `auto` and None decided, and the folder it was decided from."""

    name: str
    folder: ModelFolder
    device: str
    dtype: str
    tensor_parallel_size: int
    groups: int
    block_size: int
    num_gpu_blocks: int | None  # None: as many as each rank's GPU has memory for, which its hello tells
    num_cpu_blocks: int
    preemption: str
    max_model_len: int
    max_sequences: int
    max_batched_tokens: int
    num_threads: int
    model_backend: str = "auto"
    dummy_weights: bool = False

    @property
    def block_bytes(self) -> int:
        """One block on one rank, in bytes."""
        per_token = self.folder.kv_bytes_per_token(dtype=self.dtype, tensor_parallel_size=self.tensor_parallel_size)
        return self.block_size * per_token

    @property
    def whole_on_each_rank(self) -> str:
        """What the ranks of a group do not share out, each holding and computing all of it; "" if nothing of weight."""
        if self.tensor_parallel_size == 1 or self.folder.splits_kv_heads:
            return ""
        return f"all {self.folder.num_kv_heads} key and value heads: the plan of family {self.folder.model_type!r} does not split them"


def resolve_config(
    flags: Mapping[str, Any], *, environ: Mapping[str, str] = os.environ, file: Mapping[str, Any] | None = None
) -> ServeConfig:
    """Merge the sources. `flags` holds only what was given on the command line, by setting name.

    Raises:
        ConfigError: an unknown setting or a value of the wrong kind; the message names the source, the setting and what it takes.
    """
    file = dict(file or {})
    entries = file.pop("models", [{}])
    if not isinstance(entries, list) or len(entries) != 1 or not isinstance(entries[0], dict):
        raise ConfigError("the config file's `models:` must be a list of one mapping; this version serves one model")
    serve_values = _merge(ServeConfig, flags, environ, file, where="the config file")
    model_values = _merge(ModelConfig, flags, environ, entries[0], where="the config file's `models:` entry")
    _refuse_misspelt_variables(environ)
    config = ServeConfig(**serve_values, models=(ModelConfig(**model_values),))
    _check_ranges(config)
    return config


def plan_model(config: ModelConfig) -> ModelPlan:
    """Decide everything that `config` leaves open, from the model's folder. A model that is named by its id is fetched first.

    Raises:
        ConfigError: the settings and the model do not fit; the message holds both numbers.
    """
    folder = read_model_folder(_model_path(config.model), needs_weights=not config.dummy_weights)
    tensor_parallel_size = config.tensor_parallel_size
    if folder.num_heads % tensor_parallel_size:
        divisors = [n for n in range(1, min(folder.num_heads, _MAX_NAMED_RANKS) + 1) if folder.num_heads % n == 0]
        listed = ", ".join(map(str, divisors[:-1])) + (" or " if divisors[:-1] else "") + str(divisors[-1])
        raise ConfigError(f"{folder.num_heads} query heads cannot be split over {tensor_parallel_size} ranks; use {listed}")
    max_model_len = config.max_model_len or folder.max_positions
    if max_model_len > folder.max_positions:
        raise ConfigError(f"max_model_len {max_model_len} is more than the {folder.max_positions} positions of the model; use at most that")
    if folder.splits_kv_heads and folder.num_kv_heads % tensor_parallel_size and tensor_parallel_size % folder.num_kv_heads:
        raise ConfigError(
            f"{folder.num_kv_heads} key heads cannot be split over {tensor_parallel_size} ranks: one number must be a multiple of the "
            "other; use another tensor_parallel_size"
        )
    device = _device(config)
    dtype = ("float32" if device == "cpu" else folder.dtype) if config.dtype == "auto" else config.dtype
    default_sequences, default_tokens = _BATCH_LIMITS[device]
    max_batched_tokens = config.max_batched_tokens or default_tokens
    if max_batched_tokens > MAX_BATCHED_TOKENS:
        raise ConfigError(f"max_batched_tokens is {max_batched_tokens}; a step takes at most {MAX_BATCHED_TOKENS}")
    max_sequences = config.max_sequences or min(default_sequences, max_batched_tokens)
    if max_sequences > max_batched_tokens:
        raise ConfigError(
            f"max_sequences {max_sequences} is more than max_batched_tokens {max_batched_tokens}: a step computes at least one token "
            "of each; raise max_batched_tokens or lower max_sequences"
        )
    block_bytes = config.block_size * folder.kv_bytes_per_token(dtype=dtype, tensor_parallel_size=tensor_parallel_size)
    num_gpu_blocks = _num_gpu_blocks(
        config, block_bytes=block_bytes, max_model_len=max_model_len, max_sequences=max_sequences, device=device
    )
    return ModelPlan(
        name=config.name or _default_name(config.model, folder),
        folder=folder,
        device=device,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        groups=config.groups,
        block_size=config.block_size,
        num_gpu_blocks=num_gpu_blocks,
        num_cpu_blocks=_num_cpu_blocks(config, block_bytes=block_bytes, num_gpu_blocks=num_gpu_blocks, device=device),
        preemption=config.preemption,
        max_model_len=max_model_len,
        max_sequences=max_sequences,
        max_batched_tokens=max_batched_tokens,
        num_threads=config.num_threads or _num_threads(config.groups * tensor_parallel_size),
        model_backend=config.model_backend,
        dummy_weights=config.dummy_weights,
    )


def setting_type(cls: type, name: str) -> tuple[type, bool]:
    """The plain type of a setting and whether it may be None."""
    annotation = typing.get_type_hints(cls)[name]
    if isinstance(annotation, types.UnionType):
        return next(part for part in annotation.__args__ if part is not type(None)), True
    return annotation, False


def parse_setting(cls: type, name: str, value: Any, *, where: str) -> Any:
    """A setting's value from text or from YAML.

    Raises:
        ConfigError: it is not of the setting's kind.
    """
    meta = next(f.metadata for f in fields(cls) if f.name == name)
    kind, optional = setting_type(cls, name)
    if value is None and optional:
        return None
    try:
        if meta["is_bytes"]:
            return parse_bytes(value)
        if kind is bool:
            return _parse_bool(value)
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError(value)
        parsed = kind(value)
    except (TypeError, ValueError, OverflowError):
        takes = "bytes, such as 2Gi or 500M" if meta["is_bytes"] else {int: "a whole number", float: "a number", bool: "true or false"}
        what = takes if isinstance(takes, str) else takes.get(kind, "text")
        raise ConfigError(f"{where}: {name} is {value!r}; it takes {what}") from None
    if meta["choices"] and parsed not in meta["choices"]:
        raise ConfigError(f"{where}: {name} is {value!r}; it takes {', '.join(meta['choices'])}")
    return parsed


def parse_bytes(value: Any) -> int:
    """'2Gi' -> 2147483648, '500M' -> 500000000, 4096 -> 4096.

    Raises:
        ValueError: it is neither a whole number nor one with a known unit.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value).strip().lower().removesuffix("b")
    digits = text.rstrip("kmgti")
    return int(float(digits) * _UNITS[text[len(digits) :]]) if text[len(digits) :] in _UNITS else int(text)


def _parse_bool(value: Any) -> bool:
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if str(value).lower() not in words:
        raise ValueError(value)
    return words[str(value).lower()]


def config_as_dict(config: ServeConfig, plan: ModelPlan) -> dict[str, Any]:
    """What is in force, as a YAML file would hold it: with everything decided that the config left open."""
    values = asdict(config)
    decided = {
        "model": str(plan.folder.path),
        "name": plan.name,
        "device": plan.device,
        "dtype": plan.dtype,
        "gpu_blocks": plan.num_gpu_blocks,
        "swap_memory": plan.num_cpu_blocks * plan.block_bytes,
        "kv_cache_memory": None,  # said by gpu_blocks
        "max_model_len": plan.max_model_len,
        "max_sequences": plan.max_sequences,
        "max_batched_tokens": plan.max_batched_tokens,
        "num_threads": plan.num_threads,
    }
    values["models"] = [{name: value for name, value in {**values["models"][0], **decided}.items() if value is not None}]
    return values


def _merge(cls: type, flags: Mapping[str, Any], environ: Mapping[str, str], file: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    names = [f.name for f in fields(cls) if f.name != "models"]
    for key in file:
        if key not in names:
            if cls is ServeConfig and key in {f.name for f in fields(ModelConfig)}:
                raise ConfigError(f"{where} has {key!r} at its top; it belongs to the model: put it under `models:`, a list of one mapping")
            close = difflib.get_close_matches(str(key), names, n=1)
            raise ConfigError(f"{where} has a setting {key!r} that does not exist" + (f"; did you mean {close[0]!r}?" if close else ""))
    values: dict[str, Any] = {}
    for name in names:
        env_name = ENV_PREFIX + name.upper()
        if name in flags:
            values[name] = parse_setting(cls, name, flags[name], where=f"--{name.replace('_', '-')}")
        elif env_name in environ:
            values[name] = parse_setting(cls, name, environ[env_name], where=env_name)
        elif name in file:
            values[name] = parse_setting(cls, name, file[name], where=where)
    return values


def _refuse_misspelt_variables(environ: Mapping[str, str]) -> None:
    known = [ENV_PREFIX + f.name.upper() for cls in (ServeConfig, ModelConfig) for f in fields(cls) if f.name != "models"]
    for name in environ:
        if name.startswith(ENV_PREFIX) and name not in known and name not in _OTHER_VARIABLES:
            close = difflib.get_close_matches(name, known, n=1, cutoff=_MISSPELT_RATIO)
            if close:
                raise ConfigError(f"the environment has {name}, which is no setting; did you mean {close[0]}? else unset it")


def _check_ranges(config: ServeConfig) -> None:
    model = config.models[0]
    at_least_one = {
        "tensor_parallel_size": model.tensor_parallel_size,
        "groups": model.groups,
        "gpu_blocks": model.gpu_blocks,
        "kv_cache_memory": model.kv_cache_memory,
        "max_model_len": model.max_model_len,
        "max_sequences": model.max_sequences,
        "max_batched_tokens": model.max_batched_tokens,
        "num_threads": model.num_threads,
        "gateways": config.gateways,
        "max_request_bytes": config.max_request_bytes,
        "max_waiting_requests": config.max_waiting_requests,
        "max_waiting_tokens": config.max_waiting_tokens,
    }
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if config.gateways > MAX_GATEWAYS:
        raise ConfigError(f"gateways is {config.gateways}; one machine takes at most {MAX_GATEWAYS}")
    if config.max_request_bytes is not None and config.max_request_bytes > MAX_REQUEST_BYTES:
        raise ConfigError(f"max_request_bytes is {config.max_request_bytes}; it takes at most {MAX_REQUEST_BYTES}")
    if model.block_size < 1 or model.block_size & (model.block_size - 1):
        raise ConfigError(f"block_size is {model.block_size}; it must be a power of two, such as 16")
    if model.gpu_blocks is not None and model.kv_cache_memory is not None:
        raise ConfigError(f"gpu_blocks {model.gpu_blocks} and kv_cache_memory {model.kv_cache_memory} say the same thing twice; give one")
    if model.swap_memory is not None and model.swap_memory < 0:
        raise ConfigError(f"swap_memory is {model.swap_memory}; it must be 0 or more")
    if (config.tls_cert is None) != (config.tls_key is None):
        raise ConfigError(f"tls_cert is {config.tls_cert} and tls_key is {config.tls_key}; give both or neither")
    if config.tls_client_ca is not None and config.tls_cert is None:
        raise ConfigError(f"tls_client_ca is {config.tls_client_ca}, but there is no TLS without tls_cert and tls_key; give them too")
    if not 0 <= config.trace_sample_ratio <= 1:
        raise ConfigError(f"trace_sample_ratio is {config.trace_sample_ratio}; it must be from 0 to 1")
    for name, seconds in (
        ("request_timeout_s", config.request_timeout_s),
        ("drain_timeout_s", config.drain_timeout_s),
        ("start_timeout_s", config.start_timeout_s),
    ):
        if not 0 < seconds < 1e6:
            raise ConfigError(f"{name} is {seconds}; it must be above 0 and below 1000000")


def request_bytes(config: ServeConfig, *, max_model_len: int, vocab_size: int) -> int:
    """The largest request message that gateways of a model receive: what is larger is refused before it is taken in."""
    needed = _BYTES_OF_THE_REST + _BYTES_PER_PROMPT_TOKEN * max_model_len + _BYTES_PER_LISTED_ID * vocab_size
    return config.max_request_bytes or min(needed, MAX_REQUEST_BYTES)


def _device(config: ModelConfig) -> str:
    return config.device if config.device != "auto" else "cuda" if torch_sees_gpu() else "cpu"


def _model_path(model: str | None) -> Path:
    if model is not None and is_hub_id(model):
        return fetch_model(model)
    if model is not None:
        return Path(model).expanduser().absolute()
    return Path(str(importlib.resources.files("quire.demo_model") / "config.json")).parent


def _default_name(model: str | None, folder: ModelFolder) -> str:
    if model is None:
        return BUILT_IN_MODEL_NAME
    return hub_name(model) if is_hub_id(model) else folder.path.name


def _num_threads(num_ranks: int) -> int:
    """Threads per rank: one core is left to the scheduler and the gateway, because threads that wait for a busy core wait long."""
    return max(1, ((os.cpu_count() or 2) - 1) // num_ranks)


def _num_cpu_blocks(config: ModelConfig, *, block_bytes: int, num_gpu_blocks: int | None, device: str) -> int:
    """Blocks of a group's swap pool; 0 means that what is preempted is recomputed."""
    if config.swap_memory is None:
        most = _SWAP_BYTES[device] // block_bytes
        return 0 if config.preemption == "recompute" else most if num_gpu_blocks is None else min(num_gpu_blocks, most)
    if 0 < config.swap_memory < block_bytes:
        raise ConfigError(f"swap_memory {config.swap_memory} holds no block; one takes {block_bytes} bytes")
    if config.preemption == "swap" and config.swap_memory == 0:
        raise ConfigError("preemption = swap needs memory to swap to, and swap_memory is 0; give it, such as 1Gi")
    return config.swap_memory // block_bytes


def _num_gpu_blocks(config: ModelConfig, *, block_bytes: int, max_model_len: int, max_sequences: int, device: str) -> int | None:
    """Blocks of a group's pool. Unless told: on a GPU None, what is free there; on CPU room for max_sequences of full length, but at
    most 1 GiB and at least one."""
    if config.gpu_blocks is not None:
        return config.gpu_blocks
    if config.kv_cache_memory is not None:
        if config.kv_cache_memory < block_bytes:
            raise ConfigError(f"kv_cache_memory {config.kv_cache_memory} holds no block; one takes {block_bytes} bytes")
        return config.kv_cache_memory // block_bytes
    if device == "cuda":
        return None
    per_sequence = -(-max_model_len // config.block_size)
    return max(per_sequence, min(max_sequences * per_sequence, _CPU_KV_CACHE_BYTES // block_bytes))
