"""TLS and mTLS at a real server, by the SDK."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from gateway_parts import Running, running_gateway

from quire.client import AsyncClient, Unavailable
from quire.cluster.gateway.tls import Certificates, TlsFiles
from quire.common.errors import ConfigError

# For tests alone, valid until 2126. How they were made: tests/client/test_client.py; the other's subject is CN=other.
SUPPORT = Path(__file__).parents[2] / "support"
CERTIFICATE, KEY = SUPPORT / "localhost_certificate.pem", SUPPORT / "localhost_key.pem"
OTHER_CERTIFICATE, OTHER_KEY = SUPPORT / "other_certificate.pem", SUPPORT / "other_key.pem"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUIRE_ADDRESS", "QUIRE_API_KEY", "QUIRE_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)


async def answers(running: Running, **options: Path) -> bool:
    """Whether a new connection gets an answer."""
    async with AsyncClient(running.address, max_retries=0, **options) as client:  # type: ignore[arg-type]  # all are files
        try:
            return (await client.generate("Once", max_tokens=4)).usage.num_prompt_tokens == 1
        except Unavailable:
            return False


def copies(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate and its key that a test may replace."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    shutil.copy(CERTIFICATE, certificate)
    shutil.copy(KEY, key)
    return certificate, key


async def test_a_renewed_certificate_is_used_without_a_restart_and_half_a_renewal_is_not(tmp_path: Path) -> None:
    certificate, key = copies(tmp_path)
    async with running_gateway(tmp_path, tls_cert=str(certificate), tls_key=str(key)) as running:
        assert await answers(running, tls_ca=CERTIFICATE)
        assert not await answers(running, tls_ca=OTHER_CERTIFICATE)
        assert not await answers(running)  # without TLS
        shutil.copy(OTHER_CERTIFICATE, certificate)  # whose key is not there yet
        assert await answers(running, tls_ca=CERTIFICATE)
        shutil.copy(OTHER_KEY, key)
        assert await answers(running, tls_ca=OTHER_CERTIFICATE)
        assert not await answers(running, tls_ca=CERTIFICATE)


async def test_a_client_without_a_certificate_that_is_trusted_gets_nothing_through(tmp_path: Path) -> None:
    files: dict[str, Any] = {"tls_cert": str(CERTIFICATE), "tls_key": str(KEY), "tls_client_ca": str(OTHER_CERTIFICATE)}
    async with running_gateway(tmp_path, **files) as running:
        assert not await answers(running, tls_ca=CERTIFICATE)
        assert not await answers(running, tls_ca=CERTIFICATE, tls_cert=CERTIFICATE, tls_key=KEY)
        assert await answers(running, tls_ca=CERTIFICATE, tls_cert=OTHER_CERTIFICATE, tls_key=OTHER_KEY)


def test_files_that_cannot_be_used_are_refused_without_their_content(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("marker")
    for files in (
        TlsFiles(CERTIFICATE, OTHER_KEY),
        TlsFiles(broken, KEY),
        TlsFiles(CERTIFICATE, broken),
        TlsFiles(CERTIFICATE, KEY, client_ca=broken),
        TlsFiles(tmp_path / "nothing", KEY),
    ):
        with pytest.raises(ConfigError, match=r"cannot be (used together|read)") as caught:
            Certificates(files)
        assert "marker" not in caught.value.message
