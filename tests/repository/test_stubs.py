"""The committed stubs are those of proto/, and buf sees what would break a client."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

CHECKOUT: Final = Path(__file__).resolve().parents[2]
BUF: Final = CHECKOUT / "tools/buf/node_modules/.bin/buf"


def stubs_in(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(root.rglob("*_pb2*.py*"))
        if path.suffix in (".py", ".pyi")
    }


def test_the_committed_stubs_are_current(tmp_path: Path) -> None:
    subprocess.run(
        [CHECKOUT / "tools/generate_stubs.sh", tmp_path], check=True, env={**os.environ, "PYTHON": sys.executable}, stdin=subprocess.DEVNULL
    )
    fresh, committed = stubs_in(tmp_path), stubs_in(CHECKOUT / "src")
    assert fresh
    assert sorted(fresh) == sorted(committed)
    assert [name for name in fresh if fresh[name] != committed[name]] == [], "proto/ has changed; run `make stubs`"


@pytest.fixture
def buf() -> Path:
    """buf, installed as `make lint` does it. Like there, a machine without npm goes without, unless it is CI."""
    if shutil.which("npm") is None and "CI" not in os.environ:
        pytest.skip("buf comes with npm (Node.js 18 or newer)")
    subprocess.run(["make", "--silent", str(BUF.relative_to(CHECKOUT))], check=True, cwd=CHECKOUT, stdin=subprocess.DEVNULL)
    return BUF


def test_a_renamed_field_is_a_breaking_change(tmp_path: Path, buf: Path) -> None:
    proto = tmp_path / "proto"
    shutil.copytree(CHECKOUT / "proto", proto)
    file = proto / "quire/v1/inference.proto"
    text = file.read_text(encoding="utf-8")
    assert "optional string adapter = 2;" in text
    file.write_text(text.replace("optional string adapter = 2;", "optional string lora = 2;"), encoding="utf-8")
    checked = subprocess.run(
        [buf, "breaking", proto, "--against", CHECKOUT / "proto/baseline.binpb"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert checked.returncode == 100, checked.stderr
    assert 'changed name from "adapter" to "lora"' in checked.stdout
