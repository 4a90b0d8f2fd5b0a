"""The image's recipe: what can be said of it without building it (docs/operate.md says what that leaves open)."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
COMPILER = ROOT / "deploy" / "image" / "prebuilt_cc.sh"


def stages() -> dict[str, tuple[str, list[str]]]:
    """Each stage's parent and instructions."""
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    found: dict[str, tuple[str, list[str]]] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            parent, name = match.groups()
            found[name] = (parent, [])
        elif found and line and not line.startswith("#"):
            found[name][1].append(line)
    return found


def lineage(name: str) -> list[str]:
    """All instructions that make a stage, its parents' first."""
    parent, instructions = stages()[name]
    return (lineage(parent) if parent in stages() else []) + instructions


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), DOCKERFILE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_final_images_run_without_rights_and_have_no_toolchain() -> None:
    for target in ("cpu", "cuda"):
        instructions = lineage(target)
        assert [line for line in instructions if line.startswith("USER ")] == ["USER 10001:10001"]
        assert not any(re.search(r"\b(gcc|g\+\+|make|pip|build-essential)\b", line) for line in instructions if line.startswith("RUN"))
        assert 'ENTRYPOINT ["tini", "--"]' in instructions


def test_what_is_copied_is_there() -> None:
    sources = [
        words[1] for _, lines in stages().values() for words in map(str.split, lines) if words[0] == "COPY" and "--from" not in words[1]
    ]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
    kept = [line[1:] for line in (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    for path in kept:
        assert (ROOT / path).exists(), path
    linked = {link.resolve().relative_to(ROOT).parts[0] for link in (ROOT / "src" / "quire").iterdir() if link.is_symlink()}
    assert linked <= set(kept), "src/quire links to folders that would not be in the build"


def compile_with(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environ = {"PREBUILT_FOLDER": str(folder), "PATH": "/usr/bin:/bin"}
    return subprocess.run([COMPILER, *arguments], capture_output=True, text=True, timeout=30, env=environ, check=False)


def test_the_compiler_of_the_image_gives_out_what_was_made_in_advance(tmp_path: Path) -> None:
    source, result = tmp_path / "driver.c", tmp_path / "result.so"
    source.write_text("int answer;\n")
    (tmp_path / "driver.so").write_bytes(b"module")
    digest = subprocess.run(["sha256sum", source], capture_output=True, text=True, check=True).stdout.split()[0]
    (tmp_path / "driver.sha256").write_text(digest)
    done = compile_with(tmp_path, str(source), "-O3", "-shared", "-o", str(result), "-I/usr/include")
    assert (done.returncode, done.stderr, result.read_bytes()) == (0, "", b"module")

    other = tmp_path / "other.c"
    other.write_text("int other;\n")
    done = compile_with(tmp_path, str(other), "-o", str(tmp_path / "other.so"))
    assert (done.returncode, "build the image anew" in done.stderr) == (1, True)
    assert not (tmp_path / "other.so").exists()

    done = compile_with(tmp_path, "--version")
    assert (done.returncode, "has no C compiler" in done.stderr) == (1, True)
