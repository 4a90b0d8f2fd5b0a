"""Where a client's credentials come from, and that they show nowhere."""

from pathlib import Path

import pytest

from quire.client.settings import ClientSettings, resolve_settings
from quire.common.errors import ConfigError

SUPPORT = Path(__file__).parents[1] / "support"


def resolved(environ: dict[str, str] | None = None, **options: Path | str | None) -> ClientSettings:
    values = {"api_key": None, "tls_ca": None, **options}
    return resolve_settings(None, secure=False, timeout_s=1, max_retries=0, environ=environ or {}, **values)  # type: ignore[arg-type]


def test_a_key_comes_from_the_call_its_file_the_environment_or_the_environments_file(tmp_path: Path) -> None:
    given, named = tmp_path / "given", tmp_path / "named"
    given.write_text("given\n")
    named.write_text("named")
    environ = {"QUIRE_API_KEY": "variable", "QUIRE_API_KEY_FILE": str(named)}
    assert resolved(environ, api_key="call", api_key_file=given).api_key == "call"
    assert resolved(environ, api_key_file=given).api_key == "given"
    assert resolved(environ).api_key == "variable"
    assert resolved({"QUIRE_API_KEY_FILE": str(named)}).api_key == "named"
    assert resolved().api_key is None


@pytest.mark.parametrize("content", ["", "marker two", "marker\nmarker", "märker"])
def test_a_file_that_holds_no_key_is_refused_without_its_content(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    with pytest.raises(ConfigError, match="must hold one API key") as caught:
        resolved(api_key_file=path)
    assert "marker" not in caught.value.message


def test_a_certificate_comes_with_its_key_and_means_tls() -> None:
    settings = resolved(tls_cert=SUPPORT / "localhost_certificate.pem", tls_key=SUPPORT / "localhost_key.pem")
    assert settings.secure
    assert settings.tls_key_pem is not None
    with pytest.raises(ConfigError, match="give both or neither"):
        resolved(tls_cert=SUPPORT / "localhost_certificate.pem")
    with pytest.raises(ConfigError, match=r"tls_key, .*cannot be read"):
        resolved(tls_cert=SUPPORT / "localhost_certificate.pem", tls_key=SUPPORT / "nothing.pem")
    assert "PRIVATE" not in repr(settings)
