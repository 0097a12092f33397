"""A store of objects on this machine: a program that serves a folder over HTTP, as S3 or as Google Cloud Storage."""

from __future__ import annotations

import http.client
import http.server
import socket
import subprocess
import time
from pathlib import Path

from tests.ports import free_port

# Seconds until a server that does not start fails the test.
_START_S = 200
# (status, headers, content)
Answer = tuple[int, list[tuple[str, str]], bytes]


class ObjectServer:
    """The folders of ``root`` are buckets, their files are objects. uri: of the bucket."""

    scheme = ""
    # Variables of the machine that runs the tests; they would change what is asked, and of whom.
    foreign: tuple[str, ...] = ()

    def __init__(self, root: Path) -> None:
        self.uri, self.bucket, self._root = f"{self.scheme}://bucket", root / "bucket", root
        self.bucket.mkdir(parents=True)
        self.address = free_address()
        # Of the program itself, if another server stands before it.
        self.behind, self._program = self.address, None

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which clients find the server."""
        raise NotImplementedError

    def _command(self) -> list[str]:
        raise NotImplementedError

    def use(self, monkeypatch) -> None:
        """Makes the clients of this process, and of those that it starts, use the server."""
        for name in self.foreign:
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)

    def start(self) -> None:
        self._program = subprocess.Popen(self._command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_server(self.behind, self._program)

    def stop(self) -> None:
        self._program.kill()
        self._program.wait()

    def files(self, folder: str = "runs/pets") -> list[str]:
        """The objects below a folder of the bucket, by their names there."""
        below = self.bucket / folder
        return sorted(p.relative_to(below).as_posix() for p in below.rglob("*") if p.is_file())

    def put(self, key: str, content: bytes) -> str:
        """An object, by its URI."""
        path = self.bucket / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return f"{self.uri}/{key}"

    def put_folder(self, folder: Path, name: str) -> None:
        """Objects below ``name``, as the files below ``folder``."""
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.put(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())


class Relay(http.server.BaseHTTPRequestHandler):
    """Passes requests on to another server; a base for handlers that add to its answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def content(self) -> bytes:
        """The request's body."""
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def ask(self, address: str, content: bytes) -> Answer:
        """The other server's answer to the same request. Raises OSError."""
        upstream = http.client.HTTPConnection(address)
        # A signature covers the name of the host.
        upstream.request(self.command, self.path, body=content, headers=dict(self.headers))
        answer = upstream.getresponse()
        content, headers = answer.read(), answer.getheaders()
        upstream.close()
        return answer.status, headers, content

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing: tests look at what is stored."""


def free_address() -> str:
    """An address of this machine at which nothing listens."""
    return f"127.0.0.1:{free_port('127.0.0.1')}"


def wait_for_server(address: str, program: subprocess.Popen) -> None:
    """Returns once a program listens at an address."""
    host, port = address.split(":")
    deadline = time.monotonic() + _START_S
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            assert program.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)
