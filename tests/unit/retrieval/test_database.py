"""A database that was away for a while is used again as soon as it is back."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.processes import kill_server
from tvilfm.retrieval import database
from tvilfm.retrieval.database import Database
from tvilfm.retrieval.embedded import start_server
from tvilfm.retrieval.store import Unavailable


def ask(connected: Database) -> int:
    return connected.run(lambda connection: connection.execute("SELECT 1").fetchone()[0])  # type: ignore[index]


def test_a_database_is_used_again_soon_after_a_long_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "FIRST_S", 0.1)
    monkeypatch.setattr(database, "PATIENCE_S", 1.0)
    connected = Database.open(start_server(tmp_path))
    assert ask(connected) == 1
    kill_server(tmp_path)
    outage_ends = time.monotonic() + 8  # longer than the patience: a pool retries after ever longer pauses
    while time.monotonic() < outage_ends:
        with pytest.raises(Unavailable, match="expected an answer from the database"):
            ask(connected)
    start_server(tmp_path)
    assert ask(connected) == 1


def test_a_request_that_waits_is_answered_when_the_database_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "FIRST_S", 0.1)
    monkeypatch.setattr(database, "PATIENCE_S", 4.0)
    connected = Database.open(start_server(tmp_path))
    assert ask(connected) == 1
    kill_server(tmp_path)
    with ThreadPoolExecutor() as threads:
        earlier = threads.submit(
            ask, connected
        )  # the pool begins to connect again, and gives up before the server is back
        time.sleep(3.0)
        back = threading.Timer(2.0, start_server, [tmp_path])
        back.start()
        assert ask(connected) == 1
        with pytest.raises(Unavailable):
            earlier.result()
    back.join()
