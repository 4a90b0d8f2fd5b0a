"""A model by the way that suits it: our own modules where there are some, else those of transformers."""

import logging
import time
from typing import TYPE_CHECKING, Final

import torch

from quire.common.errors import ConfigError
from quire.common.model_folder import ModelFolder
from quire.worker.collectives import Collective
from quire.worker.models.llama import LlamaModel, LlamaShare, read_llama_config
from quire.worker.models.llama_weights import empty_weights, fill_at_random, fill_from_files, pack_weights

# transformers takes seconds to import, and the native family needs none of it.
if TYPE_CHECKING:
    from quire.worker.models.transformers_model import TransformersModel

_log = logging.getLogger(__name__)

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    folder: ModelFolder, *, dtype: str, device: str, backend: str, has_dummy_weights: bool = False, collective: Collective | None = None
) -> "LlamaModel | TransformersModel":
    """Read the weights, this rank's part of them, or draw them at random.

    backend: native, transformers, or auto: native for the families that it runs

    Raises:
        ConfigError: the model cannot be served this way, by the reason.
    """
    is_native = backend == "native"
    if backend == "auto":
        try:
            read_llama_config(folder)
            is_native = True
        except ConfigError as error:
            _log.info("%s", error.message)
    if is_native:
        model = load_llama_model(folder, dtype=dtype, device=device, has_dummy_weights=has_dummy_weights, collective=collective)
        pack_weights(model.weights)
        return model
    from quire.worker.models.transformers_model import load_transformers_model

    return load_transformers_model(folder, dtype=dtype, device=device, collective=collective, dummy_weights=has_dummy_weights)


def load_llama_model(
    folder: ModelFolder, *, dtype: str, device: str, has_dummy_weights: bool = False, collective: Collective | None = None
) -> LlamaModel:
    """A model of the Llama family by our own modules.

    Raises:
        ConfigError: its config asks for more than the family has, or its files lack weights.
    """
    started_s = time.perf_counter()
    rank, size = (0, 1) if collective is None else (collective.rank, collective.size)
    share = LlamaShare(read_llama_config(folder), rank, size)
    weights = empty_weights(share, dtype=DTYPES[dtype], device=device)
    if has_dummy_weights:
        fill_at_random(weights, share)
    else:
        fill_from_files(weights, share, folder)
    _log.info(
        "loaded %s by native modules, %s weights as %s on %s in %.2f s",
        folder.model_type,
        "random" if has_dummy_weights else "its",
        dtype,
        device,
        time.perf_counter() - started_s,
    )
    return LlamaModel(folder, share, weights, collective)
