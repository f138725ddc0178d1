"""A database that was away for a while is used again as soon as it is back."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.processes import descendants, kill_all
from tvilfm.retrieval import database
from tvilfm.retrieval.database import Database
from tvilfm.retrieval.embedded import start_server
from tvilfm.retrieval.store import Unavailable


def test_a_database_is_used_again_soon_after_a_long_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "FIRST_S", 0.1)
    monkeypatch.setattr(database, "PATIENCE_S", 1.0)
    url = start_server(tmp_path)
    connected = Database.open(url)

    def ask() -> int:
        return connected.run(lambda connection: connection.execute("SELECT 1").fetchone()[0])  # type: ignore[index]

    assert ask() == 1
    server = int((tmp_path / "postmaster.pid").read_text().split()[0])
    kill_all([server, *descendants(server)])
    outage_ends = time.monotonic() + 8  # longer than the patience: a pool retries after ever longer pauses
    while time.monotonic() < outage_ends:
        with pytest.raises(Unavailable, match="expected an answer from the database"):
            ask()
    start_server(tmp_path)
    assert ask() == 1
