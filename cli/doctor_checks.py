"""What `quire doctor` looks at besides GPUs. Each check starts nothing and changes nothing."""

import ctypes
import errno
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

from quire.cli.doctor_finding import Finding, bad, good, note
from quire.cli.serve import check_credentials, check_tokenizer
from quire.cluster.controller.listen_address import check_listen_address
from quire.common.config import DEFAULT_METRICS_LISTEN, ModelPlan, ServeConfig
from quire.common.errors import QuireError
from quire.worker.gpu_memory import weight_bytes
from quire.worker.host_memory import available_memory_bytes

MIN_PYTHON: Final = (3, 11)
# Room that a run's folder takes: logs, Ray's own logs and sockets.
MIN_DISK_BYTES: Final = 2**30
# Ray's object store (local_cluster.OBJECT_STORE_BYTES) and what ranks on CPU exchange.
MIN_SHARED_MEMORY_BYTES: Final = 160 * 2**20
# A call takes a descriptor at times, and a gateway holds 8192 calls.
MIN_OPEN_FILES: Final = 4096
# Paths of sockets have at most 107 bytes, and Ray adds 69 to ours (local_cluster.MAX_BASE_CHARS).
MAX_TEMPORARY_CHARS: Final = 20
# A clock before this is not set.
OLDEST_SENSIBLE_TIME_S: Final = 1_735_689_600.0  # 2025-01-01
_TIME_ERROR: Final = 5  # adjtimex: the clock is not synchronised
_GIB: Final = 2**30


def python() -> Iterator[Finding]:
    version = platform.python_version()
    if sys.version_info < MIN_PYTHON:
        yield bad(f"Python {version}", f"install Python {'.'.join(map(str, MIN_PYTHON))} or newer")
    elif platform.system() != "Linux":
        yield bad(f"Python {version} on {platform.system()}", "serve on Linux; clients run anywhere")
    else:
        yield good(f"Python {version} on {platform.system()} {platform.release()}, {os.cpu_count()} CPU cores")


def packages() -> Iterator[Finding]:
    """Everything that the server extra asks for, at a version that it asks for."""
    found, wrong = [], []
    try:
        requirements = metadata.requires("quire") or ()
    except metadata.PackageNotFoundError:
        yield bad("packages: quire runs from its source without being installed", 'install it with: pip install "quire[server]"')
        return
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": "server"}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is missing")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version}")
        else:
            wrong.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    if wrong:
        yield bad(f"packages: {'; '.join(wrong)}", 'install them with: pip install "quire[server]"')
    shown = [entry for entry in found if entry.split()[0] in ("torch", "transformers", "grpcio", "triton")]
    yield good(f"{len(found)} packages, among them {', '.join(shown)}")


def ray() -> Iterator[Finding]:
    """Its version is among the packages; what else may go wrong is in the environment."""
    try:
        version = metadata.version("ray")
    except metadata.PackageNotFoundError:
        return  # said above
    leftover = sorted(name for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if name in os.environ)
    if leftover:
        yield note(
            f"Ray {version}, with a token of its own for each run; the environment has {', '.join(leftover)}",
            "`quire serve` starts a Ray of its own and does not use these; unset them if you did not mean them for others",
        )
    else:
        yield good(f"Ray {version}, with a token of its own for each run")


def temporary_folder() -> Iterator[Finding]:
    base = tempfile.gettempdir()
    folder = base if len(base) <= MAX_TEMPORARY_CHARS else "/tmp"
    if folder != base:
        yield note(f"the temporary folder {base} is too long for the paths of sockets; /tmp is used instead")
    try:
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        yield bad(f"the temporary folder {folder} cannot be used: {error.strerror}", "set TMPDIR to a short, local folder")
        return
    if not os.access(folder, os.W_OK):
        yield bad(f"the temporary folder {folder} cannot be written to", "set TMPDIR to one that can, of at most 20 characters")
    elif free_bytes < MIN_DISK_BYTES:
        yield bad(f"{folder} has {free_bytes / _GIB:.2f} GiB free", f"make room: logs and sockets want {MIN_DISK_BYTES / _GIB:.0f} GiB")
    else:
        yield good(f"{folder} has {free_bytes / _GIB:.1f} GiB free for logs and sockets")


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    try:
        room = os.statvfs(folder)
    except OSError as error:
        yield bad(f"shared memory ({folder}): {error.strerror}", f"mount a tmpfs at {folder}")
        return
    free_bytes = room.f_bavail * room.f_frsize
    text = f"shared memory ({folder}) has {free_bytes / 2**20:.0f} MiB free"
    if free_bytes < MIN_SHARED_MEMORY_BYTES:
        need = f"{MIN_SHARED_MEMORY_BYTES / 2**20:.0f} MiB are wanted"
        yield bad(text, f"{need}; in Docker start with --shm-size=1g, in Kubernetes mount an emptyDir with medium: Memory")
    else:
        yield good(text)


def open_files() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        yield note(f"a process may open {soft} files", f"with many clients at once raise it: ulimit -n {MIN_OPEN_FILES * 4}")
    else:
        yield good(f"a process may open {'any number of' if soft == resource.RLIM_INFINITY else soft} files")


def clock() -> Iterator[Finding]:
    """Messages inside the cluster carry durations alone; certificates and logs need the time."""
    now_s = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s))
    if now_s < OLDEST_SENSIBLE_TIME_S:
        yield bad(f"the clock says {shown}", "set it: no certificate is valid then")
    elif _is_synchronised() is False:
        yield note(f"the clock says {shown} and is not synchronised", "run chrony or systemd-timesyncd, so that logs of hosts agree")
    else:
        yield good(f"the clock says {shown}")


def ports(config: ServeConfig) -> Iterator[Finding]:
    """The addresses to listen on, and who may reach them."""
    try:
        check_listen_address(
            config.listen, insecure=config.insecure, has_tls=config.tls_cert is not None, has_tokens=config.token_file is not None
        )
        check_credentials(config)
    except QuireError as error:
        yield bad(error.message, "or keep to 127.0.0.1")
    wanted = (
        ("clients", config.listen, False),
        ("metrics of the gateway", config.metrics_listen or DEFAULT_METRICS_LISTEN["gateway"], config.metrics_listen is None),
        (
            "metrics of the controller",
            config.controller_metrics_listen or DEFAULT_METRICS_LISTEN["controller"],
            config.controller_metrics_listen is None,
        ),
    )
    for purpose, address, may_move in wanted:
        trouble = _cannot_bind(address)
        if trouble is None:
            yield good(f"{address} is free for {purpose}")
        elif may_move:
            yield note(f"{address}, meant for {purpose}: {trouble}; a free port will be used")
        else:
            yield bad(f"{address}, for {purpose}: {trouble}", "end who has it (ss -ltnp shows who), or give another address")


def model(plan: ModelPlan) -> Iterator[Finding]:
    """That the folder can be read was seen when the plan was made."""
    try:
        check_tokenizer(plan)
    except QuireError as error:
        yield bad(f"the tokenizer of {plan.name}: {error.message}", "fetch the model's folder again, complete")
        return
    kind = f"{plan.folder.model_type}, {plan.dtype} on {plan.device}"
    yield good(f"the model {plan.name} ({kind}) with its tokenizer, {plan.max_model_len} tokens at most, in {plan.folder.path}")


def memory(plan: ModelPlan) -> Iterator[Finding]:
    """On CPU: weights, KV cache and swap pool of all ranks against what this host has. On a GPU the swap pools alone."""
    num_ranks = plan.groups * plan.tensor_parallel_size
    weights = weight_bytes(plan.folder, dtype=plan.dtype, num_ranks=plan.tensor_parallel_size) if plan.device == "cpu" else 0
    blocks = (plan.num_gpu_blocks or 0) * plan.block_bytes if plan.device == "cpu" else 0
    swap = plan.num_cpu_blocks * plan.block_bytes
    needed = num_ranks * (weights + blocks + swap)
    available = available_memory_bytes()
    parts = [f"{size / _GIB:.2f} GiB {name}" for size, name in ((weights, "weights"), (blocks, "KV cache"), (swap, "swap pool")) if size]
    text = f"host memory: {num_ranks} x ({' + '.join(parts) or 'nothing'}) = {needed / _GIB:.2f} GiB"
    if available is None:
        yield note(f"{text}; this system does not say how much is available")
    elif needed > available:
        yield bad(f"{text} of {available / _GIB:.2f} GiB available", "lower --kv-cache-memory, --swap-memory or --groups")
    else:
        yield good(f"{text} of {available / _GIB:.2f} GiB available")


def _cannot_bind(address: str) -> str | None:
    """Why nobody can listen there now; None if somebody could."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]") or None, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does: what has just ended does not count
            probe.bind(where)
            probe.listen(1)
    except OSError as error:
        return "the port is taken" if error.errno == errno.EADDRINUSE else str(error)
    except ValueError:
        return "it is not HOST:PORT"
    return None


def _is_synchronised() -> bool | None:
    """What the kernel knows of the clock; None where it cannot be asked."""
    try:
        adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):
        return None
    state = int(adjtimex(ctypes.create_string_buffer(256)))  # struct timex of zeros: changes nothing; it has 208 bytes
    return None if state < 0 else state != _TIME_ERROR
