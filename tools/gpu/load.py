"""Real weights on a bare GPU machine: writes 16 GB of random safetensors of Llama 3 8B's shape, and times loading them.

    python -P tools/gpu/load.py --out FILE [--folder DIR]

Each load is a process of its own; the second and third find the files in the page cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quire.common.model_folder import ModelFolder, read_model_folder
from quire.worker.models.llama import LlamaShare, read_llama_config
from quire.worker.models.load_model import load_llama_model

_CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu", "dtype": "bfloat16",
}  # fmt: skip
_NUM_LOADS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--folder", type=Path, help="where the model is written, or lies; a temporary folder unless given")
    parser.add_argument("--load", action="store_true", help="load once and print what it took")
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), "write_s": write(folder)}
        print(report, flush=True)
        report["loads"] = []
        for _ in range(_NUM_LOADS):
            command = [sys.executable, "-P", __file__, "--load", "--folder", str(folder)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout
            report["loads"].append(json.loads(output.splitlines()[-1]))
            print(report["loads"][-1], flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1))


def write(folder: Path) -> float:
    """Write the model in four files, as publishers do; the seconds that it took."""
    started_s = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    hidden, inner, kv_width = 4096, 14336, 1024

    def random(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02).cpu()

    for part in range(4):
        tensors: dict[str, torch.Tensor] = {}
        if part == 0:
            tensors["model.embed_tokens.weight"] = random(128256, hidden)
        if part == 3:
            tensors["lm_head.weight"] = random(128256, hidden)
            tensors["model.norm.weight"] = random(hidden)
        for layer in range(part * 8, part * 8 + 8):
            at = f"model.layers.{layer}"
            for name, rows, columns in (
                ("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", kv_width, hidden), ("self_attn.v_proj", kv_width, hidden),
                ("self_attn.o_proj", hidden, hidden), ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
                ("mlp.down_proj", hidden, inner),
            ):  # fmt: skip
                tensors[f"{at}.{name}.weight"] = random(rows, columns)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{at}.{name}.weight"] = random(hidden)
        save_file(tensors, folder / f"model-{part + 1:05}-of-00004.safetensors")
    return time.perf_counter() - started_s


def load(path: Path) -> dict[str, float]:
    torch.zeros(1, device="cuda")  # the driver's start is not the files' fault
    folder: ModelFolder = read_model_folder(path)
    started_s = time.perf_counter()
    model = load_llama_model(folder, dtype="bfloat16", device="cuda")
    torch.cuda.synchronize()
    took_s = time.perf_counter() - started_s
    num_bytes = sum((path / name).stat().st_size for name in folder.weight_files)
    assert model.config == LlamaShare(read_llama_config(folder)).config
    return {"load_s": took_s, "gb_per_s": num_bytes / took_s / 1e9}


if __name__ == "__main__":
    main()
