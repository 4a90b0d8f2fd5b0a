"""What a rank is told when it starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from quire.common.config import ModelPlan

# What the launch of a step is called in a trace.
TRACED_STEP: Final = "quire step"


@dataclass(frozen=True, slots=True)
class RankSpec:
    """The specification of a rank process; its fields are the keys that the parent sends."""

    group_id: str
    term: int
    rank: int
    tensor_parallel_size: int
    model_path: str
    device: str  # cpu or cuda
    dtype: str  # float32, bfloat16 or float16
    num_gpu_blocks: int | None  # None: as many as the GPU has memory for
    num_cpu_blocks: int
    block_size: int  # tokens
    max_model_len: int  # tokens of prompt and completion
    max_sequences: int  # rows of the batch
    max_batched_tokens: int  # tokens of a step
    scheduler_address: str  # ZeroMQ endpoint to connect to
    rank_lease_s: float  # the rank exits after so long without a plan
    num_threads: int  # of torch
    log_level: str
    report_path: str  # file for the reason of a failed start; "" for none
    rendezvous_path: str = ""  # file at which the ranks of the group meet, new for each term; "" for a group of one
    rendezvous_address: str = ""  # HOST:PORT instead, where rank 0 listens for the others, for a group on several hosts
    host_address: str = ""  # of this rank's host, by which the other hosts of the group reach it; "" for a group on one host
    dummy_weights: bool = False  # random weights of the right shapes instead of the folder's
    model_backend: str = "auto"  # auto, native or transformers
    early_path: str = ""  # socket at which a rank that loads before it is asked for learns whose it is (common/early_child.py); "" for none
    trace_path: str = ""  # SIGUSR1 traces the next steps into this file, NAME.json.gz (step_trace.py); "" for no such signal
    curve: dict[str, str] | None = field(default=None, repr=False)  # CurveKeys of clients, if the scheduler's address is TCP

    @property
    def name(self) -> str:
        """How logs and the scheduler's socket know this rank."""
        return f"{self.group_id}/{self.rank}"


# What an early rank need not know while it loads.
_LATE: Final = ("group_id", "term", "scheduler_address", "rank_lease_s", "log_level", "report_path", "curve", "early_path", "trace_path")


def objection(early: RankSpec, late: Mapping[str, Any]) -> str:
    """Why a rank that has begun to load by `early` cannot go on by `late`, the fields of another; "" if it can."""
    spec = RankSpec(**late)
    different = [
        f"{field.name} is {getattr(early, field.name)!r} instead of {getattr(spec, field.name)!r}"
        for field in fields(RankSpec)
        if field.name not in _LATE and getattr(early, field.name) != getattr(spec, field.name)
    ]
    return "; ".join(different)


def make_rank_spec(
    plan: ModelPlan,
    *,
    group_id: str,
    term: int,
    rank: int,
    scheduler_address: str,
    rank_lease_s: float,
    log_level: str,
    folder: Path,
    curve: dict[str, str] | None = None,
) -> RankSpec:
    """The specification of one rank of a group that runs by `plan`. The ranks' files go to `folder`, which they share."""
    return RankSpec(
        group_id=group_id,
        term=term,
        rank=rank,
        tensor_parallel_size=plan.tensor_parallel_size,
        model_path=str(plan.folder.path),
        device=plan.device,
        dtype=plan.dtype,
        num_gpu_blocks=plan.num_gpu_blocks,
        num_cpu_blocks=plan.num_cpu_blocks,
        block_size=plan.block_size,
        max_model_len=plan.max_model_len,
        max_sequences=plan.max_sequences,
        max_batched_tokens=plan.max_batched_tokens,
        scheduler_address=scheduler_address,
        rank_lease_s=rank_lease_s,
        num_threads=plan.num_threads,
        log_level=log_level,
        report_path=str(folder / f"{group_id}-{rank}-{term}.json"),
        rendezvous_path=str(folder / f"{group_id}-{term}.rendezvous") if plan.tensor_parallel_size > 1 else "",
        dummy_weights=plan.dummy_weights,
        model_backend=plan.model_backend,
        curve=curve,
    )
