"""What a folder with a model says about itself, read from its JSON files alone: no torch, no transformers."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quire.common.errors import ConfigError
from quire.common.parameter_count import count_parameters

BUILT_IN_MODEL_NAME: Final = "quire-tales"

# Files that a gateway needs to prepare prompts; the first must be there.
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# Families spell the same size differently; the first name that is there counts.
_SPELLINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_kv_heads": ("num_key_value_heads", "multi_query_group_num", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "max_positions": ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"),
}
# Families whose plan in transformers splits no keys: fused projections, norms over all heads, or no word on attention at all.
# A test compares this with transformers' plans.
WHOLE_KV_FAMILIES: Final = frozenset({
    "afmoe", "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots3_note",
    "dots3_note_text", "flex_olmo", "flint", "glm4_moe_lite", "glm_moe_dsa", "granitemoe", "granitemoehybrid", "granitemoeshared",
    "hunyuan_v1_moe", "hy_v4", "inkling2_text", "inkling_text", "jamba", "kimi_linear", "lfm2_moe", "longcat_flash", "minicpm3",
    "minimax_m2", "minimax_m3_vl_text", "nemotron_h", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "phi3", "phi4_multimodal", "phimoe",
    "qwen4_exp", "qwen4_exp_text", "youtu",
})  # fmt: skip
_DTYPE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on disk. Sizes are the whole model's, before it is split over ranks."""

    path: Path
    model_type: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int  # rows of the embedding: prompts may hold ids below this
    max_positions: int
    dtype: str  # of the checkpoint: float32, bfloat16 or float16
    eos_token_ids: tuple[int, ...]
    generation: Mapping[str, Any]  # generation_config.json, {} without one; numbers where numbers belong
    has_chat_template: bool
    fingerprint: str  # of config and weights' index; equal on all ranks of a group
    weight_files: tuple[str, ...]  # *.safetensors to read, by name; none if the weights are to be dummies
    num_parameters: int | None = None  # by the sizes in config.json; None for families that are not counted so

    @property
    def splits_kv_heads(self) -> bool:
        """Whether ranks can share out the KV heads, or each must hold all of them."""
        return self.model_type not in WHOLE_KV_FAMILIES

    def kv_heads_per_rank(self, tensor_parallel_size: int) -> int:
        """KV heads that each rank holds; they are replicated when fewer than ranks."""
        return max(1, self.num_kv_heads // tensor_parallel_size) if self.splits_kv_heads else self.num_kv_heads

    def kv_bytes_per_token(self, *, dtype: str, tensor_parallel_size: int) -> int:
        """Keys and values of one token on one rank, all layers, in bytes."""
        return 2 * self.num_layers * self.kv_heads_per_rank(tensor_parallel_size) * self.head_dim * _DTYPE_BYTES[dtype]


def read_model_folder(path: Path, *, needs_weights: bool = True) -> ModelFolder:
    """Read and check a model's JSON files. Without needs_weights its config.json is enough, and weights that are there are left alone.

    Raises:
        ConfigError: a file is missing or is not what it should be; the message says which and what to do.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; name a folder with config.json, tokenizer.json and *.safetensors")
    config = _read_json(path / "config.json")
    if needs_weights and not (path / "tokenizer.json").is_file():
        raise ConfigError(
            f"{path} has no tokenizer.json; make one with: {sys.executable} -c "
            f"\"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('{path}').save_pretrained('{path}')\"",
            reason="NO_TOKENIZER_JSON",
        )
    weight_files = _weight_files(path) if needs_weights else ()
    if needs_weights and not weight_files:
        raise ConfigError(
            f"{path} has no *.safetensors; other formats can run code when loaded and are not read; convert it with: {sys.executable} -c "
            f"\"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{path}').save_pretrained('{path}')\"; or serve it "
            "with --dummy-weights, to measure speed alone",
            reason="NO_SAFETENSORS",
        )
    text = config.get("text_config", config)  # multi-modal families keep the decoder's sizes one level down
    generation = _read_generation(path)
    tokenizer = _read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    num_heads = _size(text, "num_heads", path)
    hidden_size = _size(text, "hidden_size", path)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return ModelFolder(
        path=path,
        model_type=str(config.get("model_type", "unknown")),
        num_layers=_size(text, "num_layers", path),
        num_heads=num_heads,
        num_kv_heads=_size(text, "num_kv_heads", path, default=num_heads),
        head_dim=_size(text, "head_dim", path, default=max(1, hidden_size // num_heads)),
        hidden_size=hidden_size,
        vocab_size=_size(text, "vocab_size", path),
        max_positions=_size(text, "max_positions", path),
        dtype=dtype if dtype in _DTYPE_BYTES else "float32",
        eos_token_ids=_token_ids(generation.get("eos_token_id", text.get("eos_token_id")), path),
        generation=generation,
        has_chat_template=(path / "chat_template.jinja").is_file() or bool(tokenizer.get("chat_template")),
        fingerprint=_fingerprint(path),
        weight_files=weight_files,
        num_parameters=count_parameters(config),
    )


def read_config(path: Path) -> dict[str, Any]:
    """A model folder's config.json.

    Raises:
        ConfigError: it is missing or holds no JSON object.
    """
    return _read_json(path / "config.json")


def _weight_files(path: Path) -> tuple[str, ...]:
    """The files that the index lists, else every *.safetensors but copies in another layout, which some publishers add."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return tuple(sorted(file.name for file in path.glob("*.safetensors") if not file.name.startswith("consolidated")))
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
        raise ConfigError(f"{index} has no weight_map of tensor names to file names; get the folder again")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ConfigError(
            f"{path} lacks {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "") + ", which its index lists; "
            "get the folder again",
            reason="WEIGHTS_INCOMPLETE",
        )
    return tuple(names)


def _size(config: Mapping[str, Any], name: str, path: Path, *, default: int | None = None) -> int:
    for spelling in _SPELLINGS[name]:
        size = config.get(spelling)
        if size is not None:
            if not _is_whole(size) or size < 1:
                raise ConfigError(f"{path}/config.json says {spelling} = {size!r}; it must be a whole number of at least 1")
            return int(size)
    if default is None:
        what = " or ".join(_SPELLINGS[name])
        raise ConfigError(
            f"model family {config.get('model_type', 'unknown')!r} cannot be served: {path}/config.json does not say {what}; this version "
            "runs decoders that attend to a stated number of positions",
            reason="FAMILY_NOT_SUPPORTED",
        )
    return default


def _read_generation(path: Path) -> dict[str, Any]:
    """generation_config.json without what is not set; the parameters that requests take from it are numbers."""
    if not (path / "generation_config.json").is_file():
        return {}
    generation = {name: value for name, value in _read_json(path / "generation_config.json").items() if value is not None}
    for name in ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "top_k"):
        value = generation.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or (name == "top_k" and not _is_whole(value)):
            raise ConfigError(f"{path}/generation_config.json says {name} = {value!r}; it must be a number")
    if generation.get("top_k", 0) < 0:  # some write -1 for "all", as some APIs do
        generation["top_k"] = 0
    return generation


def _token_ids(value: Any, path: Path) -> tuple[int, ...]:
    token_ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_is_whole(token_id) and token_id >= 0 for token_id in token_ids):
        raise ConfigError(f"{path} says eos_token_id = {value!r}; it must be a token id or a list of them")
    return tuple(token_ids)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} has no {path.name}; name the folder of a model as transformers saves it") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return value


def _fingerprint(path: Path) -> str:
    """Hash of config.json and of each weight file's name and size: cheap, and different for models that differ in shape."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
    return digest.hexdigest()[:16]
