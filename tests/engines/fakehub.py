"""A Hugging Face Hub on 127.0.0.1: as much of it as its client asks of before it downloads a model.

python -m tests.engines.fakehub PORT org/name=FOLDER ...
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """``repos``: folders by the model's id. ``gated``: ids that nobody may have. ``asked``: the files that were asked
    for. ``holds``: files of which only half is sent; ``refuses``: none of these. ``calls``: requests in all."""

    daemon_threads = True

    def __init__(self, port: int, repos: Mapping[str, Path], gated: frozenset[str] = frozenset()) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.repos, self.gated, self.asked = repos, gated, list[str]()
        self.holds, self.refuses, self.calls = frozenset[str](), frozenset[str](), 0


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def do_GET(self) -> None:
        self.server.calls += 1
        path = unquote(urlsplit(self.path).path)
        api = path.startswith("/api/models/")
        words = path.removeprefix("/api/models").strip("/").split("/")
        model, rest = "/".join(words[:2]), words[2:]
        folder = self.server.repos.get(model)
        if model in self.server.gated:
            self._json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        elif folder is None:
            self._json({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        elif api:
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            entries = [(str(path.relative_to(folder)), path.stat().st_size) for path in files]
            if rest[:1] == ["tree"]:
                self._json([{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in entries])
            else:
                siblings = [{"rfilename": name, "size": size} for name, size in entries]
                self._json({"id": model, "modelId": model, "sha": COMMIT, "siblings": siblings})
        elif rest[-1] in self.server.refuses:
            self._json({"error": "not today"}, 403)
        elif rest[:1] == ["resolve"] and (folder / "/".join(rest[2:])).is_file():
            data = (folder / "/".join(rest[2:])).read_bytes()
            told = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if self.command == "GET":
                self.server.asked.append("/".join(rest[2:]))
            self._send(data, 200, {**told, "Content-Type": "application/octet-stream"})
        else:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def _json(self, data: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(json.dumps(data).encode(), status, {**(headers or {}), "Content-Type": "application/json"})

    def _send(self, data: bytes, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if Path(self.path).name not in self.server.holds:
            self.wfile.write(data)
            return
        self.wfile.write(data[: len(data) // 2])
        self.connection.recv(1)  # until the other side is gone
        self.close_connection = True


@contextmanager
def serving(repos: Mapping[str, Path], gated: frozenset[str] = frozenset(), port: int = 0) -> Iterator[Hub]:
    """A hub that answers while the context lasts."""
    hub = Hub(port, repos, gated)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


if __name__ == "__main__":
    named = dict(word.split("=", 1) for word in sys.argv[2:])
    Hub(int(sys.argv[1]), {name: Path(folder) for name, folder in named.items()}).serve_forever()
