"""Any decoder that transformers runs: its own modules, with our paged attention in the place of its own."""

import inspect
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from quire.common.errors import ConfigError
from quire.common.model_folder import ModelFolder
from quire.kernels.paged_attention import paged_attention
from quire.kernels.store_kv import store_kv
from quire.worker.collectives import Collective
from quire.worker.kv_cache import KvCache
from quire.worker.models.checkpoint import Checkpoint
from quire.worker.models.dummy_weights import make_dummy_module
from quire.worker.models.load_model import DTYPES
from quire.worker.models.packed_linear import pack_linears
from quire.worker.models.tensor_parallel import Split, cut, install_exchanges, split_model
from quire.worker.step_inputs import StepInputs

_log = logging.getLogger(__name__)

# transformers keeps attention functions by name, process-wide; a name per model lets the function be that model's method.
_names = itertools.count()

# What transformers would report of weights that are all there.
_NOTHING_WRONG: Final[dict[str, Any]] = {"missing_keys": (), "mismatched_keys": ()}


class TransformersModel:
    """A model, or one rank's share of it, whose attention writes to and reads from a KvCache."""

    def __init__(self, module: Any, folder: ModelFolder, split: Split | None = None) -> None:
        self.folder = folder
        self._split = split
        self.family = folder.model_type
        self.vocab_size = folder.vocab_size
        self.module = module
        # What attention was called for in the last forward, for the check at load: sliding window by layer.
        self.layers_seen: dict[int, int | None] = {}
        self._step: tuple[StepInputs, KvCache] | None = None
        self._takes_logits_index = "logits_to_keep" in inspect.signature(module.forward).parameters
        self._attention_name = f"quire_paged_{next(_names)}"
        AttentionInterface.register(self._attention_name, self._attend)
        AttentionMaskInterface.register(self._attention_name, _no_mask)
        self._set_attention(self._attention_name)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this share, which its cache holds."""
        return self.folder.kv_heads_per_rank(1 if self._split is None else self._split.size)

    def join(self, collective: Collective) -> None:
        """Exchange with the other ranks from now on; every rank then makes the same calls in the same order."""
        assert self._split is not None, "a whole model has nobody to join"
        assert (collective.rank, collective.size) == (self._split.rank, self._split.size), "another rank's share"
        install_exchanges(self.module, self._split, collective)

    def forward(self, inputs: StepInputs, kv_cache: KvCache, *, logits_index: Tensor) -> Tensor:
        """Compute a step's tokens: their keys and values go to the cache, the logits of some of them come back.

        logits_index: [n] int64, places in the step's tokens
        result:       [n, vocab_size] float32
        """
        self.layers_seen = {}
        self._step = (inputs, kv_cache)
        try:
            arguments = {"logits_to_keep": logits_index} if self._takes_logits_index else {}
            output = self.module(
                input_ids=inputs.token_ids[None], position_ids=inputs.positions[None], attention_mask=None, use_cache=False, **arguments
            )
        finally:
            self._step = None
        logits: Tensor = output.logits[0] if self._takes_logits_index else output.logits[0, logits_index]
        return logits[:, : self.vocab_size].float()

    def own_logits(self, token_ids: Tensor) -> Tensor:
        """The model's own eager forward of one whole sequence, for comparison.

        token_ids: [num_tokens] int64; result: [num_tokens, vocab_size] float32
        """
        self._set_attention("eager")
        try:
            logits: Tensor = self.module(input_ids=token_ids[None], use_cache=False).logits[0]
        finally:
            self._set_attention(self._attention_name)
        return logits[:, : self.vocab_size].float()

    def _set_attention(self, name: str) -> None:
        with _quiet():  # families without the interface are found by the check at load, and named in our words
            self.module.set_attn_implementation(name)

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """What every layer calls. query: [1, num_heads, num_tokens, head_dim]; result: [1, num_tokens, num_heads, head_dim]."""
        assert self._step is not None, "attention outside forward"
        inputs, kv_cache = self._step
        self.layers_seen[module.layer_idx] = sliding_window
        _check_widths(key, value, kv_cache)
        layer = kv_cache.layer(module.layer_idx)
        store_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), layer, inputs.slot_mapping)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        queries = query[0].transpose(0, 1)
        how: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap, "sinks": s_aux}
        if inputs.kernels is None:
            attended = paged_attention(queries, layer, inputs.ragged, **how)
        else:
            attended = inputs.kernels.attend(queries, layer, **how)
        return attended[None], None


def load_transformers_model(
    folder: ModelFolder, *, dtype: str, device: str, collective: Collective | None = None, dummy_weights: bool = False
) -> TransformersModel:
    """Read the weights, from safetensors alone, and put paged attention in.

    collective:    the ranks over which the model is split; this rank reads its part of each weight. None: the model is whole.
    dummy_weights: no file is read but config.json; the weights are random, the same ones each time

    Raises:
        ConfigError: transformers does not know the family, it cannot be split, or the files do not hold exactly its weights.
    """
    rank, size = (0, 1) if collective is None else (collective.rank, collective.size)
    model = load_part(folder, dtype=dtype, device=device, rank=rank, size=size, dummy_weights=dummy_weights)
    pack_linears(model.module)
    if collective is not None:
        model.join(collective)
    return model


def load_part(folder: ModelFolder, *, dtype: str, device: str, rank: int, size: int, dummy_weights: bool = False) -> TransformersModel:
    """One rank's share of a model. With size > 1 it computes nothing right before it has joined the others.

    Raises:
        ConfigError: as for load_transformers_model.
    """
    started_s = time.perf_counter()
    checkpoint = None if dummy_weights else Checkpoint(folder)
    try:
        with _quiet():
            module, report, split = _load_module(folder, checkpoint, dtype=dtype, device=device, rank=rank, size=size)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"model family {folder.model_type!r} cannot be loaded: {_first_line(error)}", reason="MODEL_NOT_LOADED"
        ) from error
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if wrong:
        raise ConfigError(
            f"the model's files lack {len(wrong)} weights of the {folder.model_type!r} family or hold them in another shape, "
            f"{wrong[0]} first; get the folder again",
            reason="WEIGHTS_INCOMPLETE",
        )
    module = module.eval().requires_grad_(False).to(device)
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    _log.info(
        "loaded %s, %.1f M parameters, as %s on %s in %.2f s",
        folder.model_type if size == 1 else f"rank {rank}'s part of {folder.model_type} over {size} ranks",
        num_parameters / 1e6,
        dtype,
        device,
        time.perf_counter() - started_s,
    )
    if split is not None and not split.splits_kv_heads:
        _log.warning("the plan of family %r splits no keys: each rank holds all %d KV heads", folder.model_type, folder.num_kv_heads)
    try:
        return TransformersModel(module, folder, split)
    except Exception as error:
        raise ConfigError(
            f"model family {folder.model_type!r} does not take another attention: {_first_line(error)}", reason="FAMILY_NOT_SUPPORTED"
        ) from error


def _load_module(
    folder: ModelFolder, checkpoint: Checkpoint | None, *, dtype: str, device: str, rank: int, size: int
) -> tuple[Any, dict[str, Any], Split | None]:
    """The module, transformers' report on its weights, and how it was split. checkpoint: None for dummy weights, made on `device`."""
    config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    cls: Any = type(whole)
    split: Split | None = None
    if size > 1:
        if getattr(whole.config, "quantization_config", None) is not None:
            raise ConfigError(
                f"the weights of {folder.path.name} are quantized, and parts of such are not read; use tensor_parallel_size 1",
                reason="FAMILY_NOT_SPLIT",
            )
        family, num_kv_heads = folder.model_type, folder.num_kv_heads
        split = split_model(whole, family=family, num_kv_heads=num_kv_heads, rank=rank, size=size)
        if checkpoint is not None:
            shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
            checkpoint.cut(whole, split.parts, shapes, family=family)
        cls = _cut_class(cls, lambda module: cut(module, split, family=family, num_heads=folder.num_heads, num_kv_heads=num_kv_heads))
    if checkpoint is None:
        return make_dummy_module(cls, whole.config, dtype=DTYPES[dtype], device=device), _NOTHING_WRONG, split
    module, report = cls.from_pretrained(
        None,
        config=whole.config,
        state_dict=dict(checkpoint.tensors),
        dtype=DTYPES[dtype],
        attn_implementation="eager",
        output_loading_info=True,
    )
    return module, report, split


def _cut_class(cls: Any, cut_module: Callable[[Any], None]) -> Any:
    """The class, made so that its instances are cut before their weights are read: transformers checks each weight's shape.

    It keeps its name and module, by which transformers finds how files of the family are read.
    """

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        cut_module(self)

    return type(cls.__name__, (cls,), {"__init__": make, "__module__": cls.__module__})


def _check_widths(key: Tensor, value: Tensor, kv_cache: KvCache) -> None:
    for name, tensor in (("keys", key), ("values", value)):
        if (tensor.shape[1], tensor.shape[3]) != (kv_cache.num_kv_heads, kv_cache.head_dim):
            raise ConfigError(
                f"{name} have {tensor.shape[1]} heads of {tensor.shape[3]}, the cache holds {kv_cache.num_kv_heads} of {kv_cache.head_dim}"
            )


def _no_mask(*_: Any, **__: Any) -> None:
    """Paged attention knows who sees whom; transformers need not build a mask."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Our one log line instead of progress bars and load reports."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
