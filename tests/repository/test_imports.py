"""Who may import whom (docs/DESIGN.md §3), read from the source of every file."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).resolve().parents[2]

GENERATED: Final = frozenset({"v1", "internal"})
# Each folder, and what of quire it may import beside itself.
ALLOWED: Final[Mapping[str, frozenset[str]]] = {
    "common": GENERATED,
    "kernels": GENERATED | {"common"},
    "worker": GENERATED | {"common", "kernels"},
    "cluster": GENERATED | {"common", "kernels", "worker"},
    "client": GENERATED | {"common"},
    "bench": GENERATED | {"common", "kernels", "worker", "cluster", "client"},
    "cli": GENERATED | {"common", "kernels", "worker", "cluster", "client", "bench"},
}
FOLDERS: Final = tuple(ALLOWED)

# Whose package is imported where, and nowhere else. A path ends in / for a folder.
ONLY_IN: Final[Mapping[str, tuple[str, ...]]] = {
    "ray": ("cluster/controller/",),
    "torch": ("worker/", "kernels/", "bench/"),
    "transformers": ("worker/", "kernels/", "bench/"),
    "triton": ("worker/", "kernels/", "bench/"),
    "grpc": ("client/", "cli/", "bench/", "cluster/gateway/", "cluster/controller/", "cluster/rich_status.py"),
}
# The scheduler plans without I/O: only its edge may do what these are for.
PURE: Final = "cluster/scheduler/"
PURE_BUT: Final = frozenset({"cluster/scheduler/process.py"})
IMPURE: Final = frozenset(
    {
        "asyncio",
        "datetime",
        "multiprocessing",
        "os",
        "pathlib",
        "select",
        "selectors",
        "signal",
        "socket",
        "subprocess",
        "threading",
        "time",
        "zmq",
    }
) | {"quire.common.child_process"}
# What must not even be loaded when these are imported, through whatever chain of our own files. Imports inside functions are lazy.
NEVER_LOADS: Final[Mapping[str, frozenset[str]]] = {
    "client/": frozenset({"msgspec", "numpy", "ray", "torch", "transformers", "zmq"}),
    "cluster/gateway/": frozenset({"ray", "torch", "transformers"}),
    "cluster/scheduler/": frozenset({"grpc", "ray", "torch", "transformers"}),
    "cli/main.py": frozenset({"msgspec", "numpy", "ray", "tokenizers", "torch", "transformers", "zmq"}),
}


@dataclass(frozen=True, slots=True)
class Import:
    """`module` is imported by the file at `path` (relative to the checkout). Lazy: inside a function or for type checkers only."""

    path: str
    line: int
    module: str
    lazy: bool


def imports_of(root: Path, path: Path) -> Iterator[Import]:
    relative = path.relative_to(root).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=relative)
    lazy: set[ast.AST] = set()
    for node in ast.walk(tree):  # parents come before their children
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            lazy.update(ast.walk(node))
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from quire.v1 import inference_pb2` may name a module or a thing in one: both spellings are listed.
            base = "." * node.level + (node.module or "")
            modules = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in modules:
            yield Import(relative, node.lineno, module, node in lazy)


def all_imports(root: Path) -> list[Import]:
    return [
        found
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("*.py"))
        if not path.is_symlink()
        for found in imports_of(root, path)
    ]


def violations(root: Path) -> list[str]:
    """Every import that breaks a rule, with its place and the rule."""
    imports = all_imports(root)
    problems = [f"{found.path}:{found.line}: {problem}" for found in imports for problem in _problems_of(found)]
    problems += _loaded(root, imports)
    return list(dict.fromkeys(problems))


def _problems_of(found: Import) -> Iterator[str]:
    folder = found.path.split("/")[0]
    parts = found.module.split(".")
    if found.module.startswith("."):
        yield f"relative import of {found.module}: say quire.{folder}..."
    if parts[0] in (*FOLDERS, "proto"):
        yield f"bare import of {parts[0]}: it is quire.{parts[0]}"
    if (
        parts[0] == "quire"
        and len(parts) > 1
        and parts[1] != folder
        and parts[1] in (*FOLDERS, *GENERATED)
        and parts[1] not in ALLOWED[folder]
    ):
        yield f"{folder} imports quire.{parts[1]}"
    if parts[0] in ONLY_IN and not found.path.startswith(ONLY_IN[parts[0]]):
        yield f"{parts[0]} is imported only in {', '.join(ONLY_IN[parts[0]])}"
    if found.path.startswith(PURE) and found.path not in PURE_BUT and (parts[0] in IMPURE or found.module in IMPURE):
        yield f"{found.module} in a file that must stay pure"


def _loaded(root: Path, imports: list[Import]) -> Iterator[str]:
    """Imports that load what they must not, through our own files."""
    eager: dict[str, list[Import]] = {}
    for found in imports:
        if not found.lazy:
            eager.setdefault(found.path, []).append(found)
    for start, forbidden in NEVER_LOADS.items():
        waiting = [(path, path) for path in eager if path.startswith(start)]
        seen = {path for path, _ in waiting}
        while waiting:
            path, chain = waiting.pop()
            for found in eager.get(path, []):
                if found.module.split(".")[0] in forbidden:
                    yield f"{path}:{found.line}: {found.module.split('.')[0]} is loaded by {chain}"
                target = found.module.removeprefix("quire.").replace(".", "/") + ".py"
                if found.module.startswith("quire.") and (root / target).is_file() and target not in seen:
                    seen.add(target)
                    waiting.append((target, f"{chain} -> {target}"))


def test_every_import_points_down() -> None:
    assert violations(CHECKOUT) == []


def test_importing_the_client_loads_nothing_of_the_server() -> None:
    program = f"import sys, quire.client; print(sorted(set(sys.modules) & set({sorted(NEVER_LOADS['client/'])!r})))"
    done = subprocess.run([sys.executable, "-P", "-c", program], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_rules_know_every_folder_of_the_package() -> None:
    assert sorted(link.name for link in (CHECKOUT / "src/quire").iterdir() if link.is_symlink()) == sorted(FOLDERS)


def test_a_violation_of_each_rule_is_caught(tmp_path: Path) -> None:
    files = {
        "common/wire.py": "import grpc\nimport quire.worker.rank",
        "kernels/op.py": "from quire.worker import rank",
        "worker/rank.py": "import ray\nfrom quire.cluster.scheduler import planner",
        "cluster/controller/actor.py": "import ray",  # allowed
        "worker/heavy.py": "import torch",  # allowed
        "cluster/controller/groups.py": "import ray.util",  # allowed
        "cluster/gateway/server.py": "import quire.worker.heavy",
        "cluster/scheduler/planner.py": "import time\nfrom zmq import Context\ndef f():\n    import grpc",
        "cluster/scheduler/process.py": "import time, zmq",  # allowed
        "client/sync.py": "from quire import cluster\nimport kernels\nfrom quire.common import messages",
        "common/messages.py": "import msgspec",  # allowed
        "cli/serve.py": "def main():\n    import ray\n    import quire.cluster.controller",
        "cli/main.py": "def main():\n    import torch",
        "bench/engine.py": "from . import report\nimport quire.client",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    grpc, torch = (", ".join(ONLY_IN[name]) for name in ("grpc", "torch"))
    assert sorted(violations(tmp_path)) == sorted(
        [
            f"common/wire.py:1: grpc is imported only in {grpc}",
            "common/wire.py:2: common imports quire.worker",
            "kernels/op.py:1: kernels imports quire.worker",
            "worker/rank.py:1: ray is imported only in cluster/controller/",
            "worker/rank.py:2: worker imports quire.cluster",
            "worker/heavy.py:1: torch is loaded by cluster/gateway/server.py -> worker/heavy.py",
            "cluster/scheduler/planner.py:1: time in a file that must stay pure",
            "cluster/scheduler/planner.py:2: zmq in a file that must stay pure",
            "cluster/scheduler/planner.py:2: zmq.Context in a file that must stay pure",
            f"cluster/scheduler/planner.py:4: grpc is imported only in {grpc}",
            "client/sync.py:1: client imports quire.cluster",
            "client/sync.py:2: bare import of kernels: it is quire.kernels",
            "common/messages.py:1: msgspec is loaded by client/sync.py -> common/messages.py",
            "cli/serve.py:2: ray is imported only in cluster/controller/",
            f"cli/main.py:2: torch is imported only in {torch}",
            "bench/engine.py:1: relative import of .: say quire.bench...",
            "bench/engine.py:1: relative import of ..report: say quire.bench...",
        ]
    )
