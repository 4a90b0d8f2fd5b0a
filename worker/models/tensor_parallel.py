"""How one rank's share of a model is cut out of it, and where its layers exchange what they lack (Megatron's sharding).

`split_model` decides from the family's plan; `cut` makes the model's parameters as small as the share; `install_exchanges`
puts sums and gathers behind its layers. Only the last needs other ranks.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quire.common.errors import ConfigError
from quire.worker.collectives import Collective
from quire.worker.models.tensor_parallel_plans import DIVIDED_ATTRIBUTES, PLANS

# Layers whose output holds keys: where the plan splits their columns, it splits the KV heads.
_KEY_LAYERS: Final = ("k_proj", "query_key_value", "c_attn")
# Layers that hold nothing but keys or values, so that heads can be replicated when there are fewer than ranks.
_KV_LAYERS: Final = ("k_proj", "v_proj")
# Styles that leave a module or a parameter whole.
_WHOLE: Final = ("replicated_with_grad_allreduce", "replicate", "local_params")


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank holds of one parameter: ranges along one dimension, put together in their order."""

    dim: int
    ranges: tuple[tuple[int, int], ...]
    is_zero: bool = False  # a bias that another rank adds to the sum: zeros of the same shape here

    def of(self, tensor: Any) -> Tensor:
        """Cut it out of a tensor, or out of anything that is sliced like one; only the ranges are read."""
        before = (slice(None),) * self.dim
        pieces = [tensor[(*before, slice(start, end))] for start, end in self.ranges]
        part = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=self.dim)
        return torch.zeros_like(part) if self.is_zero else part


@dataclass(slots=True)
class Split:
    """One rank's share of a model. Everything that is not named here it holds whole, and computes like all others."""

    rank: int
    size: int
    parts: dict[str, Part] = field(default_factory=dict)  # by parameter
    sums: list[str] = field(default_factory=list)  # modules whose outputs are summed over ranks
    gathers: dict[str, tuple[int, ...]] = field(default_factory=dict)  # modules whose outputs are put side by side: widths by rank
    inputs: dict[str, tuple[int, int]] = field(default_factory=dict)  # modules that see these columns of their input
    embedding: tuple[str, int, int] | None = None  # the token embedding, and the ids [first, end) that are here
    splits_kv_heads: bool = False


def split_model(module: Any, *, family: str, num_kv_heads: int, rank: int, size: int) -> Split:
    """Rank `rank`'s share of a model over `size` ranks, by transformers' own plan of the family or by ours.

    module: the whole model, on any device, the meta device included; num_kv_heads: the whole model's

    Raises:
        ConfigError: the family has no plan, or one that this version cannot follow.
    """
    split = Split(rank, size)
    modules = dict(module.named_modules())
    parameters = dict(module.named_parameters())
    for pattern, style in _plan_of(module, family).items():
        if style in _WHOLE:
            continue
        for name in _matches(pattern, modules):
            if not _split_layer(split, name, modules[name], style, num_kv_heads=num_kv_heads):
                raise _refusal(family, f"its plan gives {pattern} the style {style!r}, which this version does not know")
        for name in _matches(pattern, parameters):
            if not _split_parameter(split, name, parameters[name], style):
                raise _refusal(family, f"its plan gives {pattern} the style {style!r}, which this version does not know")
    _split_vocabulary(split, module)
    return split


def cut(module: nn.Module, split: Split, *, family: str, num_heads: int, num_kv_heads: int) -> None:
    """Replace parameters by their parts, and tell modules that keep their own sizes of the new ones."""
    for name, part in split.parts.items():
        owner_name, _, parameter_name = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        setattr(owner, parameter_name, nn.Parameter(part.of(getattr(owner, parameter_name)).clone(), requires_grad=False))
        if isinstance(owner, Conv1D):
            owner.nf = owner.weight.shape[1]
    modules = dict(module.named_modules())
    for pattern, attributes in DIVIDED_ATTRIBUTES.get(family, {}).items():
        for owner in (modules[name] for name in _matches(pattern, modules)):
            for attribute in attributes:
                setattr(owner, attribute, getattr(owner, attribute) // split.size)
    if split.splits_kv_heads and num_kv_heads < split.size:
        for owner in modules.values():  # a rank's one KV head is shared by all its query heads
            if hasattr(owner, "num_key_value_groups"):
                setattr(owner, "num_key_value_groups", num_heads // split.size)  # noqa: B010
    if split.embedding is not None:
        embedding = module.get_submodule(split.embedding[0])
        assert isinstance(embedding, nn.Embedding), split.embedding
        embedding.num_embeddings = embedding.weight.shape[0]
        embedding.padding_idx = None  # only training uses it, and it may lie in another rank's rows


def install_exchanges(module: nn.Module, split: Split, collective: Collective) -> None:
    """Make the cut model's layers give what the whole one's give."""
    for name in split.sums:
        module.get_submodule(name).register_forward_hook(lambda _, __, output: _sum(output, collective))
    for name, widths in split.gathers.items():
        module.get_submodule(name).register_forward_hook(lambda _, __, output, widths=widths: collective.gather_columns(output, widths))
    for name, (start, end) in split.inputs.items():
        module.get_submodule(name).register_forward_pre_hook(lambda _, inputs, s=start, e=end: (inputs[0][..., s:e], *inputs[1:]))
    if split.embedding is not None:
        name, first, end = split.embedding
        embedding = module.get_submodule(name)
        look_up = embedding.forward

        def look_up_part(token_ids: Tensor) -> Tensor:
            """Rows that are here, zeros for the others; the sum over ranks has them all."""
            is_here = (token_ids >= first) & (token_ids < end)
            embedded: Tensor = look_up((token_ids - first).clamp(0, end - first - 1))
            return _sum(embedded.masked_fill(~is_here[..., None], 0), collective)

        embedding.forward = look_up_part


def _sum(partial: Tensor, collective: Collective) -> Tensor:
    partial = partial.contiguous()
    collective.all_reduce(partial)
    return partial


def _plan_of(module: Any, family: str) -> Mapping[str, str]:
    """Styles by pattern of a module's or a parameter's name. The vocabulary is not the plan's to split: all families' is alike."""
    if family in PLANS:
        return PLANS[family]
    plan = {name: style for name, style in (module.tp_plan or {}).items() if ".layers." in name}
    if not plan:
        raise _refusal(family, "transformers has no plan for it, and neither has this version")
    return plan


def _matches(pattern: str, names: Mapping[str, object]) -> list[str]:
    """The names that a plan's pattern means: its stars stand for numbers."""
    compiled = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name in names if compiled.fullmatch(name)]


def _split_layer(split: Split, name: str, layer: nn.Module, style: str, *, num_kv_heads: int) -> bool:
    """Split one layer; False for a style that is not known."""
    if style in ("moe_tp_experts", "all_reduce"):
        split.sums.append(name)
        return True
    weight = layer.weight
    assert isinstance(weight, Tensor), name
    # Linear keeps its weight as [out, in], Conv1D as [in, out].
    out_dim, in_dim = (1, 0) if isinstance(layer, Conv1D) else (0, 1)
    leaf = name.rpartition(".")[2]
    match style:
        case "colwise" if leaf in _KV_LAYERS and num_kv_heads < split.size:
            width = weight.shape[out_dim] // num_kv_heads
            head = split.rank * num_kv_heads // split.size
            ranges: tuple[tuple[int, int], ...] = ((head * width, (head + 1) * width),)
        case "colwise" | "colwise_gather_output":
            ranges = _ranges(weight.shape[out_dim], split)
        case "packed_colwise":
            ranges = _ranges(weight.shape[out_dim], split, num_packed=2)
        case "qkv_colwise":
            ranges = _ranges(weight.shape[out_dim], split, num_packed=3)
        case "rowwise" | "rowwise_split_input":
            ranges = _ranges(weight.shape[in_dim], split)
            split.parts[f"{name}.weight"] = Part(in_dim, ranges)
            if layer.bias is not None and split.rank > 0:
                split.parts[f"{name}.bias"] = Part(0, ((0, weight.shape[out_dim]),), is_zero=True)
            split.sums.append(name)
            if style == "rowwise_split_input":
                split.inputs[name] = ranges[0]
            return True
        case _:
            return False
    split.parts[f"{name}.weight"] = Part(out_dim, ranges)
    if layer.bias is not None:
        split.parts[f"{name}.bias"] = Part(0, ranges)
    if style == "colwise_gather_output":
        split.gathers[name] = _widths(weight.shape[out_dim], split.size)
    elif leaf in _KEY_LAYERS:
        split.splits_kv_heads = True
    return True


def _split_parameter(split: Split, name: str, parameter: Tensor, style: str) -> bool:
    """Split a parameter that belongs to no layer of its own: experts [expert, out, in], sinks; False for an unknown style."""
    out_dim, in_dim = max(0, parameter.dim() - 2), parameter.dim() - 1
    match style:
        case "colwise":
            split.parts[name] = Part(out_dim, _ranges(parameter.shape[out_dim], split))
        case "packed_colwise":
            split.parts[name] = Part(out_dim, _ranges(parameter.shape[out_dim], split, num_packed=2))
        case "rowwise":
            split.parts[name] = Part(in_dim, _ranges(parameter.shape[in_dim], split))
        case "packed_rowwise":
            split.parts[name] = Part(in_dim, _ranges(parameter.shape[in_dim], split, num_packed=2))
        case "pairs_rowwise":
            split.parts[name] = Part(in_dim, tuple((2 * s, 2 * e) for s, e in _ranges(parameter.shape[in_dim] // 2, split)))
        case "first_rank":
            if split.rank > 0:
                split.parts[name] = Part(in_dim, ((0, parameter.shape[in_dim]),), is_zero=True)
        case _:
            return False
    return True


def _split_vocabulary(split: Split, module: Any) -> None:
    """Rows of the token embedding and of the output layer, which may be one tensor."""
    names = {id(layer): name for name, layer in module.named_modules()}
    embedding, output = module.get_input_embeddings(), module.get_output_embeddings()
    if isinstance(embedding, nn.Embedding):
        name, num_rows = names[id(embedding)], embedding.weight.shape[0]
        split.embedding = (name, *_bounds(num_rows, split.size, split.rank))
        split.parts[f"{name}.weight"] = Part(0, _ranges(num_rows, split))
    if isinstance(output, nn.Linear):
        name, num_rows = names[id(output)], output.weight.shape[0]
        split.gathers[name] = _widths(num_rows, split.size)
        split.parts[f"{name}.weight"] = Part(0, _ranges(num_rows, split))
        if output.bias is not None:
            split.parts[f"{name}.bias"] = Part(0, _ranges(num_rows, split))


def _ranges(width: int, split: Split, *, num_packed: int = 1) -> tuple[tuple[int, int], ...]:
    """A rank's columns of a matrix that holds `num_packed` matrices of one width side by side: a range of each."""
    each = width // num_packed
    start, end = _bounds(each, split.size, split.rank)
    return tuple((index * each + start, index * each + end) for index in range(num_packed))


def _widths(width: int, size: int) -> tuple[int, ...]:
    return tuple(end - start for start, end in (_bounds(width, size, rank) for rank in range(size)))


def _bounds(width: int, size: int, rank: int) -> tuple[int, int]:
    """Where a rank's part begins and ends; parts differ by at most one."""
    return rank * width // size, (rank + 1) * width // size


def _refusal(family: str, why: str) -> ConfigError:
    return ConfigError(f"model family {family!r} cannot be split over ranks: {why}; use tensor_parallel_size 1", reason="FAMILY_NOT_SPLIT")
