"""One rank as a process: `python -m quire.worker.rank_process`, started by common/child_process.start_child."""

import logging
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from quire.common.child_process import enter_child
from quire.common.early_child import EarlyChild
from quire.common.errors import ConfigError, QuireError
from quire.common.files import write_json_atomically
from quire.common.messages import LAYOUT_VERSION, PROTOCOL_VERSION, RankHello
from quire.common.model_folder import ModelFolder, read_model_folder
from quire.worker.gpu_memory import (
    MARGIN_BYTES,
    STEP_MARGIN,
    blocks_that_fit,
    check_gpu_holds,
    check_step_fits,
    draw_bytes,
    graph_bytes,
    partial_bytes,
    weight_bytes,
)
from quire.worker.host_memory import available_memory_bytes, check_pool_fits
from quire.worker.rank_spec import RankSpec, objection

# torch and transformers take seconds to import: only after the process is tied to its parent, and timed.
if TYPE_CHECKING:
    from quire.worker.compile_ahead import CompileAhead
    from quire.worker.models.llama import LlamaModel
    from quire.worker.models.transformers_model import TransformersModel
    from quire.worker.runner import Runner

_log = logging.getLogger(__name__)


def main() -> int:
    """Load the model, say hello, obey plans; the exit code: 0 when asked to stop, 1 otherwise."""
    spec = RankSpec(**enter_child())
    _begin_log(spec)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # while loading, there is nothing to finish
    early = None
    if spec.early_path:
        early = EarlyChild(Path(spec.early_path), objection=partial(objection, spec))
    with ExitStack() as at_end:
        failure = ""
        try:
            runner, hello, phases_s = _load(spec, at_end)
        except QuireError as error:
            _log.error("%s", error.message)
            failure = error.message
        except Exception as error:
            _log.exception("the rank could not start")
            failure = f"{type(error).__name__}: {error}"
        if early is not None:
            spec = RankSpec(**early.wait())
            _begin_log(spec)
        if failure:
            _report(spec, failure)
            return 1
        if early is not None:
            _log.info("began to load before it was asked for, and is %s", spec.name)
            hello = msgspec.structs.replace(hello, group_id=spec.group_id, term=spec.term)

        from quire.worker.rank_loop import RankLoop

        return RankLoop(spec, runner, phases_s=phases_s).run(hello)


def _begin_log(spec: RankSpec) -> None:
    line = f"%(asctime)s %(levelname)s rank {spec.name}: %(message)s"
    logging.basicConfig(level=spec.log_level.upper(), stream=sys.stderr, format=line, force=True)


def _load(spec: RankSpec, at_end: ExitStack) -> "tuple[Runner, RankHello, dict[str, float]]":
    """Everything between the specification and the hello, logged by phase, and what each phase took. `at_end` lets go of the
    other ranks.

    Raises:
        ConfigError: this model cannot be served with these settings on this host.
        Unavailable: another rank of the group did not come this far.
    """
    phases: list[tuple[str, float]] = []
    phase_start_s = time.perf_counter()

    def end_phase(name: str) -> None:
        nonlocal phase_start_s
        now_s = time.perf_counter()
        phases.append((name, now_s - phase_start_s))
        phase_start_s = now_s

    folder = read_model_folder(Path(spec.model_path), needs_weights=not spec.dummy_weights)
    block_bytes = spec.block_size * folder.kv_bytes_per_token(dtype=spec.dtype, tensor_parallel_size=spec.tensor_parallel_size)
    _check_host_memory(spec, block_bytes)
    import torch

    torch.set_num_threads(spec.num_threads)
    torch.set_grad_enabled(False)
    end_phase("torch")
    from quire.worker.collectives import Collective, connect, connect_hosts, least
    from quire.worker.cuda_swap_pool import pin_slabs
    from quire.worker.graphed_steps import GraphedSteps
    from quire.worker.kv_cache import KvCache
    from quire.worker.models.llama import LlamaModel
    from quire.worker.models.load_model import DTYPES, load_model
    from quire.worker.runner import Runner
    from quire.worker.warm_up import measure_prefill, touch_decodes, touch_libraries

    end_phase("imports")
    compiling = _compile_ahead(spec, folder)
    if spec.device == "cuda":
        try:
            _check_gpu(spec, folder, block_bytes)
        except ConfigError:
            if compiling is None or compiling.is_done:
                raise
            compiling.wait()  # it may be they who take what is missing
            _check_gpu(spec, folder, block_bytes)
    if compiling is not None:
        compiling.begin()
        # A large model leaves too little beside its weights for those who compile.
        if not compiling.is_done and _room_beside_weights(spec, folder) < compiling.max_gpu_bytes:
            compiling.wait()
    collective: Collective | None = None
    if spec.tensor_parallel_size > 1:
        if spec.rendezvous_address:
            collective = connect_hosts(
                rendezvous_address=spec.rendezvous_address,
                host_address=spec.host_address,
                rank=spec.rank,
                size=spec.tensor_parallel_size,
            )
        else:
            collective = connect(
                rendezvous_path=Path(spec.rendezvous_path),
                rank=spec.rank,
                size=spec.tensor_parallel_size,
                **(_gpu_bytes(spec, folder) if spec.device == "cuda" else {}),
            )
        at_end.callback(collective.close)
        _log.info("all %d ranks have met, over %s", spec.tensor_parallel_size, type(collective).__name__)
        end_phase("ranks")
    model = load_model(
        folder,
        dtype=spec.dtype,
        device=spec.device,
        backend=spec.model_backend,
        has_dummy_weights=spec.dummy_weights,
        collective=collective,
    )
    end_phase("weights")

    def make_kv_cache(num_blocks: int) -> KvCache:
        return KvCache(
            num_blocks=num_blocks,
            num_layers=folder.num_layers,
            num_kv_heads=model.num_kv_heads,
            block_size=spec.block_size,
            head_dim=folder.head_dim,
            dtype=DTYPES[spec.dtype],
            device=spec.device,
        )

    beside = ThreadPoolExecutor(1)
    pinning = beside.submit(pin_slabs, make_kv_cache(1), num_blocks=spec.num_cpu_blocks) if spec.device == "cuda" else None
    beside.shutdown(wait=False)
    if not isinstance(model, LlamaModel):
        from quire.worker.models.self_check import check_model

        check_model(model, dtype=spec.dtype, device=spec.device, max_model_len=spec.max_model_len)
        end_phase("self-check")
    if compiling is not None:
        if not compiling.is_done and isinstance(model, LlamaModel):
            touch_libraries(model, max_tokens=spec.max_batched_tokens)
            end_phase("libraries")
        compiling.wait()
        end_phase("kernels")
    _check_host_memory(spec, block_bytes)  # once more: the weights are in memory now
    slabs = None
    if pinning is not None:
        num_gpu_blocks = least(collective, _num_gpu_blocks(spec, model, block_bytes))
        slabs = pinning.result()
    else:
        assert spec.num_gpu_blocks is not None, "a pool of free memory is for GPUs"
        num_gpu_blocks = spec.num_gpu_blocks
    kv_cache = make_kv_cache(num_gpu_blocks)
    assert kv_cache.block_bytes == block_bytes, (kv_cache.block_bytes, block_bytes)
    runner = Runner(
        model,
        kv_cache,
        rank=spec.rank,
        max_rows=spec.max_sequences,
        max_model_len=spec.max_model_len,
        max_batched_tokens=spec.max_batched_tokens,
        device=spec.device,
        num_cpu_blocks=spec.num_cpu_blocks,
        slabs=slabs,
    )
    end_phase("pool")
    if spec.device == "cuda" and isinstance(runner.steps, GraphedSteps):
        runner.steps.capture()
        end_phase("graphs")
    bytes_per_s = runner.swap_pool.measure()
    if spec.device == "cuda":
        touch_decodes(runner, max_rows=spec.max_sequences)
    speeds = measure_prefill(runner, max_tokens=min(spec.max_batched_tokens, spec.max_model_len - 1), collective=collective)
    end_phase("warm-up")
    total_s = sum(seconds for _, seconds in phases)
    _log.info(
        "ready in %.2f s (%s); %d blocks of %d tokens, %.1f MiB, and %d to swap to%s; prefill %s tokens/s",
        total_s,
        ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases),
        num_gpu_blocks,
        spec.block_size,
        num_gpu_blocks * block_bytes / 2**20,
        runner.swap_pool.num_blocks,
        " at {:.1f} GB/s in, {:.1f} GB/s out".format(*(speed / 1e9 for speed in bytes_per_s)) if any(bytes_per_s) else "",
        ", ".join(f"{length}: {speed:.0f}" for length, speed in speeds) or "not measured",
    )
    hello = RankHello(
        version=PROTOCOL_VERSION,
        group_id=spec.group_id,
        term=spec.term,
        rank=spec.rank,
        num_gpu_blocks=num_gpu_blocks,
        num_cpu_blocks=runner.swap_pool.num_blocks,
        block_bytes=block_bytes,
        h2d_bytes_per_s=bytes_per_s[0],
        d2h_bytes_per_s=bytes_per_s[1],
        prefill_tokens_per_s=speeds,
        max_rows=spec.max_sequences,
        model_fingerprint=folder.fingerprint,
        layout_version=LAYOUT_VERSION,
        device=spec.device,
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    return runner, hello, dict(phases)


def _gpu_bytes(spec: RankSpec, folder: ModelFolder) -> dict[str, int]:
    """How much of this rank's GPU the others read, for connect()."""
    return {
        "gpu_partial_bytes": partial_bytes(folder, dtype=spec.dtype, max_tokens=max(spec.max_batched_tokens, spec.max_sequences)),
        "gpu_draw_bytes": draw_bytes(folder, dtype=spec.dtype, num_ranks=spec.tensor_parallel_size, max_rows=spec.max_sequences),
    }


def _compile_ahead(spec: RankSpec, folder: ModelFolder) -> "CompileAhead | None":
    if spec.device != "cuda":
        return None
    from quire.worker.compile_ahead import compile_ahead  # imports Triton

    return compile_ahead(spec, folder)


def _check_host_memory(spec: RankSpec, block_bytes: int) -> None:
    """On CPU the swap pool lies in the same memory. On a GPU there is only that, and it shrinks by itself."""
    if spec.device == "cuda":
        return
    assert spec.num_gpu_blocks is not None, "a pool of free memory is for GPUs"
    num_blocks = spec.num_gpu_blocks + spec.num_cpu_blocks
    available_bytes = available_memory_bytes()
    check_pool_fits(num_blocks=num_blocks, block_bytes=block_bytes, available_bytes=available_bytes, num_ranks=spec.tensor_parallel_size)


def _check_gpu(spec: RankSpec, folder: ModelFolder, block_bytes: int) -> None:
    """That there is a GPU, and that it can hold what it is told to."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(f"device = cuda, and torch {torch.__version__} sees no GPU here; use device cpu, or a torch built for CUDA")
    if spec.rendezvous_address:
        raise ConfigError(
            f"the {spec.tensor_parallel_size} ranks of group {spec.group_id} are placed on several hosts, and GPUs exchange data within "
            "one only; lower tensor_parallel_size to the GPUs of a host, or use device cpu"
        )
    num_visible = torch.cuda.device_count()
    if num_visible < spec.tensor_parallel_size:
        raise ConfigError(f"tensor_parallel_size is {spec.tensor_parallel_size}, and this rank sees {num_visible} GPUs of its group")
    check_gpu_holds(
        num_blocks=spec.num_gpu_blocks,
        block_bytes=block_bytes,
        weight_bytes=weight_bytes(folder, dtype=spec.dtype, num_ranks=spec.tensor_parallel_size),
        free_bytes=torch.cuda.mem_get_info(spec.device)[0],
    )


def _room_beside_weights(spec: RankSpec, folder: ModelFolder) -> int:
    """Bytes of the GPU that the weights will leave of what is free now."""
    import torch

    return torch.cuda.mem_get_info(spec.device)[0] - weight_bytes(folder, dtype=spec.dtype, num_ranks=spec.tensor_parallel_size)


def _num_gpu_blocks(spec: RankSpec, model: "TransformersModel | LlamaModel", block_bytes: int) -> int:
    """As many KV blocks as told, else those that the GPU has room for behind the weights, the largest step and a margin."""
    import torch

    from quire.worker.graph_sizes import launch_bound_tokens, mixed_sizes
    from quire.worker.models.llama import LlamaModel
    from quire.worker.models.load_model import DTYPES
    from quire.worker.warm_up import measure_step_bytes

    step_bytes = measure_step_bytes(
        model,
        block_size=spec.block_size,
        max_rows=spec.max_sequences,
        max_tokens=spec.max_batched_tokens,
        max_model_len=spec.max_model_len,
        dtype=DTYPES[spec.dtype],
        device=spec.device,
    )
    torch.cuda.empty_cache()
    if isinstance(model, LlamaModel):
        bound = launch_bound_tokens(layer_parameters=model.layer_parameters)
        largest = max(mixed_sizes(spec.max_batched_tokens, launch_bound_tokens=bound), default=0)
        step_bytes += graph_bytes(step_bytes=step_bytes, max_tokens=spec.max_batched_tokens, largest_graph=largest)
    free_bytes, all_bytes = torch.cuda.mem_get_info(spec.device)
    if spec.num_gpu_blocks is not None:
        check_step_fits(num_blocks=spec.num_gpu_blocks, free_bytes=free_bytes, step_bytes=step_bytes, block_bytes=block_bytes)
        return spec.num_gpu_blocks
    num_blocks = blocks_that_fit(free_bytes=free_bytes, step_bytes=step_bytes, block_bytes=block_bytes)
    _log.info(
        "of %.2f GiB the GPU has %.2f free behind the weights; %.2f go to the largest step and to graphs, %.2f are margin: room for %d "
        "KV blocks",
        *(size / 2**30 for size in (all_bytes, free_bytes, step_bytes, MARGIN_BYTES + STEP_MARGIN * step_bytes)),
        num_blocks,
    )
    return num_blocks


def _report(spec: RankSpec, message: str) -> None:
    """Leave the reason of a failed start for the parent: whole or not at all."""
    if spec.report_path:
        write_json_atomically(Path(spec.report_path), {"error": message})


if __name__ == "__main__":
    sys.exit(main())
