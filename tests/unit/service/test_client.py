"""What the client tries again, against a server that answers as it is told to."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from tvilfm.service.client import Client, ServiceError
from tvilfm.service.messages import RETRY_S

STATUS = b'{"version": 3, "count": 1}'


class Scripted(ThreadingHTTPServer):
    """Gives the answers of `script` one after the other: status and body; None = the connection breaks."""

    script: list[tuple[int, bytes] | None]
    retry_after = "0"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client may be gone before its answer."""


class _Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Scripted)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.server.script.pop(0)
        if answer is None:
            self.connection.close()
            return
        self.send_response(answer[0])
        self.send_header("Retry-After", self.server.retry_after)
        self.send_header("Content-Length", str(len(answer[1])))
        self.end_headers()
        self.wfile.write(answer[1])

    def log_message(self, format: str, *arguments: object) -> None:
        """Not to the tests' output."""


@pytest.fixture
def server() -> Iterator[Scripted]:
    server = Scripted(("127.0.0.1", 0), _Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "failure",
    [
        None,
        (429, b'{"error": "full"}'),
        (503, b'{"error": "a part is replaced"}'),
        (500, b"Internal Server Error"),  # Serve's proxy, when the replica behind it died
        (502, b"Bad Gateway"),
        (504, b""),
        (408, b"Request timed out"),
    ],
)
def test_what_got_no_answer_of_the_service_is_tried_again(server: Scripted, failure: tuple[int, bytes] | None) -> None:
    server.script = [failure, (200, STATUS), failure, failure, failure]
    with Client("http://{}:{}".format(*server.server_address), retries=2) as client:
        assert client.put_bulk([]).version == 3
        with pytest.raises(Exception) as caught:
            client.put_bulk([])
    assert server.script == []
    assert (failure is None) != isinstance(caught.value, ServiceError)


@pytest.mark.parametrize("status", [401, 404, 409, 422, 500])
def test_what_the_service_refuses_is_not_tried_again(server: Scripted, status: int) -> None:
    server.script = [(status, b'{"error": "no"}'), (200, STATUS)]
    with Client("http://{}:{}".format(*server.server_address), retries=2) as client:
        with pytest.raises(ServiceError, match="no") as caught:
            client.put_bulk([])
        assert caught.value.status == status
    assert server.script == [(200, STATUS)]


@pytest.mark.parametrize(("told", "wait_s"), [("7", 7), ("Wed, 21 Oct 2026 07:28:00 GMT", RETRY_S), ("-1", RETRY_S)])
def test_a_time_to_wait_that_is_no_number_of_seconds_is_the_usual_one(
    server: Scripted, monkeypatch: pytest.MonkeyPatch, told: str, wait_s: float
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("tvilfm.service.client.time", SimpleNamespace(sleep=waited.append))
    server.script, server.retry_after = [(503, b""), (200, STATUS)], told
    with Client("http://{}:{}".format(*server.server_address)) as client:
        assert client.put_bulk([]).version == 3
    assert waited == [wait_s]


def test_the_client_loads_neither_the_model_nor_the_service() -> None:
    code = "import sys, tvilfm.service.client; print(*{'torch', 'psycopg', 'numpy', 'fastapi'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
