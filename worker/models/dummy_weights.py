"""Weights that nobody trained: random numbers of a model's shapes, for measuring speed without its files."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from quire.common.model_folder import ModelFolder

# What most families draw their matrices with: activations stay finite in 16 bits through any number of layers.
STANDARD_DEVIATION: Final = 0.02


def dummy_weight(name: str, shape: tuple[int, ...], *, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A weight as a family would begin its training with: norms are ones, biases zeros, matrices normal.

    It depends on its name, shape and device alone: what all ranks of a group hold whole is equal on all of them.
    """
    if len(shape) < 2:
        make = torch.ones if name.endswith("weight") else torch.zeros
        return make(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=STANDARD_DEVIATION, generator=generator)


def make_dummy_module(cls: Any, config: Any, *, dtype: torch.dtype, device: str) -> Any:
    """A module of `cls` with dummy weights. At no time is there more of them than the module keeps: `cls` may cut itself."""
    with _weightless():
        module = cls(config)
    for owner_name, owner in module.named_modules():
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            name = f"{owner_name}.{leaf}" if owner_name else leaf
            weight = dummy_weight(name, tuple(parameter.shape), dtype=dtype, device=device)
            setattr(owner, leaf, nn.Parameter(weight, requires_grad=False))
    module.tie_weights()
    return module.to(device)  # its buffers: they were computed, on the CPU


def count_built_parameters(folder: ModelFolder) -> int:
    """Parameters of any model that transformers can build, tied ones counted once."""
    config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _weightless() -> Iterator[None]:
    """Parameters of modules that are made in here have shapes but no memory; buffers are real."""
    register = nn.Module.register_parameter

    def register_shape(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_shape  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
