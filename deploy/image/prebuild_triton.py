"""Compiles, while the image is built, the one C module that Triton would compile when it first runs: its link to the CUDA driver.

    python prebuild_triton.py FOLDER    leaves driver.so there, and driver.sha256 of the source that it was made of

prebuilt_cc.sh then answers for the C compiler, and the image needs none. The driver's library is not there during a build; an
empty one of its name stands for it, and the real one is found when the module is loaded.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from triton.backends.nvidia import driver
from triton.runtime import build


def main(folder: Path) -> None:
    """Write both files."""
    source = Path(driver.__file__).with_name("driver.c")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["gcc", "-shared", "-o", f"{scratch}/libcuda.so.1", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null"], check=True)
        libraries, includes = [driver.libdevice_dir, scratch], list(driver.include_dirs)
        made = build._build("cuda_utils", str(source), scratch, libraries, includes, list(driver.libraries), [])
        shutil.copy(made, folder / "driver.so")
    (folder / "driver.sha256").write_text(hashlib.sha256(source.read_bytes()).hexdigest())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
