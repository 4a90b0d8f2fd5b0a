from importlib import metadata

import pytest

from quire.common.version import UNKNOWN_VERSION, quire_version


def test_the_version_is_the_installed_one() -> None:
    assert quire_version() == metadata.version("quire")


def test_source_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", fail)
    assert quire_version() == UNKNOWN_VERSION
