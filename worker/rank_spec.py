"""What a rank is told when it starts."""

from dataclasses import dataclass


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
    dummy_weights: bool = False  # random ones, and no files are read
    model_backend: str = "auto"  # native, transformers, or auto

    @property
    def name(self) -> str:
        """How logs and the scheduler's socket know this rank."""
        return f"{self.group_id}/{self.rank}"
