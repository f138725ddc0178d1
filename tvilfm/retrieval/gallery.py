"""The gallery: images of people from visible cameras, stored in PostgreSQL with pgvector.

A database holds one gallery per model, because vectors of different models cannot be compared; one of them is in use.
A row has the raw feature of its image in float32, from which both vectors follow, and both vectors in half precision
for the index. A row that a client wrote as vectors has these in float32 instead.

Readers keep a copy in memory and follow the database. Each row notes the transaction that wrote it, and triggers note
which rows were replaced or deleted. `changes` compares these transactions with the reader's last snapshot, so a
transaction that commits late is not missed.

The class is long because all its methods are transactions on the same partition; conversions of rows are in `records`,
the index in `hnsw`, and copies in `transfer`.

Shapes: N rows, D feature.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import pyarrow as pa
from pgvector import HalfVector
from psycopg import sql
from psycopg.rows import dict_row

from tvilfm.config import GallerySection
from tvilfm.data.people import natural
from tvilfm.retrieval.audit import NewEntry, write_entries
from tvilfm.retrieval.database import Connection, Database
from tvilfm.retrieval.hnsw import build_indexes, unindexed
from tvilfm.retrieval.records import INCOMING, INCOMING_TYPES, READ, condition_of, records_of, table_of
from tvilfm.retrieval.rows import Where, checked, row_schema, vectors_of
from tvilfm.retrieval.spaces import Heads
from tvilfm.retrieval.store import Change, Changes, Snapshot, Unavailable
from tvilfm.terms import SearchKind

FETCHED, LOOKED_UP = 2_000, 10_000  # rows and ids per round trip
KEPT_REMOVED = timedelta(days=1)  # how long stamps of removed rows are kept; a reader that was away longer starts over
MAX_EF = 1000  # of pgvector
FEW_ROWS = 10_000  # so many rows that match a filter are compared without the index
MERGE = """
    INSERT INTO image (gallery, id, position, pid, camid, time, image, thumbnail, raw, given, current, base)
    SELECT %(gallery)s, id, coalesce(position, %(first)s + number), pid, camid, time, image, thumbnail, raw, given,
        current, base
    FROM incoming ORDER BY id -- all writes lock rows in this order, so none waits for another in a circle
    ON CONFLICT (gallery, id) DO UPDATE SET
        position = excluded.position, pid = excluded.pid, camid = excluded.camid, time = excluded.time,
        image = excluded.image, thumbnail = excluded.thumbnail, raw = excluded.raw, given = excluded.given,
        current = excluded.current, base = excluded.base, added = now()
"""
CHANGED = """
    written >= %(low)s::text::xid8
    AND NOT pg_visible_in_snapshot(written, %(seen)s::pg_snapshot)
"""


@dataclass(frozen=True, kw_only=True)
class Description:
    """Facts about a gallery.

    Attributes:
        rows: number of rows.
        cameras: camera -> number of rows.
        months: month (YYYY-MM) in which the images were taken -> number of rows; None = unknown.
        oldest: time of the oldest image.
        bytes: size on disk, indexes included.
        indexed: whether both vectors have an index.
        in_use: whether this is the database's gallery in use.
    """

    rows: int
    cameras: dict[str, int]
    months: dict[str | None, int]
    oldest: datetime | None
    bytes: int
    indexed: bool
    in_use: bool


class Gallery:
    """The gallery of one model in a PostgreSQL database. Create it with `open` or `prepare`.

    It implements `store.GalleryStore`.

    Args:
        database: the database.
        section: settings of the index.
        facts: row of the table `gallery`.
        share: (i, n) = searchers see the i-th of n shares of the rows; None = all rows.
        is_replica: whether the database is a read replica, which may be behind.
    """

    def __init__(
        self,
        database: Database,
        section: GallerySection,
        facts: _Row,
        share: tuple[int, int] | None = None,
        *,
        is_replica: bool = False,
    ) -> None:
        self.database, self._section, self._share = database, section, share
        self._facts, self._is_replica = facts, is_replica
        self.number, self.space_id, self.dim = facts.number, facts.space, facts.dim
        self.encoder, self.heads = facts.encoder, facts.heads
        self._schema = row_schema(self.dim, facts.width)

    @classmethod
    def open(
        cls,
        url: str,
        *,
        section: GallerySection | None = None,
        space_id: str | None = None,
        share: tuple[int, int] | None = None,
    ) -> Gallery:
        """Open the gallery in use or the gallery of one model.

        Args:
            url: `postgresql://...`, or a folder with an embedded server.
            section: settings of the index.
            space_id: space of the gallery to open, in use or not; None = the gallery in use.
            share: share of the rows that `changes`, `nearest` and `count` see; see `Gallery`.

        Raises:
            ValueError: the database or its gallery of that space does not exist.
        """
        database = Database.open(url)
        rows = database.run(_galleries)
        match = [row for row in rows if (row.in_use if space_id is None else row.space == space_id)]
        if not match:
            spaces = ", ".join(row.space for row in rows)
            if spaces and space_id:
                raise ValueError(
                    f"gallery.url: expected vectors of {space_id} in {url}, got those of {spaces}. Index the images "
                    "again under this model with tvilfm index, or serve the run that created the gallery."
                )
            raise _no_gallery(url)
        return cls(database, section or GallerySection(), match[0], share)

    @classmethod
    def of_all_models(cls, url: str, *, section: GallerySection | None = None) -> list[Gallery]:
        """Open the galleries of all models in a database, oldest first; `url` and `section` as in `open`.

        Raises:
            ValueError: the database does not exist or has no gallery.
        """
        database = Database.open(url)
        galleries = [cls(database, section or GallerySection(), row) for row in database.run(_galleries)]
        if not galleries:
            raise _no_gallery(url)
        return galleries

    @classmethod
    def prepare(
        cls, url: str, *, space_id: str, heads: Heads, encoder: str, section: GallerySection | None = None
    ) -> Gallery:
        """Open the gallery of one model; create an empty one if it is missing. `publish` puts it in use.

        Args:
            url: as in `open`.
            space_id: space of the vectors; see `spaces.space_id`.
            heads: the model's heads.
            encoder: hash of the weights that compute raw features.
            section: settings of the index.
        """
        database = Database.open(url)
        row = database.run(lambda connection: _create(connection, space_id, heads, encoder))
        return cls(database, section or GallerySection(), row)

    @property
    def url(self) -> str:
        return self.database.url

    def __len__(self) -> int:
        return self.count()

    def replica(self, url: str) -> Gallery:
        """Return the same gallery as a read replica has it.

        Args:
            url: of the replica. It may be behind or away: `changes` then raises `Unavailable`.
        """
        return Gallery(Database(url, url, patient=False), self._section, self._facts, self._share, is_replica=True)

    def check_space(self, space_id: str) -> None:
        """Check that vectors are from this gallery's space.

        Raises:
            ValueError: `space_id` is not this gallery's space.
        """
        if space_id != self.space_id:
            raise ValueError(
                f"space_id: expected vectors of {self.space_id}, got {space_id}. "
                "Index the gallery again under the new model, or use the model that created the gallery."
            )

    # Writes

    def upsert(
        self, rows: pa.Table, *, space_id: str, by: str | None = None, position: npt.NDArray[np.int64] | None = None
    ) -> Change:
        """Write all rows of `rows.row_schema` or none; a row with an existing id replaces the old row.

        Args:
            rows: the rows.
            space_id: space of the vectors, or of the model whose raw features these are.
            by: name of the API key for the audit trail.
            position: order of equal scores; None = the order of writing.

        Raises:
            ValueError: a row is not as `rows.checked` expects it, or the vectors are from another space.
        """
        self.check_space(space_id)
        rows = checked(rows, self._schema)
        records, ids = records_of(rows, self.heads, position), rows["id"].to_pylist()

        def write(connection: Connection) -> tuple[int, Sequence[str]]:
            connection.execute(INCOMING)
            with connection.cursor() as cursor, cursor.copy("COPY incoming FROM STDIN (FORMAT BINARY)") as copy:
                copy.set_types(INCOMING_TYPES)
                for record in records:
                    copy.write_row(record)
            first = _reserve(connection, rows.num_rows) if position is None else 0
            return connection.execute(MERGE, {"gallery": self.number, "first": first}).rowcount, ids

        return self._change("upsert", write, by=by)

    def delete(self, ids: Sequence[str], *, by: str | None = None) -> Change:
        """Delete rows by id; missing ids are ignored."""
        return self._delete("delete", "id = ANY(%(ids)s)", {"ids": list(ids)}, by=by, ids=ids)

    def delete_person(self, pid: str, *, by: str | None = None) -> Change:
        """Delete every row of an identity. The audit trail keeps their ids, so that the erasure can be proven."""
        return self._delete("delete person", "pid = %(pid)s", {"pid": pid}, by=by, ids=None, pid=pid)

    def delete_camera(self, camid: str, *, by: str | None = None) -> Change:
        """Delete every row of a camera."""
        return self._delete("delete camera", "camid = %(camid)s", {"camid": camid}, by=by, camid=camid)

    def delete_before(self, time: datetime, *, by: str | None = None) -> Change:
        """Delete every row whose image was taken, or if that is unknown was added, before an aware time."""
        return self._delete("retention", "coalesce(time, added) < %(before)s", {"before": time}, by=by)

    def expire(self, *, rows_days: int | None, audit_days: int | None) -> None:
        """Delete rows and audit entries that are older than allowed (None = no limit), and stamps of removed rows."""
        now = datetime.now(UTC)
        if rows_days is not None:
            self.delete_before(now - timedelta(days=rows_days))

        def forget(connection: Connection) -> None:
            connection.execute("DELETE FROM removed WHERE time < %s", (now - KEPT_REMOVED,))
            connection.execute("DELETE FROM key_use WHERE minute < %s", (now - KEPT_REMOVED,))
            if audit_days is not None:
                connection.execute("DELETE FROM audit WHERE time < %s", (now - timedelta(days=audit_days),))

        self.database.run(forget)

    def note(self, entries: Sequence[NewEntry]) -> None:
        """Add entries to the audit trail."""

        def write(connection: Connection) -> None:
            with connection.pipeline():
                # A crash of the server may lose the last second.
                connection.execute("SET LOCAL synchronous_commit = off")
                write_entries(connection, *entries)

        self.database.run(write)

    def publish(self) -> None:
        """Put this gallery in use."""

        def switch(connection: Connection) -> None:
            connection.execute("UPDATE gallery SET in_use = false WHERE in_use AND number <> %s", (self.number,))
            connection.execute("UPDATE gallery SET in_use = true WHERE number = %s", (self.number,))

        self.database.run(switch)

    def drop(self) -> None:
        """Remove this gallery with all its rows.

        Raises:
            ValueError: it is in use.
        """

        def remove(connection: Connection) -> None:
            query = "DELETE FROM gallery WHERE number = %s AND NOT in_use"
            if not connection.execute(query, (self.number,)).rowcount:
                raise ValueError(
                    f"gallery: expected one that is not in use, got {self.space_id}. Publish another first."
                )
            connection.execute(sql.SQL("DROP TABLE {}").format(sql.Identifier(self._table)))
            connection.execute("DELETE FROM removed WHERE gallery = %s", (self.number,))

        self.database.run(remove)

    def reserve(self, count: int) -> int:
        """Return the first of `count` positions that later rows come after."""
        return self.database.run(lambda connection: _reserve(connection, count))

    # Reads

    @property
    def _rows(self) -> sql.Composed:
        """The rows that searchers see, as SQL with the value `gallery`."""
        rows = sql.SQL("gallery = %(gallery)s")
        if self._share is None:
            return sql.Composed([rows])
        part, parts = map(sql.Literal, self._share)
        return sql.SQL("{} AND stamp %% {} = {}").format(rows, parts, part)

    def picture(self, id: str) -> tuple[str | None, bytes | None] | None:
        """Return a row's image reference and thumbnail (each None if missing), or None if the row does not exist."""
        query = "SELECT image, thumbnail FROM image WHERE gallery = %s AND id = %s"
        return self.database.run(lambda connection: connection.execute(query, (self.number, id)).fetchone())

    def vector(self, id: str) -> npt.NDArray[np.float32] | None:
        """Return a row's (D,) unit vector from the current head, or None if the row does not exist."""
        where = sql.SQL("gallery = %(gallery)s AND id = %(id)s")
        values = {"gallery": self.number, "id": id}
        rows = self.database.run(lambda connection: self._fetch(connection, where, values, pages=False))
        return vectors_of(rows["vector"])[0] if rows.num_rows else None

    def contains(self, ids: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return for each id whether a row has it."""
        query = "SELECT id FROM image WHERE gallery = %s AND id = ANY(%s)"

        def read(connection: Connection) -> npt.NDArray[np.bool_]:
            existing: set[str] = set()
            for start in range(0, len(ids), LOOKED_UP):
                some = list(ids[start : start + LOOKED_UP])
                existing |= {id for (id,) in connection.execute(query, (self.number, some))}
            return np.array([id in existing for id in ids], dtype=bool)

        return self.database.run(read)

    def snapshot(self) -> Snapshot:
        """Return what is committed now."""
        return self.database.run(_snapshot)

    def changes(self, since: Snapshot | None) -> Changes:
        """Return what was committed since a snapshot; None = all rows."""

        def read(connection: Connection) -> Changes:
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            snapshot, where = _snapshot(connection), self._rows
            values: dict[str, Any] = {"gallery": self.number}
            removed: list[tuple[int]] = []
            is_behind = since is not None and snapshot.version < since.version
            if is_behind and self._is_replica:
                raise Unavailable("gallery.read_url: expected what was read before, got an older state. Retry.")
            is_complete = since is None or is_behind  # the database was restored from a backup
            if since is not None and not is_complete:
                values |= {"low": str(since.oldest_running), "seen": since.text}
                where = sql.SQL("{} AND {}").format(where, sql.SQL(CHANGED))
                removed = connection.execute(
                    sql.SQL("SELECT stamp FROM removed WHERE {}").format(where), values
                ).fetchall()
            return Changes(
                snapshot=snapshot,
                rows=self._fetch(connection, where, values, pages=True),
                removed=np.array([stamp for (stamp,) in removed], dtype=np.int64),
                complete=is_complete,
            )

        return self.database.run(read)

    def nearest(
        self, vector_D: npt.NDArray[np.float32], *, base: bool, count: int, where: Where, by_scan: bool = False
    ) -> pa.Table:
        """Return about the `count` rows most similar to a vector, unordered; see `store.GalleryStore.nearest`."""
        column = sql.Identifier("base" if base else "current")
        wanted = count * self._section.refine
        condition, values = condition_of(where)
        values |= {"gallery": self.number, "vector": HalfVector(vector_D / np.linalg.norm(vector_D)), "count": wanted}
        condition = sql.SQL("{} AND {}").format(self._rows, condition)

        def read(connection: Connection) -> pa.Table:
            # The index reads only so many rows that do not match, so it is no help with a filter that few rows match.
            few = by_scan or (where != Where() and self._count(connection, condition, values, FEW_ROWS + 1) <= FEW_ROWS)
            rows = None if few else self._by_index(connection, column, condition, values, wanted)
            if rows is None or rows.num_rows < count:
                rows = self._by_scan(connection, column, condition, values)
            return rows

        return self.database.run(read)

    def tables(self) -> Iterator[pa.Table]:
        """Yield the columns `rows.STORED` of all rows, in their order, `FETCHED` rows at a time."""
        for rows in self._pages(READ):
            yield table_of(rows, self.heads)

    @property
    def exported(self) -> pa.Schema:
        """Columns of `batches`: those of `rows.row_schema`, and `position`."""
        return self._schema.append(pa.field("position", pa.int64(), nullable=False))

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield all rows as they were written, in their order, `FETCHED` rows at a time."""
        names = ("id", "raw", "given", "pid", "camid", "time", "image", "thumbnail", "position")
        for rows in self._pages(names):
            columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
            given = [None if one is None else one.to_numpy() for one in columns.pop("given")]
            columns["raw"] = [None if one is None else one.to_numpy() for one in columns["raw"]]
            columns["vector"] = [None if one is None else one[: self.dim] for one in given]
            columns["vector_base"] = [None if one is None else one[self.dim :] for one in given]
            arrays = [pa.array(columns[field.name], field.type) for field in self.exported]
            yield pa.RecordBatch.from_arrays(arrays, schema=self.exported)

    def facts(self) -> pa.Table:
        """Return all rows without vectors and thumbnails, in their order."""
        names = ("id", "pid", "camid", "time", "image", "position")
        rows = [row for page in self._pages(names) for row in page]
        types = [self.exported.field(name).type for name in names]
        return pa.table({name: pa.array([row[n] for row in rows], types[n]) for n, name in enumerate(names)})

    def _pages(self, names: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        """Yield columns of all rows, page by page, so that a lost connection costs one page."""
        query = sql.SQL(
            "SELECT {} FROM image WHERE gallery = %s AND (position, id) > (%s, %s) ORDER BY position, id LIMIT %s"
        ).format(sql.SQL(", ").join(map(sql.Identifier, (*names, "position", "id"))))
        after: tuple[int, str] = (-1, "")
        while True:
            values = (self.number, *after, FETCHED)

            def read(connection: Connection, values: Any = values) -> list[tuple[Any, ...]]:
                with connection.cursor(binary=True) as cursor:
                    return cursor.execute(query, values).fetchall()

            rows = self.database.run(read)
            if not rows:
                return
            after = rows[-1][-2:]
            yield [row[:-2] for row in rows]

    def wait(self, seconds: float) -> Iterator[None]:
        """Yield after each change, and at the latest after the given time."""
        while True:
            with suppress(psycopg.OperationalError), self.database.session() as connection:
                connection.execute("LISTEN gallery")
                yield  # what came before
                while True:
                    list(connection.notifies(timeout=seconds, stop_after=1))
                    yield
            time.sleep(min(seconds, 1.0))

    def count(self, limit: int | None = None) -> int:
        """Return the number of rows, or `limit` if there are more."""
        values = {"gallery": self.number}
        return self.database.run(lambda connection: self._count(connection, self._rows, values, limit))

    @property
    def in_use(self) -> bool:
        """Whether this is the database's gallery in use."""
        return any(row.in_use and row.number == self.number for row in self.database.run(_galleries))

    @property
    def kind(self) -> SearchKind:
        """How rows are searched in the database: with an index, or by reading every row."""
        return "index" if not self.unindexed() else "scan"

    def cameras(self) -> list[str]:
        """Return the cameras that have rows, in natural order (`2` before `10`)."""
        # One step of the index per camera, instead of one per row.
        query = """
            WITH RECURSIVE known AS (
                (SELECT camid FROM image WHERE gallery = %(gallery)s ORDER BY camid LIMIT 1)
                UNION ALL
                SELECT (SELECT camid FROM image WHERE gallery = %(gallery)s AND camid > known.camid
                    ORDER BY camid LIMIT 1) FROM known WHERE known.camid IS NOT NULL
            ) SELECT camid FROM known WHERE camid IS NOT NULL
        """
        values = {"gallery": self.number}
        found = self.database.run(lambda connection: connection.execute(query, values).fetchall())
        return sorted((camid for (camid,) in found), key=natural)

    def describe(self) -> Description:
        """Return facts about the rows; this reads an entry per row."""

        def read(connection: Connection) -> Description:
            def rows(query: str) -> list[tuple[Any, ...]]:
                return connection.execute(query.encode(), {"gallery": self.number}).fetchall()

            cameras = dict(rows("SELECT camid, count(*) FROM image WHERE gallery = %(gallery)s GROUP BY 1"))
            months = rows(
                "SELECT to_char(time AT TIME ZONE 'UTC', 'YYYY-MM') AS month, count(*) FROM image "
                "WHERE gallery = %(gallery)s GROUP BY 1 ORDER BY 1"
            )
            ((oldest,),) = rows("SELECT min(time) FROM image WHERE gallery = %(gallery)s")
            ((size,),) = rows(f"SELECT pg_total_relation_size('{self._table}')")
            return Description(
                rows=sum(cameras.values()),
                cameras={camera: cameras[camera] for camera in sorted(cameras, key=natural)},
                months=dict(months),
                oldest=oldest,
                bytes=size,
                indexed=not self.unindexed(),
                in_use=self.in_use,
            )

        return self.database.run(read)

    # The index

    def unindexed(self) -> list[str]:
        """Return the vector columns that have no index."""
        return unindexed(self.database, self._table)

    def build_index(
        self, *, workers: int, again: bool = False, on_progress: Callable[[float], None] | None = None
    ) -> None:
        """Build the HNSW indexes that are missing. Rows that are written later are indexed at once.

        Args:
            workers: parallel workers of the server.
            again: build existing indexes again, with the current settings.
            on_progress: called with the share of rows that are done.

        Raises:
            ValueError: the vectors are too long for an index.
        """
        build_indexes(
            self.database,
            self._table,
            self.dim,
            self._section,
            workers=workers,
            again=again,
            on_progress=on_progress,
        )

    def close(self) -> None:
        """Close the connections."""
        self.database.close()

    # Parts of the above

    @property
    def _table(self) -> str:
        return f"image_{self.number}"

    def _change(
        self, action: str, work: Callable[[Connection], tuple[int, Sequence[str]]], *, by: str | None, **facts: Any
    ) -> Change:
        """Make a change and its entry in the audit trail in one transaction.

        Args:
            action: name of the change in the entry.
            work: returns the number of affected rows, and the ids in the entry.
            by, facts: of the entry.
        """

        def write(connection: Connection) -> Change:
            count, ids = work(connection)
            (version,) = connection.execute("SELECT pg_current_xact_id()::text::bigint").fetchone() or (0,)
            write_entries(connection, NewEntry(action, facts | {"count": count}, by, version, ids))
            return Change(version=version, count=count)

        return self.database.run(write)

    def _delete(
        self,
        action: str,
        condition: str,
        values: dict[str, Any],
        *,
        by: str | None,
        ids: Sequence[str] | None = (),
        **facts: Any,
    ) -> Change:
        """Delete the rows of a condition. `ids` are those of the audit entry; None = those of the deleted rows."""
        returning = " RETURNING id" if ids is None else ""
        query = (
            "DELETE FROM image WHERE gallery = %(gallery)s AND id = ANY(ARRAY(SELECT id FROM image "
            f"WHERE gallery = %(gallery)s AND {condition} ORDER BY id FOR UPDATE)){returning}"
        ).encode()
        values = values | {"gallery": self.number}

        def work(connection: Connection) -> tuple[int, Sequence[str]]:
            done = connection.execute(query, values)
            return done.rowcount, sorted(id for (id,) in done) if ids is None else ids

        return self._change(action, work, by=by, **facts)

    def _count(
        self, connection: Connection, condition: sql.Composable, values: dict[str, Any], limit: int | None
    ) -> int:
        query = sql.SQL("SELECT count(*) FROM (SELECT FROM image WHERE {} LIMIT {}) AS matching").format(
            condition, sql.Literal(limit)
        )
        (number,) = connection.execute(query, values).fetchone() or (0,)
        return int(number)

    def _by_index(
        self,
        connection: Connection,
        column: sql.Identifier,
        condition: sql.Composable,
        values: dict[str, Any],
        wanted: int,
    ) -> pa.Table:
        """Return about the nearest rows; fewer if the index reads many rows that do not match the condition."""
        connection.execute("SET LOCAL hnsw.iterative_scan = 'strict_order'")
        connection.execute(f"SET LOCAL hnsw.ef_search = {min(MAX_EF, max(wanted, self._section.ef_search))}".encode())
        order = sql.SQL("{condition} ORDER BY {column}::halfvec({dim}) <#> %(vector)s::halfvec({dim}) LIMIT %(count)s")
        return self._fetch(
            connection, order.format(condition=condition, column=column, dim=sql.Literal(self.dim)), values
        )

    def _by_scan(
        self, connection: Connection, column: sql.Identifier, condition: sql.Composable, values: dict[str, Any]
    ) -> pa.Table:
        """Return the nearest rows by comparing all that match the condition."""
        # Without a cast to a fixed dimension, the index does not apply.
        order = sql.SQL("{} ORDER BY {} <#> %(vector)s LIMIT %(count)s").format(condition, column)
        return self._fetch(connection, order, values)

    def _fetch(
        self, connection: Connection, where: sql.Composable, values: dict[str, Any], *, pages: bool = False
    ) -> pa.Table:
        """Return the columns `rows.STORED` of rows; `pages` limits the memory that many rows take at once."""
        query = sql.SQL("SELECT {} FROM image WHERE {}").format(sql.SQL(", ").join(map(sql.Identifier, READ)), where)
        if not pages:
            with connection.cursor(binary=True) as client:
                return table_of(client.execute(query, values).fetchall(), self.heads)
        tables = [table_of([], self.heads)]
        with connection.cursor(name="rows", binary=True) as server:
            server.execute(query, values)
            while rows := server.fetchmany(FETCHED):
                tables.append(table_of(rows, self.heads))
        return pa.concat_tables(tables).combine_chunks()


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row of the table `gallery`."""

    number: int
    space: str
    dim: int
    width: int
    encoder: str
    heads: Heads
    in_use: bool


def _no_gallery(url: str) -> ValueError:
    return ValueError(f"gallery.url: expected a gallery, got {url}, which has none. Create one with tvilfm index.")


def _galleries(connection: Connection) -> list[_Row]:
    query = "SELECT number, space, dim, width, encoder, heads, in_use FROM gallery ORDER BY number"
    rows = connection.cursor(row_factory=dict_row).execute(query).fetchall()
    return [_Row(**(row | {"heads": Heads.from_bytes(row["heads"])})) for row in rows]


def _create(connection: Connection, space_id: str, heads: Heads, encoder: str) -> _Row:
    query = (
        "INSERT INTO gallery (space, dim, width, encoder, heads) VALUES (%s, %s, %s, %s, %s) "
        "ON CONFLICT (space) DO NOTHING RETURNING number"
    )
    values = (space_id, heads.dim, heads.width, encoder, heads.to_bytes())
    if created := connection.execute(query, values).fetchone():
        name = sql.Identifier(f"image_{created[0]}")
        connection.execute(
            sql.SQL("CREATE TABLE {} PARTITION OF image FOR VALUES IN ({})").format(name, sql.Literal(created[0]))
        )
    return next(row for row in _galleries(connection) if row.space == space_id)


def _reserve(connection: Connection, count: int) -> int:
    query = "SELECT min(nextval('image_stamp')) FROM generate_series(1, %s)"
    (first,) = connection.execute(query, (count,)).fetchone() or (0,)
    return int(first or 0)


def _snapshot(connection: Connection) -> Snapshot:
    # A replica does not list running transactions, so all from the oldest one on count as not seen yet.
    (text,) = connection.execute(
        "SELECT CASE WHEN pg_is_in_recovery() THEN format('%1$s:%1$s:', pg_snapshot_xmin(now)) ELSE now::text END "
        "FROM pg_current_snapshot() AS now"
    ).fetchone() or ("",)
    return Snapshot(text)
