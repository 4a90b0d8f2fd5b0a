"""What nvidia-smi says of the GPUs of this machine, parsed."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_TIMEOUT_S: Final = 30.0
_FIELDS: Final = "index,name,driver_version,memory.total,memory.free,compute_cap,ecc.errors.uncorrected.volatile.total"
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One line of `nvidia-smi --query-gpu`."""

    index: int
    name: str
    driver: str
    total_bytes: int
    free_bytes: int
    compute_capability: float
    num_ecc_errors: int | None  # uncorrected since the driver was loaded; None where there is no ECC


def query_gpus() -> list[Gpu]:
    """The GPUs of this machine.

    Raises:
        OSError: there is no nvidia-smi, or it fails; the message says how.
    """
    return parse_gpus(_smi(f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"))


def query_links() -> Mapping[tuple[int, int], str]:
    """How each pair of GPUs is connected: NV18, PIX, SYS, ... (nvidia-smi's words)."""
    return parse_matrix(_smi("topo", "-m"))


def query_peer_reads() -> Mapping[tuple[int, int], str]:
    """Whether each pair of GPUs can read each other's memory: OK, or nvidia-smi's word for why not."""
    return parse_matrix(_smi("topo", "-p2p", "r"))


def parse_gpus(text: str) -> list[Gpu]:
    """Raises: ValueError: a line has other fields than were asked for."""
    gpus = []
    for line in text.strip().splitlines():
        index, name, driver, total, free, capability, ecc = (field.strip() for field in line.split(","))
        num_errors = int(ecc) if ecc.isdigit() else None
        gpus.append(Gpu(int(index), name, driver, int(total) * 2**20, int(free) * 2**20, float(capability), num_errors))
    return gpus


def parse_matrix(text: str) -> dict[tuple[int, int], str]:
    """The cells of a table of GPUs by GPUs, each pair once, lower index first. Other columns and rows are left out."""
    columns: list[int] = []
    cells: dict[tuple[int, int], str] = {}
    for line in _ESCAPES.sub("", text).splitlines():
        words = line.split()
        if not columns:
            columns = [int(word[3:]) for word in words if re.fullmatch(r"GPU\d+", word)]
        elif words and re.fullmatch(r"GPU\d+", words[0]) and len(words) > len(columns):
            row = int(words[0][3:])
            cells.update({(row, column): cell for column, cell in zip(columns, words[1:], strict=False) if row < column})
    return cells


def _smi(*arguments: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise OSError(f"nvidia-smi gave no answer within {_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        raise OSError(f"nvidia-smi ended with {done.returncode}: {(done.stdout + done.stderr).strip()[:200]}")
    return done.stdout
