"""Secrets of every kind are planted in a cluster that logs all it can; then everything that others can read is searched for them."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import ServeProcess, wait_for

from quire.cli.main import main
from quire.client import Client
from quire.common.curve import CLIENT_KEY, CLUSTER_KEY, CurveKeys
from quire.common.errors import QuireError

SUPPORT = Path(__file__).parents[1] / "support"
CERTIFICATE, KEY = SUPPORT / "localhost_certificate.pem", SUPPORT / "localhost_key.pem"
PROMPT = "MarkedPromptOfAClient"
WRONG_TOKEN = "quire-MarkedTokenThatNobodyKnows"
BROKEN_LINE = "MarkedLineOfATokenFile"
BROKEN_KEY = "MarkedLineOfAKeyFile"
# Variables of the one who starts the server; no process that it starts has business with them.
VARIABLES = {"QUIRE_API_KEY": "quire-MarkedApiKey", "HF_TOKEN": "hf_MarkedHubToken", "HUGGING_FACE_HUB_TOKEN": "hf_MarkedOtherToken"}
# These run what others send, or what models bring; Ray's own processes need its token.
WITHOUT_RAY_TOKEN = (
    "quire.cluster.gateway.main",
    "quire.cluster.gateway.template_child",
    "quire.cluster.scheduler.process",
    "quire.worker.rank_process",
    "quire.cluster.controller.reaper",
)
LARGEST_LOG_BYTES = 2**26


def test_secrets_are_in_no_log_argument_environment_or_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["token", "new", "--tenant", "acme", "--role", "admin"]) == 0
    printed, tokens = capsys.readouterr(), tmp_path / "tokens"
    token = printed.out.strip()
    tokens.write_text(printed.err)
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    shutil.copy(CERTIFICATE, certificate)
    shutil.copy(KEY, key)
    key_lines = [text for text in KEY.read_text().splitlines() if len(text) > 40]
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    arguments = ("--token-file", str(tokens), "--tls-cert", str(certificate), "--tls-key", str(key), "--log-level", "debug")
    with ServeProcess(tmp_path, *arguments, "--gateways", "2") as serve:
        address = serve.wait_ready().replace("127.0.0.1", "localhost")
        with Client(address, api_key=token, tls_ca=CERTIFICATE, max_retries=0) as client:
            assert client.generate(PROMPT, max_tokens=2, ignore_eos=True).token_ids
            mistakes: tuple[dict[str, object], ...] = ({"temperature": -1.0}, {"stop": ["x" * 10_000]}, {"max_tokens": 10**6})
            errors = [_error(client, **options) for options in mistakes]
        for api_key in (WRONG_TOKEN, token[:-1], token + "x"):
            with Client(address, api_key=api_key, tls_ca=CERTIFICATE, max_retries=0) as stranger:
                errors.append(_error(stranger))
        # Files that break while they are in use, a rank that dies: what is logged then.
        tokens.write_text(tokens.read_text() + BROKEN_LINE + "\n")
        key.write_text(key.read_text().replace(key_lines[0], BROKEN_KEY))
        with Client(address, api_key=token, tls_ca=CERTIFICATE, max_retries=0) as client:
            assert client.generate(PROMPT, max_tokens=2, ignore_eos=True).token_ids
            os.kill(serve.process_of("quire.worker.rank_process"), signal.SIGKILL)
            wait_for(lambda: client.cluster.groups()[0].num_restarts == 1 and client.health() == "SERVING", timeout_s=60)
        (key_file,) = serve.temporary.rglob(CLUSTER_KEY)
        keys = CurveKeys.read(key_file)
        logs = [path for path in _logs(serve.temporary) if path.name not in (CLUSTER_KEY, CLIENT_KEY)]
        assert any(path.name == "gateway-0.log" for path in logs)
        assert len(logs) > 10, "Ray's are among them"
        secrets = [
            token,
            WRONG_TOKEN,
            BROKEN_LINE,
            BROKEN_KEY,
            PROMPT,
            *key_lines,
            *VARIABLES.values(),
            keys.client_secret,
            keys.server_secret or "",
        ]
        for secret in secrets:
            assert [path for path in logs if secret.encode() in path.read_bytes()] == [], secret
            assert secret not in serve.output, secret
            assert not any(secret in error for error in errors), secret
            assert not any(secret in command for command in serve.processes().values()), secret
        environments = {pid: _environment(pid) for pid in serve.processes() if pid != serve.process.pid}
        ray_tokens = {
            text for environment in environments.values() for text in environment.split("\0") if text.startswith("RAY_AUTH_TOKEN=")
        }
        (ray_token,) = [text.partition("=")[2] for text in ray_tokens]
        assert [path for path in logs if ray_token.encode() in path.read_bytes()] == []
        seen: set[str] = set()
        for pid, command in serve.processes().items():
            assert not any(value in environments.get(pid, "") for value in VARIABLES.values()), command
            for module in WITHOUT_RAY_TOKEN:
                if f"-m {module} " in command:
                    seen.add(module)
                    assert ray_token not in environments[pid], command
        assert seen == {*WITHOUT_RAY_TOKEN}


def _error(client: Client, **options: object) -> str:
    with pytest.raises(QuireError) as caught:
        client.generate(PROMPT, **options)  # type: ignore[arg-type]  # they are wrong
    return f"{caught.value} {caught.value.message} {caught.value!r}"


def _logs(folder: Path) -> Iterator[Path]:
    """Every file of a run: logs, reports, Ray's session."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert path.stat().st_size < LARGEST_LOG_BYTES, path
            yield path


def _environment(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:  # it has ended
        return ""
