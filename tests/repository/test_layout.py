"""What lies where: packages without __init__.py, links that lead somewhere, no large files, a short README."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

CHECKOUT: Final = Path(__file__).resolve().parents[2]
FOLDERS: Final = ("bench", "cli", "client", "cluster", "common", "kernels", "worker")
MODEL: Final = "src/quire/demo_model/model.safetensors"
LARGEST_FILE_BYTES: Final = 5 << 20
LONGEST_README_LINES: Final = 150

# [text](target) and ![text](target), with the target's title left out.
_LINK: Final = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
_CODE_BLOCK: Final = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def project_files() -> list[Path]:
    """Files that are in the repository or are about to be. Where git does not answer (an unpacked sdist, say) the tree is walked."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=CHECKOUT, check=False, capture_output=True, text=True
    )
    if listed.returncode == 0:
        return [path for name in listed.stdout.split("\0") if name and (path := CHECKOUT / name).is_file()]
    return [path for path in CHECKOUT.rglob("*") if path.is_file() and not {".git", ".venv", "node_modules"} & set(path.parts)]


def broken_links(root: Path, page: Path) -> Iterator[str]:
    """Links of a Markdown page to files that are not there. Addresses and links within the page are not looked at."""
    text = re.sub(r"`[^`\n]*`", "", _CODE_BLOCK.sub("", page.read_text(encoding="utf-8")))
    for target in _LINK.findall(text):
        path = target.split("#")[0]
        if not path or re.match(r"[a-z]+:", path):
            continue
        file = (page.parent / path).resolve()
        if not file.is_relative_to(root.resolve()) or not file.exists():
            yield f"{page.relative_to(root)}: {target}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_a_typed_namespace_package(folder: str) -> None:
    assert (CHECKOUT / folder / "py.typed").is_file()
    # With an __init__.py a folder would be importable under its own name, and `kernels` and `proto` are other people's packages.
    allowed = [CHECKOUT / "client/__init__.py"] if folder == "client" else []
    assert list((CHECKOUT / folder).rglob("__init__.py")) == allowed
    link = CHECKOUT / "src/quire" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../../{folder}"


@pytest.mark.parametrize("folder", ["v1", "internal/v1"])
def test_generated_packages_are_typed(folder: str) -> None:
    assert (CHECKOUT / "src/quire" / folder / "py.typed").is_file()


def test_no_package_but_the_client_has_an_init_file() -> None:
    # One in src/quire would hide every other folder of the namespace, one in proto/ would shadow proto-plus.
    assert [path for root in ("src", "proto") for path in (CHECKOUT / root).rglob("__init__.py")] == []
    assert not (CHECKOUT / "tests/__init__.py").exists()


def test_no_file_but_the_model_is_large() -> None:
    large = [str(path.relative_to(CHECKOUT)) for path in project_files() if path.stat().st_size > LARGEST_FILE_BYTES]
    assert [name for name in large if name != MODEL] == []


def test_the_readme_stays_short() -> None:
    assert len((CHECKOUT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST_README_LINES


def test_links_between_pages_lead_to_files() -> None:
    pages = [path for path in project_files() if path.suffix == ".md"]
    assert pages
    assert [link for page in pages for link in broken_links(CHECKOUT, page)] == []


def test_a_link_to_a_missing_file_is_caught(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("")
    page = tmp_path / "page.md"
    page.write_text(
        '[a](there.md#part) [b](missing.md) ![c](gone.png "title") [d](https://example.com) `[e](code.md)`\n```\n[f](code.md)\n```\n'
    )
    assert list(broken_links(tmp_path, page)) == ["page.md: missing.md", "page.md: gone.png"]


def test_bare_names_of_our_folders_are_not_importable() -> None:
    import importlib.util

    found = {name: spec.origin for name in (*FOLDERS, "proto") if (spec := importlib.util.find_spec(name)) is not None}
    assert [name for name, origin in found.items() if origin is None or Path(origin).is_relative_to(CHECKOUT)] == []
