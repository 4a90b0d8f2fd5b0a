"""`quire health` against a real gateway, as a probe runs it."""

import asyncio
from pathlib import Path

from gateway_parts import running_gateway
from quire_command import quire

SUPPORT = Path(__file__).parents[1] / "support"
CERTIFICATE, KEY = SUPPORT / "localhost_certificate.pem", SUPPORT / "localhost_key.pem"


async def asked(*arguments: str) -> tuple[int, str, str]:
    done = await asyncio.to_thread(quire, "health", *arguments)
    return done.returncode, done.stdout, done.stderr


async def test_the_exit_code_is_the_health(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as running:
        address = f"--address={running.address}"
        assert await asked(address) == (0, "SERVING\n", "")
        running.gateway.health.shut_down()
        assert await asked(address) == (1, "NOT_SERVING\n", "")
        assert await asked(address, "--service=quire.live") == (0, "SERVING\n", "")
        code, _, error = await asked(address, "--service=nobody")
        assert (code, "NOT_FOUND: this server has no such service" in error) == (1, True)


async def test_certificates_are_checked_and_shown(tmp_path: Path) -> None:
    certificate, key = str(CERTIFICATE), str(KEY)
    async with running_gateway(tmp_path, tls_cert=certificate, tls_key=key, tls_client_ca=certificate) as running:
        port = running.address.rpartition(":")[2]
        trust = (f"--address=127.0.0.1:{port}", f"--tls-ca={CERTIFICATE}", "--tls-server-name=localhost")
        assert await asked(*trust, f"--tls-cert={CERTIFICATE}", f"--tls-key={KEY}") == (0, "SERVING\n", "")
        code, _, error = await asked(*trust, "--timeout=1")
        assert (code, "does not tell its health" in error) == (1, True)


async def test_nobody_there_is_not_healthy() -> None:
    code, _, error = await asked("--address=127.0.0.1:1", "--timeout=0.5")
    assert (code, error.startswith("quire: 127.0.0.1:1 does not tell its health: DEADLINE_EXCEEDED")) == (1, True)
