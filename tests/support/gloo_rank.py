"""One rank of a gloo group, as a process: `python -P gloo_rank.py PATH RANK SIZE` prints what the collectives gave."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from quire.worker.collectives_gloo import GlooCollective


def main(path: Path, rank: int, size: int) -> None:
    store = dist.FileStore(str(path), size)  # type: ignore[attr-defined]
    collective = GlooCollective(store, rank=rank, size=size, timeout_s=60.0)
    total = torch.arange(6.0).view(2, 3) * (rank + 1)
    collective.all_reduce(total)
    short = torch.full((3,), 1.0 + 2.0**-7, dtype=torch.bfloat16)
    collective.all_reduce(short)
    widths = list(range(1, size + 1))
    gathered = collective.gather_columns(torch.full((2, widths[rank]), float(rank)), widths)
    collective.close()
    print(json.dumps({"total": total.tolist(), "short": short.tolist(), "gathered": gathered.tolist()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
