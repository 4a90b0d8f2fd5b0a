"""Compile kernels for sm_90 without a GPU, exactly as a wrapper would launch them, and read what the machine code needs."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from quire.kernels import backend

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_pdl")


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """What ptxas made of one launch."""

    name: str
    num_registers: int  # of one thread
    stack_bytes: int  # spilled registers, or arrays indexed at run time
    shared_bytes: int
    instructions: dict[str, int]  # how often each mnemonic occurs
    ptx: str

    def count(self, *mnemonics: str) -> int:
        """How many instructions are one of these."""
        return sum(self.instructions.get(mnemonic, 0) for mnemonic in mnemonics)


@contextmanager
def compiling_for_sm90() -> Iterator[list[CompiledKernel]]:
    """Inside, wrappers take their Triton path on CPU tensors, and launches are compiled and listed instead of run."""
    compiled: list[CompiledKernel] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        compiled.append(_compile(kernel, args, keywords))

    with patch.object(JITFunction, "run", run), patch.object(backend, "IS_INTERPRETED", True):
        yield compiled


def _compile(kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> CompiledKernel:
    options = {name: keywords.pop(name) for name in _OPTIONS if name in keywords}
    values = dict(zip(kernel.arg_names, args, strict=False)) | keywords
    constant_names = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        # As Triton's launcher specialises: None and 1 are constants, multiples of 16 are known to be.
        if name in constant_names or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return _read(kernel.__name__, binary)


def _read(name: str, binary: Any) -> CompiledKernel:
    cubin = Path(binary.metadata_group[next(key for key in binary.metadata_group if key.endswith(".cubin"))])
    usage = _output("cuobjdump", "-res-usage", str(cubin))
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers is not None, usage
    registers, stack = map(int, numbers.groups())
    listing = _output("nvdisasm", "-c", str(cubin))
    mnemonics = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", listing, re.MULTILINE)
    instructions = {mnemonic: mnemonics.count(mnemonic) for mnemonic in set(mnemonics)}
    return CompiledKernel(name, registers, stack, binary.metadata.shared, instructions, binary.asm["ptx"])


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
