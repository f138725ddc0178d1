"""The audit trail: who searched, changed the gallery or changed keys; and what the database stores about a person."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from psycopg.rows import class_row

from tvilfm.retrieval.database import Connection, Database

FETCHED = 2_000  # entries per round trip
ERASED = "delete person"  # action of an erasure
ENTRIES = """
    SELECT number, time, key, role, action, version, ids, facts FROM audit
    WHERE number > %(after)s AND (%(since)s::timestamptz IS NULL OR time >= %(since)s)
        AND (%(key)s::text IS NULL OR key = %(key)s)
        AND (%(person)s::text IS NULL OR facts ->> 'pid' = %(person)s OR ids && %(ids)s::text[])
    ORDER BY number LIMIT %(limit)s
"""
STORED = """
    SELECT gallery.space, image.id, image.camid::text AS camera, image.time, image.added, image.image AS reference,
        image.thumbnail IS NOT NULL AS thumbnail, image.raw IS NOT NULL AS feature
    FROM image JOIN gallery ON gallery.number = image.gallery
    WHERE image.pid::text = %(person)s OR image.id = ANY(%(erased)s::text[])
    ORDER BY gallery.number, image.id
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An entry of the audit trail.

    Attributes:
        number: number of the entry; later entries have larger numbers.
        time: of the action.
        key: name of the API key; None = a command, or a service that requires no keys.
        role: role of the database that wrote the entry; None = the entry is older than this column.
        action: what was done: search, upsert, delete, delete person, delete camera, retention, add key, remove key.
        version: gallery version that was searched or written; None for keys.
        ids: ids of the hits, or of the written or deleted rows; none if a camera or old rows were deleted.
        facts: further facts: number of affected rows, person, camera, or how the client searched.
    """

    number: int
    time: datetime
    key: str | None
    role: str | None
    action: str
    version: int | None
    ids: list[str]
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """What a gallery stores about one image of a person, besides two vectors for the search.

    Attributes:
        space: space of the model whose gallery has the row.
        camera: the camera.
        time: when the image was taken; None = unknown.
        added: when the row was written.
        reference: image reference.
        thumbnail: whether a thumbnail is stored.
        feature: whether the image's raw feature is stored.
    """

    space: str
    id: str
    camera: str
    time: datetime | None
    added: datetime
    reference: str | None
    thumbnail: bool
    feature: bool


@dataclass(frozen=True, kw_only=True)
class PersonRecord:
    """What the database knows of a person.

    Attributes:
        stored: rows of all galleries, also of those that are not in use: the person's rows, and rows that have the id
            of an erased image, which were written again.
        erasures: entries of the audit trail that erased the person.
        galleries: number of galleries that were read.
    """

    stored: list[StoredImage]
    erasures: list[Entry]
    galleries: int

    @property
    def ids(self) -> list[str]:
        """Ids of the person's images, stored or erased."""
        return sorted({image.id for image in self.stored} | {id for entry in self.erasures for id in entry.ids})


class NewEntry(NamedTuple):
    """An entry before it is written; see `Entry`."""

    action: str
    facts: Mapping[str, Any]
    key: str | None = None
    version: int | None = None
    ids: Sequence[str] = ()


def write_entries(connection: Connection, *entries: NewEntry) -> None:
    """Add entries to the audit trail, in one round trip."""
    query = "INSERT INTO audit (action, facts, key, version, ids) VALUES (%s, %s, %s, %s, %s)"
    rows = [(entry.action, json.dumps(dict(entry.facts)), *entry[2:4], list(entry.ids)) for entry in entries]
    with connection.cursor() as cursor:
        cursor.executemany(query, rows)


def read_entries(
    database: Database,
    *,
    since: datetime | None = None,
    key: str | None = None,
    person: str | None = None,
    ids: Sequence[str] = (),
) -> Iterator[Entry]:
    """Yield entries of the audit trail, oldest first.

    Args:
        database: the database of galleries.
        since: time of the oldest entry; None = all.
        key: name of an API key; None = all entries.
        person: only entries about this person; None = all entries.
        ids: with `person`, ids of the person's images (`PersonRecord.ids`), to find searches that showed the person.
    """
    values: dict[str, Any] = {"after": 0, "since": since, "key": key, "person": person, "ids": list(ids)}
    while True:
        page = database.run(lambda connection: _entries(connection, values | {"limit": FETCHED}))
        yield from page
        if len(page) < FETCHED:
            return
        values["after"] = page[-1].number


def person_record(database: Database, person: str) -> PersonRecord:
    """Return what the database knows of a person at one point in time."""

    def read(connection: Connection) -> PersonRecord:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        values: dict[str, Any] = {"after": 0, "since": None, "key": None, "person": person, "ids": [], "limit": None}
        erasures = [entry for entry in _entries(connection, values) if entry.action == ERASED]
        erased = [id for entry in erasures for id in entry.ids]
        cursor = connection.cursor(row_factory=class_row(StoredImage))
        stored = cursor.execute(STORED, {"person": person, "erased": erased}).fetchall()
        (galleries,) = connection.execute("SELECT count(*) FROM gallery").fetchone() or (0,)
        return PersonRecord(stored=stored, erasures=erasures, galleries=galleries)

    return database.run(read)


def _entries(connection: Connection, values: Mapping[str, Any]) -> list[Entry]:
    return connection.cursor(row_factory=class_row(Entry)).execute(ENTRIES, values).fetchall()
