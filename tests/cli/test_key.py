"""`quire key new`, and who takes which of its files."""

from pathlib import Path

import pytest

from quire.cli.controller import read_cluster_key
from quire.cli.main import main
from quire.common.curve import CurveKeys
from quire.common.errors import ConfigError


def test_the_controllers_file_has_all_and_the_gateways_file_a_part_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert main(["key", "new", str(folder)]) == 0
    keys = read_cluster_key(str(folder / "cluster_key"))
    assert keys is not None
    assert CurveKeys.read(folder / "client_key") == keys.of_clients()
    assert all((folder / name).stat().st_mode & 0o077 == 0 for name in ("cluster_key", "client_key"))
    secrets = {keys.server_secret, keys.client_secret}
    assert not any(secret and secret in capsys.readouterr().out for secret in secrets)
    assert main(["key", "new", str(folder)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert read_cluster_key(str(folder / "cluster_key")) == keys, "it was overwritten"


def test_a_controller_refuses_the_gateways_part(tmp_path: Path) -> None:
    assert read_cluster_key(None) is None
    assert main(["key", "new", str(tmp_path)]) == 0
    with pytest.raises(ConfigError, match="the part of a cluster's key that gateways have"):
        read_cluster_key(str(tmp_path / "client_key"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_cluster_key(str(tmp_path / "nothing"))
