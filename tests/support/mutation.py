"""The scheduler with one line broken on purpose: modules are compiled from patched source when they are imported."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

PACKAGE = "quire.cluster.scheduler"
FOLDER = Path(__file__).parents[2] / "cluster" / "scheduler"


@dataclass(frozen=True)
class Mutation:
    """What is broken: in one module, each `old` text, which occurs once, becomes `new`."""

    rule: str  # what it breaks, in words
    module: str
    changes: tuple[tuple[str, str], ...]

    def source(self) -> str:
        """The module's source, broken."""
        source = (FOLDER / f"{self.module}.py").read_text()
        for old, new in self.changes:
            count = source.count(old)
            assert count == 1, f"{self.module}.py has {old!r} {count} times; the mutation {self.rule!r} needs it once"
            source = source.replace(old, new)
        return source


class MutatedImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Put it first on sys.meta_path, before the scheduler is imported for the first time."""

    def __init__(self, mutation: Mutation) -> None:
        self._name = f"{PACKAGE}.{mutation.module}"
        self._source = mutation.source()
        assert self._name not in sys.modules, "the module was imported before it was broken"

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name == self._name else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._source, f"<mutated {self._name}>", "exec"), module.__dict__)  # noqa: S102 -- our own source
