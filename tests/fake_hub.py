"""A Hugging Face hub on this machine: folders served by the part of its protocol that downloads use."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves ``folder/ORG/NAME`` as repositories, each with one commit; notes what was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api" and len(parts) > 3:
            repo = self.server.folder / parts[2] / parts[3]
            revision = parts[5] if len(parts) > 5 else "main"
            if not repo.is_dir() or revision not in ("main", COMMIT):
                code = "RepoNotFound" if not repo.is_dir() else "RevisionNotFound"
                return self._send(404, b"{}", {"X-Error-Code": code}, body=body)
            files = sorted(p for p in repo.iterdir())
            if "tree" in parts:
                tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in files]
                return self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body=body)
            siblings = [{"rfilename": p.name, "size": p.stat().st_size} for p in files]
            content = json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings}).encode()
            return self._send(200, content, {"Content-Type": "application/json"}, body=body)
        parts = parts[1:] if parts[0] == "datasets" else parts
        path = self.server.folder.joinpath(*parts[:2], *parts[4:])
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
        content = path.read_bytes()
        if body:
            self.server.fetched.append(path.name)
        etag = hashlib.sha256(content).hexdigest()
        return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body=body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Stay silent."""


@contextmanager
def fake_hub(folder: Path) -> Iterator[Hub]:
    """Serve a folder for a while."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
