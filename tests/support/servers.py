"""Serves storage on loopback: a real S3 (moto's, in a process of its own), and a proxy in front of it that fails."""

import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

from tests.support.pace import FOREVER

S3_SERVER = """
import logging
import sys
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
NO_SUCH_KEY = b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code><Message>No.</Message></Error>"

#: The bytes of ``bucket/0.tar``.
DATA = os.urandom(1 << 20)

#: What happens to a request, by method and path: None, or one of cut, busy, missing, slow.
Fault = Callable[[str, str], str | None]


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of a real, empty S3 server."""
    process = subprocess.Popen([sys.executable, "-c", S3_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.kill()
        process.wait()


class FailingProxy:
    """Passes requests on to a server of this machine, unless ``fault`` says what shall go wrong.

    Attributes:
        fault: Asked per request.
        done: How often each kind of fault was done.
        requests: How often each method was asked for.
    """

    def __init__(self, port: int) -> None:
        self.upstream = port
        self.fault: Fault = lambda method, path: None
        self.done: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FailingProxy":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reset(self, fault: Fault | None = None) -> None:
        self.fault = fault or (lambda method, path: None)
        self.done.clear()
        self.requests.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FailingProxy

    def log_message(self, *args: object) -> None:
        pass

    def _handle(self) -> None:
        self.owner.requests[self.command] += 1
        fault = self.owner.fault(self.command, self.path)
        if fault:
            self.owner.done[fault] += 1
        num_bytes = int(self.headers.get("Content-Length", 0))
        if fault == "cut" and self.command == "PUT":
            self.rfile.read(num_bytes // 2)
            self._hang_up()
        elif fault in ("busy", "missing"):
            self.rfile.read(num_bytes)
            self._answer(*((503, SLOW_DOWN) if fault == "busy" else (404, NO_SUCH_KEY)))
        else:
            self._forward(self.rfile.read(num_bytes), fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815  # http.server asks for these names

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/xml")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _forward(self, body: bytes, fault: str | None) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.owner.upstream, timeout=FOREVER)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "expect")}
        upstream.request(self.command, self.path, body=body or None, headers=headers)
        response = upstream.getresponse()
        data = response.read()
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault == "cut" and self.command == "GET" and len(data) > 1:
            self.wfile.write(data[: len(data) // 2])
            self._hang_up()
        elif fault == "slow":
            for start in range(0, len(data), 1 << 15):
                self.wfile.write(data[start : start + (1 << 15)])
                self.wfile.flush()
                time.sleep(0.01)
        else:
            self.wfile.write(data)
        upstream.close()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)  # also where a forked process holds the connection as well
        self.close_connection = True


def now_and_then(seed: int, **shares: float) -> Fault:
    """Each fault in a share of the requests, at random; never thrice for a file until its content came through.

    For a file, since several processes ask at once: of all requests in their order, one of them may get all the faults.
    Its content, since to look for a file and then read it is one attempt of two requests.
    """
    rng, lock, faults = random.Random(seed), threading.Lock(), Counter[str]()

    def fault(method: str, path: str) -> str | None:
        with lock:
            choice = rng.choices([*shares, None], [*shares.values(), 1 - sum(shares.values())])[0]
            choice = None if faults[path] == 2 else choice
            if choice:
                faults[path] += 1
            elif method != "HEAD":
                faults[path] = 0
        return choice

    return fault


class StallingServer:
    """Serves the files of a folder over HTTP, from a moment on only their beginnings.

    Args:
        folder: What is served.
        from_now: Whether the moment has come.

    Attributes:
        is_stalled: Whether somebody waits for the rest of a file.
    """

    def __init__(self, folder: Path, from_now: Callable[[], bool]) -> None:
        self.is_stalled = False
        self._done = done = threading.Event()
        owner = self

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def copyfile(self, source: BinaryIO, outputfile: BinaryIO) -> None:
                if not from_now():
                    super().copyfile(source, outputfile)
                    return
                outputfile.write(source.read(10_000))
                owner.is_stalled = True
                done.wait()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "StallingServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._done.set()
        self._server.shutdown()
        self._server.server_close()
