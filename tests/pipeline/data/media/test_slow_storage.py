"""Storage that sends a byte now and then: neither a hang of the run nor a reject."""

import contextlib
import socket
import threading

import pytest

from pipeline.data.media.process import DecodeLimits, DecodeProcess
from pipeline.errors import DataError


@pytest.fixture
def trickle():
    """The address of a file of which a byte comes every tenth of a second, for ever."""
    ended = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = connection.recv(4096).partition(b" ")[0]
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 1000000\r\n\r\n")
            while head != b"HEAD" and not ended.wait(0.1):
                connection.sendall(b"x")

    def accept() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/a.png"
        ended.set()
        thread.join()


def test_a_file_that_trickles_stops_the_run_with_its_row(trickle, make_data_set):
    row = {"id": "slow", "image": trickle}
    message = r"row 'slow': storage: its file did not come within 0.5 s"
    limits = DecodeLimits(timeout_s=30.0, storage_s=0.5)
    with contextlib.closing(DecodeProcess(limits)) as decoders, pytest.raises(DataError, match=message):
        decoders.decode(row, make_data_set(), "image")
