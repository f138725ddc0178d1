"""API keys: places that store them, their end, their limit over all replicas, and what a lost place does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from tvilfm.config import ServeSection
from tvilfm.retrieval.audit import read_entries
from tvilfm.retrieval.database import Database
from tvilfm.retrieval.store import Unavailable
from tvilfm.service.key_checker import SYNC_S, KeyChecker
from tvilfm.service.keys import KeyFile, KeyStore, KeyTable, add_key

MINUTE = datetime(2026, 5, 1, 12, 30, tzinfo=UTC).timestamp()


@pytest.fixture
def opened(database: str) -> Database:
    return Database.open(database)


@pytest.fixture(params=["file", "table"])
def store(request: pytest.FixtureRequest, tmp_path: Path, opened: Database) -> KeyStore:
    return KeyFile(tmp_path / "keys") if request.param == "file" else KeyTable(opened)


def test_a_key_is_stored_as_its_hash_and_read_back(store: KeyStore) -> None:
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(days=90)
    token = add_key(store, "desk", ["read", "admin"], expires=end, per_minute=60)
    other = add_key(store, "ingest", ["write"])
    key, second = store.read()
    assert (key.name, key.scopes, key.expires, key.per_minute) == ("desk", ("read", "admin"), end, 60)
    assert (second.name, second.expires, second.per_minute) == ("ingest", None, None)
    assert token.removeprefix("tvi_") not in key.model_dump_json() and other != token
    with pytest.raises(ValueError, match="name: expected a new one, got desk"):
        add_key(store, "desk", ["read"])
    with pytest.raises(ValueError, match="scope: expected some of read, write, admin, got root"):
        add_key(store, "two", ["read", "root"])
    with pytest.raises(ValueError, match="expires: expected a time in the future"):
        add_key(store, "two", ["read"], expires=datetime(2020, 1, 1, tzinfo=UTC))
    with pytest.raises(ValueError, match=r"name: expected one of \['desk', 'ingest'\], got two"):
        store.remove("two")
    store.remove("desk")
    assert [one.name for one in store.read()] == ["ingest"]


def test_of_commands_that_change_keys_at_once_none_is_lost(store: KeyStore) -> None:
    add_key(store, "leaked", ["read"])
    with ThreadPoolExecutor(8) as pool:
        added = [pool.submit(add_key, store, str(number), ["read"]) for number in range(8)]
        removed = pool.submit(store.remove, "leaked")
        for one in (*added, removed):
            one.result()
    assert sorted(key.name for key in store.read()) == [str(number) for number in range(8)]


def test_the_audit_trail_says_who_changed_keys(opened: Database) -> None:
    add_key(KeyTable(opened), "desk", ["read"], per_minute=5)
    KeyTable(opened).remove("desk")
    added, removed = read_entries(opened)
    facts = {"name": "desk", "scopes": ["read"], "expires": None, "per_minute": 5}
    assert (added.action, added.role, added.facts) == ("add key", "postgres", facts)
    assert (removed.action, removed.key, removed.facts) == ("remove key", None, {"name": "desk"})


def test_key_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(ValueError, match="tvilfm keys add"):
        KeyFile(path).read()
    add_key(KeyFile(path), "one", ["read"])
    assert path.stat().st_mode & 0o077 == 0
    path.write_text("keys: [{name: 1}]")
    with pytest.raises(ValueError, match="field required"):
        KeyFile(path).read()
    with pytest.raises(ValueError, match=r"keys: expected database, or a file of API keys, with host 0\.0\.0\.0"):
        ServeSection(host="0.0.0.0")
    for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"):
        assert ServeSection(host=host).keys is None
    assert ServeSection(keys="database").keys == "database" and ServeSection(keys="a.yaml").keys == Path("a.yaml")


def test_a_removed_or_expired_key_is_refused(store: KeyStore, opened: Database) -> None:
    end = datetime.now(UTC) + timedelta(hours=1)
    short, removed = add_key(store, "short", ["read"], expires=end), add_key(store, "removed", ["read"])
    now = [end.timestamp() - 1]
    checker = KeyChecker(store, opened, clock=lambda: now[0])
    assert checker.find(short) and checker.find(removed) and checker.find(short[:-1]) is None
    now[0] = end.timestamp()
    assert checker.find(short) is None and checker.find(removed)
    store.remove("removed")
    added = add_key(store, "added", ["read"])
    checker.sync()
    assert checker.find(removed) is None and checker.find(added)
    assert SYNC_S < 1


def test_a_limit_holds_over_all_replicas_from_the_next_exchange_on(store: KeyStore, opened: Database) -> None:
    token, free = add_key(store, "desk", ["read"], per_minute=5), add_key(store, "free", ["read"])
    now = [MINUTE + 10.0]
    first, second = (KeyChecker(store, opened, clock=lambda: now[0]) for _ in range(2))
    desk, unlimited = first.find(token), first.find(free)
    assert desk is not None and unlimited is not None
    assert [first.wait_s(desk) for _ in range(3)] == [0, 0, 0]
    first.sync()
    second.sync()
    assert [second.wait_s(desk) for _ in range(3)] == [0, 0, 51]  # three were used elsewhere
    assert first.wait_s(desk) == 0  # it has not heard of these two
    for checker in (second, first, second):
        checker.sync()
    assert first.wait_s(desk) == second.wait_s(desk) == 51
    assert {first.wait_s(unlimited) for _ in range(100)} == {0}
    now[0] = MINUTE + 60
    assert [second.wait_s(desk) for _ in range(6)] == [0, 0, 0, 0, 0, 61]


def test_a_database_that_does_not_answer_costs_no_count(opened: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    token = add_key(KeyTable(opened), "desk", ["read"], per_minute=2)
    checker, other = (KeyChecker(KeyTable(opened), opened, clock=lambda: MINUTE) for _ in range(2))
    key = checker.find(token)
    assert key is not None and checker.wait_s(key) == 0
    with monkeypatch.context() as patch:
        patch.setattr(checker, "_exchange", _unavailable)
        with pytest.raises(Unavailable):
            checker.sync()
    assert checker.find(token) and (checker.wait_s(key), checker.wait_s(key)) == (0, 61)
    checker.sync()
    other.sync()
    assert other.wait_s(key) == 61


def _unavailable(*arguments: object) -> None:
    raise Unavailable("gone")


def test_without_a_readable_file_no_key_is_accepted(tmp_path: Path, opened: Database) -> None:
    path = tmp_path / "keys"
    token = add_key(KeyFile(path), "desk", ["read"])
    checker, content = KeyChecker(KeyFile(path), opened), path.read_text()
    path.unlink()
    checker.sync()
    assert checker.find(token) is None
    path.write_text(content)
    checker.sync()
    assert checker.find(token)


def test_counts_are_not_in_the_write_ahead_log(opened: Database) -> None:
    with psycopg.connect(opened.url) as connection:
        (kind,) = connection.execute("SELECT relpersistence FROM pg_class WHERE relname = 'key_use'").fetchone() or (
            "",
        )
    assert kind in ("u", b"u")
