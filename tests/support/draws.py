"""Rows to draw from."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quire.kernels.sample import SamplingInputs

FILTERS: dict[str, dict[str, float]] = {
    "none": {},
    "top-k": {"top_k": 5},
    "top-k of all": {"top_k": 5000},
    "top-p": {"top_p": 0.8},
    "tiny top-p": {"top_p": 1e-6},
    "min-p": {"min_p": 0.3},
    "all": {"top_k": 9, "top_p": 0.7, "min_p": 0.02, "temperature": 1.7},
    "hot": {"temperature": 3.0, "top_k": 50, "top_p": 0.9},
}


def inputs_of(rows: Sequence[Mapping[str, float]]) -> SamplingInputs:
    """SamplingInputs from one dict per row; what a dict leaves out changes nothing."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "seed": 0, "sequence_index": 0, "position": 0}
    filled = [{**defaults, **row} for row in rows]
    columns = {
        name: torch.tensor([row[name] for row in filled], dtype=torch.float64 if isinstance(default, float) else torch.int64)
        for name, default in defaults.items()
    }
    return SamplingInputs(rows=torch.arange(len(rows)), **columns)


def logits_of(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 4
