"""A hub on loopback, as far as huggingface_hub asks: one repository, its list of files, and the files."""

import hashlib
import http.server
import json
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

COMMIT: Final = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves a folder as repository `name`; remembers which files it was asked for."""

    def __init__(self, folder: Path, name: str) -> None:
        self.fetched: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path.startswith(f"/api/models/{name}/tree/"):
                    files = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"} for file in folder.iterdir()]
                    self._answer(json.dumps(files).encode(), "application/json")
                elif path.startswith(f"/api/models/{name}"):
                    siblings = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                    self._answer(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), "application/json")
                elif path.startswith(f"/{name}/resolve/") and (folder / Path(path).name).is_file():
                    if self.command == "GET":
                        hub.fetched.append(Path(path).name)
                    self._answer((folder / Path(path).name).read_bytes(), "application/octet-stream")
                else:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def _answer(self, body: bytes, kind: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
