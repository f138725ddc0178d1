"""What the audit trail answers: who searched for what and when, what is stored about a person, and that it is gone."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from cluster.cli.app import app
from cluster.cli.options import time_of
from tests.unit.retrieval.test_gallery import OTHER, SPACE, prepare, rows
from tvilfm.retrieval import audit
from tvilfm.retrieval.audit import NewEntry, person_record, read_entries
from tvilfm.retrieval.gallery import Gallery


@pytest.fixture
def gallery(database: str) -> Gallery:
    return prepare(database)


def command(gallery: Gallery, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["audit", *arguments, f"gallery.url={json.dumps(gallery.url)}"])
    assert done.exit_code == 0, done.output
    return done.stdout


def search(key: str, version: int, ids: list[str], **facts: object) -> NewEntry:
    return NewEntry("search", facts, key, version, ids)


def fill(gallery: Gallery) -> None:
    gallery.upsert(rows(["a", "b"], pid="12"), space_id=SPACE, by="ingest")
    gallery.upsert(rows(["c"], pid="7"), space_id=SPACE, by="ingest")
    gallery.note([search("desk", 5, ["c", "a"], modalities=["text"]), search("desk", 5, ["c"])])


def test_the_trail_is_read_by_time_and_key(gallery: Gallery, database: str) -> None:
    fill(gallery)
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE audit SET time = time - interval '8 days' WHERE key = 'ingest' AND ids = '{c}'")
    shown = list(csv.DictReader(io.StringIO(command(gallery, "--csv", "--since", "7d"))))
    assert [(row["key"], row["action"], json.loads(row["ids"])) for row in shown] == [
        ("ingest", "upsert", ["a", "b"]),
        ("desk", "search", ["c", "a"]),
        ("desk", "search", ["c"]),
    ]
    assert {row["role"] for row in shown} == {"postgres"}
    content = json.loads(command(gallery, "--json", "--key", "desk"))
    assert [entry["facts"] for entry in content["entries"]] == [{"modalities": ["text"]}, {}]
    first, *_ = command(gallery, "--key", "desk").splitlines()
    assert first.endswith("desk  search  2 images  modalities: ['text']")


def test_pages_of_the_trail_are_read_to_the_end(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "FETCHED", 2)
    for count in (3, 4):
        gallery.note([search(str(count), 1, [str(count)])] * count)
        assert len(list(read_entries(gallery.database, key=str(count)))) == count


def test_what_is_stored_about_a_person_and_that_it_is_gone(gallery: Gallery) -> None:
    fill(gallery)
    record = person_record(gallery.database, "12")
    assert [(image.id, image.space, image.thumbnail) for image in record.stored] == [
        ("a", SPACE, True),
        ("b", SPACE, True),
    ]
    text = command(gallery, "--person", "12")
    assert "stored: a, camera 1, taken unknown" in text and "person 12: 2 images are stored" in text
    assert "stored: c" not in text

    gallery.delete_person("12", by="officer")
    content = json.loads(command(gallery, "--json", "--person", "12"))
    assert content["person"]["gone"] and content["person"]["stored"] == []
    (erasure,) = content["person"]["erasures"]
    assert (erasure["key"], erasure["ids"], erasure["facts"]["count"]) == ("officer", ["a", "b"], 2)
    # The searches that showed the person are still known, and no other.
    actions = [(entry["key"], entry["action"]) for entry in content["entries"]]
    assert actions == [("ingest", "upsert"), ("desk", "search"), ("officer", "delete person")]
    assert "person 12: nothing is stored" in command(gallery, "--person", "12")


def test_copies_that_an_erasure_does_not_reach_are_found(gallery: Gallery, database: str) -> None:
    fill(gallery)
    other = prepare(database, OTHER)
    other.upsert(rows(["a", "x"], pid="12"), space_id=OTHER)
    gallery.delete_person("12", by="officer")
    record = person_record(gallery.database, "12")
    assert [(image.space, image.id) for image in record.stored] == [(OTHER, "a"), (OTHER, "x")]
    other.delete_person("12")
    gallery.upsert(rows(["b"], pid=None), space_id=SPACE)  # indexed again, from a folder without names
    record = person_record(gallery.database, "12")
    assert [(image.space, image.id) for image in record.stored] == [(SPACE, "b")] and record.galleries == 2


@pytest.mark.parametrize(
    ("text", "sign", "expected"),
    [
        ("7d", -1, timedelta(days=-7)),
        ("12h", 1, timedelta(hours=12)),
    ],
)
def test_times_of_options(text: str, sign: Any, expected: timedelta) -> None:
    assert abs(time_of("since", text, sign=sign) - datetime.now(UTC) - expected) < timedelta(minutes=1)
    assert time_of("since", "2026-05-01", sign=sign) == datetime(2026, 5, 1, tzinfo=UTC)
    assert time_of("since", "2026-05-01T12:00:00+02:00", sign=sign) == datetime(2026, 5, 1, 10, tzinfo=UTC)
    for wrong in ("soon", "7w", "d", "", "99999999999999d"):
        with pytest.raises(ValueError, match="--since: expected days"):
            time_of("since", wrong, sign=sign)
