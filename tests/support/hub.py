"""Serves a model on loopback as the Hugging Face hub does: one repository of one commit."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """A hub that has one model.

    Args:
        hub_id: What it is called, ``owner/name``.
        folder: Its files.

    Attributes:
        requests: What was asked for: method and path.
        address: What ``HF_ENDPOINT`` has to be.
    """

    def __init__(self, hub_id: str, folder: Path) -> None:
        self.hub_id, self.folder, self.requests = hub_id, folder, list[str]()
        owner = self

        class Handler(_Handler):
            hub = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def serving(self) -> Iterator[Self]:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        model, api = f"/{self.hub.hub_id}/resolve/", f"/api/models/{self.hub.hub_id}"
        if path.startswith(model):
            self._send_file(self.hub.folder / path.removeprefix(model).partition("/")[2])
        elif path.startswith(f"{api}/tree/"):
            self._send(json.dumps([self._entry(file) for file in self.hub.folder.iterdir()]).encode())
        elif path.startswith(api):
            siblings = [{"rfilename": file.name} for file in self.hub.folder.iterdir()]
            self._send(json.dumps({"id": self.hub.hub_id, "sha": COMMIT, "siblings": siblings}).encode())
        else:
            self._send(b"{}", status=200 if path == "/" else 404)

    def _entry(self, file: Path) -> dict[str, object]:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _etag(file)}

    def _send_file(self, file: Path) -> None:
        if file.is_file():
            self._send(file.read_bytes(), ETag=f'"{_etag(file)}"')
        else:
            self._send(b"", status=404, **{"X-Error-Code": "EntryNotFound"})

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
