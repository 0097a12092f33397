"""Port numbers for servers that tests start."""

from __future__ import annotations

import random
import socket

# Below those that Linux gives to connections, one of which may take a port before its server does, or while it is away.
_NUMBERS = range(20000, 32768)
# Numbers that this process has given away.
_GIVEN: set[int] = set()


def free_port(host: str = "") -> int:
    """A number at which nothing listens; no other is ever the same in this process."""
    while True:
        # Processes of tests that run beside each other draw others, whatever their seeds.
        port = random.SystemRandom().choice(_NUMBERS)
        if port in _GIVEN:
            continue
        try:
            socket.create_server((host, port)).close()
        except OSError:
            continue
        _GIVEN.add(port)
        return port
