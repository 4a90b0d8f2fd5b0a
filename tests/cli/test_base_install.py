"""With the base dependencies alone the SDK and the commands that need only it work, and `quire serve` says what to install."""

import subprocess
import sys

import pytest
from fake_inference_server import FakeServer
from quire_command import environment

# Everything of the server extra (pyproject.toml), by the names under which it is imported.
REFUSE_SERVER_EXTRA = """
import sys

class Refuse:
    names = {"grpc_health", "grpc_reflection", "huggingface_hub", "jinja2", "msgspec", "numpy", "yaml", "zmq", "ray", "safetensors",
             "tokenizers", "torch", "transformers", "triton"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def run_without_extra(code: str, address: str | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-c", REFUSE_SERVER_EXTRA + code],
        capture_output=True,
        text=True,
        input="Tell me a story.\n",
        env=environment(address),
        cwd="/",
        check=False,
        timeout=30,
    )


@pytest.mark.parametrize(
    ("arguments", "shows"),
    [
        (["generate", "Once"], "Once upon a time."),
        (["chat"], "Once upon a time."),
        (["status"], "group-0"),
        (["bench", "serve", "--requests", "2"], "2 requests"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_commands_of_the_sdk_run(server: FakeServer, arguments: list[str], shows: str) -> None:
    done = run_without_extra(f"from quire.cli.main import main; sys.exit(main({arguments!r}))", server.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert shows in done.stdout


def test_the_sdk_imports_and_answers(server: FakeServer) -> None:
    done = run_without_extra("import quire.client; print(quire.client.Client().generate('x').text)", server.address)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Once upon a time.\n", "")


@pytest.mark.parametrize("arguments", [["serve"], ["bench", "scheduler"]], ids=lambda arguments: arguments[-1])
def test_commands_of_the_server_say_what_to_install(arguments: list[str]) -> None:
    done = run_without_extra(f"from quire.cli.main import main; sys.exit(main({arguments!r}))")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f'quire {arguments[0]} needs the server extra; install it with: pip install "quire[server]"\n'
