"""The process that stands before fake-gcs-server, and adds credentials, conditions, limits and lost answers.

python gcs_front.py ADDRESS BEHIND
"""

from __future__ import annotations

import dataclasses
import http.client
import http.server
import json
import re
import socket
import sys
import threading
import time
import urllib.parse
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.object_server import Answer, Relay

# The one that is let in; any other is unknown (401).
TOKEN = "test-token"
TOKEN_ANSWER = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer", "id_token": "test"}
# Path at which tests set and read the fields of ``Front``.
CONTROL = "/control"
# Minimum seconds between two updates of one object, if they are limited.
UPDATE_S = 1.0


@dataclasses.dataclass
class Front:
    """What tests set, and what they learn.

    limited: an update of an object within a second of its last one is refused (429), as Google's store may; refused:
    the number of these. unmet: number of uploads and deletions whose condition did not hold. lost: number of uploads
    to come that are done, and whose answers do not arrive. unlisted: number of listings to come that are refused (403).
    denied: whether all requests are.
    """

    limited: int = 0
    refused: int = 0
    unmet: int = 0
    lost: int = 0
    unlisted: int = 0
    denied: int = 0


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: str, behind: str) -> None:
        host, port = address.split(":")
        super().__init__((host, int(port)), _Handler)
        self.behind, self.front = behind, Front()
        self.changing, self.updated = threading.Lock(), {}


class _Handler(Relay):
    def _respond(self) -> None:
        content = self.content()
        self.url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(self.url.query))
        if self.url.path == CONTROL:
            vars(self.server.front).update(json.loads(content))
            return self._answer_json(200, dataclasses.asdict(self.server.front))
        if self.url.path == "/token":
            return self._answer_json(200, TOKEN_ANSWER)
        try:
            found = self._denied() or (self._unlisted() or self._unmet() if self.command == "GET" else None)
            if found is None:
                found = self.ask(self.server.behind, content) if self.command == "GET" else self._change(content)
        except OSError:
            # The program behind is away.
            found = _refusal(503, "backendError")
        if found is None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.answer(*found)

    do_GET = do_PUT = do_DELETE = do_POST = do_PATCH = _respond

    def _change(self, content: bytes) -> Answer | None:
        """The answer to an upload or a deletion, None if it gets lost."""
        front, updated, name = self.server.front, self.server.updated, self._name()
        with self.server.changing:
            if refusal := self._unmet():
                front.unmet += 1
                return refusal
            if front.limited and time.monotonic() - updated.get(name, -UPDATE_S) < UPDATE_S:
                front.refused += 1
                return _refusal(429, "rateLimitExceeded")
            updated[name] = time.monotonic()
            found = self.ask(self.server.behind, content)
            if front.lost:
                front.lost -= 1
                return None
            return found

    def _denied(self) -> Answer | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token != TOKEN:
            return _refusal(401, "authError")
        return _refusal(403, "forbidden") if self.server.front.denied else None

    def _unlisted(self) -> Answer | None:
        front = self.server.front
        if not front.unlisted or not self.url.path.endswith("/o"):
            return None
        front.unlisted -= 1
        return _refusal(403, "rateLimitExceeded")

    def _unmet(self) -> Answer | None:
        """The answer to a condition that does not hold."""
        same, other = self.query.get("ifGenerationMatch"), self.query.get("ifGenerationNotMatch")
        if same is None and other is None:
            return None
        generation = self._generation()
        if same not in (None, generation):
            return _refusal(412, "conditionNotMet")
        return (304, [], b"") if other == generation else None

    def _generation(self) -> str:
        """The object's generation, "0" if it is missing."""
        bucket = re.search("/b/([^/]+)/", self.url.path)[1]
        behind = http.client.HTTPConnection(self.server.behind)
        behind.request("GET", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(self._name(), safe='')}")
        answer = behind.getresponse()
        content = answer.read()
        behind.close()
        return json.loads(content)["generation"] if answer.status == 200 else "0"

    def _name(self) -> str:
        return self.query.get("name") or urllib.parse.unquote(self.url.path.rpartition("/o/")[2])

    def _answer_json(self, status: int, value: dict) -> None:
        self.answer(status, [("Content-Type", "application/json")], json.dumps(value).encode())


def _refusal(status: int, reason: str) -> Answer:
    error = {"code": status, "message": reason, "errors": [{"domain": "global", "reason": reason}]}
    return status, [("Content-Type", "application/json")], json.dumps({"error": error}).encode()


if __name__ == "__main__":
    _Server(*sys.argv[1:]).serve_forever()
