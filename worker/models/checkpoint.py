"""The weights of a model on disk, read as they are needed and no further than this rank's part of them."""

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming, rename_source_key

from quire.common.errors import ConfigError
from quire.common.model_folder import ModelFolder
from quire.worker.models.tensor_parallel import Part

_log = logging.getLogger(__name__)

# A line of progress comes at most this often: none for a small model, a few for one that takes minutes.
PROGRESS_EVERY_S: Final = 5.0


class Checkpoint:
    """Every tensor of a model's files by its name, as something that transformers reads by indexing it with [...]."""

    def __init__(self, folder: ModelFolder) -> None:
        self.tensors: dict[str, CheckpointTensor] = {}
        self.num_bytes_read = 0
        self._num_bytes = sum((folder.path / name).stat().st_size for name in folder.weight_files)
        self._lock = threading.Lock()  # transformers reads in threads
        self._last_line_s = time.monotonic()
        for name in folder.weight_files:
            self._open(folder.path / name)

    def cut(self, module: Any, parts: Mapping[str, Part], shapes: Mapping[str, tuple[int, ...]], *, family: str) -> None:
        """From now on read only what the parts of the module's parameters need.

        shapes: of the parameters before they were cut

        Raises:
            ConfigError: the files hold a parameter in a form from which no part can be read.
        """
        transforms = get_model_conversion_mapping(module)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        parameters = module.state_dict()
        for name, tensor in self.tensors.items():
            target, source_pattern = rename_source_key(name, renamings, converters, module.base_model_prefix, parameters)
            if target not in parts:
                continue
            tensor.part = parts[target]
            if source_pattern is not None:
                converter = next(each for each in converters if source_pattern in each.source_patterns)
                tensor.part = _part_of_source(parts[target], shapes[target], converter, source_pattern, family=family)

    def note_read(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes_read += num_bytes
            now_s = time.monotonic()
            if now_s - self._last_line_s >= PROGRESS_EVERY_S:
                self._last_line_s = now_s
                _log.info("read %.1f of at most %.1f GiB of weights", self.num_bytes_read / 2**30, self._num_bytes / 2**30)

    def _open(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
        except Exception as error:  # safetensors' own error, or the system's
            raise ConfigError(f"{path} cannot be read: {error}; get the folder again", reason="WEIGHTS_INCOMPLETE") from error
        names: list[str] = file.keys()
        for name in names:
            self.tensors[name] = CheckpointTensor(file, name, self)


class CheckpointTensor:
    """One tensor of a file, or a rank's part of it."""

    def __init__(self, file: Any, name: str, checkpoint: Checkpoint) -> None:
        self.part: Part | None = None
        self._file = file
        self._name = name
        self._checkpoint = checkpoint

    def __getitem__(self, index: Any) -> Tensor:
        assert index is Ellipsis, f"{self._name} is read whole, not {index}"
        view = self._file.get_slice(self._name)
        tensor: Tensor = view[...] if self.part is None else self.part.of(view)
        self._checkpoint.note_read(tensor.nbytes)
        return tensor

    def get_shape(self) -> list[int]:
        shape: list[int] = self._file.get_slice(self._name).get_shape()
        return shape

    def get_dtype(self) -> str:
        return str(self._file.get_slice(self._name).get_dtype())


def _part_of_source(part: Part, shape: tuple[int, ...], converter: Any, source_pattern: str, *, family: str) -> Part:
    """The part of one of the tensors that a converter puts together to a parameter of `shape`.

    Known forms: a tensor per expert, which are stacked; and several tensors that are then concatenated, gate and up.
    """
    dim, ranges = part.dim, part.ranges
    kinds = [type(operation) for operation in converter.operations]
    if kinds not in ([MergeModulelist], [Concatenate], [MergeModulelist, Concatenate]):
        raise ConfigError(
            f"model family {family!r} cannot be split over ranks: its files hold {source_pattern} in a form from which no part can be "
            f"read ({', '.join(kind.__name__ for kind in kinds)}); use tensor_parallel_size 1",
            reason="FAMILY_NOT_SPLIT",
        )
    if kinds[-1] is Concatenate and converter.operations[-1].dim % len(shape) == dim:
        num_sources = len(converter.source_patterns)
        assert len(ranges) == num_sources, (ranges, converter.source_patterns)
        index, width = converter.source_patterns.index(source_pattern), shape[dim] // num_sources
        ranges = ((ranges[index][0] - index * width, ranges[index][1] - index * width),)
    if kinds[0] is MergeModulelist:
        assert converter.operations[0].dim == 0 < dim, (converter.operations, dim)
        dim -= 1  # a source is one expert's, without the dimension of experts
    return Part(dim, ranges, part.is_zero)
