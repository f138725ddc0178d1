"""The gallery: people that visible cameras saw, as a Lance table that survives whatever is killed.

A gallery is a folder (or a prefix of an object store) that holds one table for every model whose vectors it has, named
by that model's space, and a small file `current` that names the one in use. Vectors of different models cannot be
compared, so a new model means a new table; it is filled beside the old one and `publish` switches over in one rename.

Every write is one Lance commit: a new version, seen whole or not at all. Lance leaves the disk to the kernel, so on a
local disk a write is flushed here, data before the commit that names it, and only then returns. A table has one
writer: on a disk a lock says so; on an object store nothing does, and a second one doubles no row.

A row has two vectors because the evaluation compares in two spaces: infrared alone through the base stage's head,
everything with a text through the current one. Raw features would take half the bytes, but Lance can index vectors
only as they are compared, and a reader would need the model's weights to make sense of them.

Shapes: N rows, D feature.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import IO

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from lance.dataset import MergeInsertBuilder
from lance.file import LanceFileSession
from lance.optimize import Compaction, CompactionOptions

from tvilfm.place import Place, lock, write_whole
from tvilfm.retrieval.rows import OPTIONAL, SPACE_KEY, TIME, Where, column_of, row_schema, table_schema, vectors_of
from tvilfm.terms import MAX_ID, is_id

POINTER = "current"
UNIT_TOLERANCE = 1e-3
ALL_INDICES = 1 << 20  # more than an index ever has parts
# A write a fragment: after so many, a look-up by id takes several times as long as in one piece.
SMALL_FRAGMENTS, SMALL_ROWS = 128, 1024
DATED_ROWS = 4096  # that are given a time in one write
METRIC = "cosine"  # of the index; the rows are unit, so it ranks as the similarity does


@dataclass(frozen=True, kw_only=True)
class GalleryVersion:
    """One write: its number, and when it was."""

    number: int
    time: datetime


class GalleryLocked(ValueError):
    """Somebody else writes to that table."""


class Gallery:
    """One table of a gallery, at one of its versions; see `open` and `prepare`."""

    def __init__(
        self, uri: str, dataset: lance.LanceDataset, *, writes: bool, follows: bool, pinned: bool = False
    ) -> None:
        self.uri, self.dataset = uri, dataset
        self._writes, self._follows, self._pinned = writes, follows, pinned
        if writes:
            self._lock = _lock(uri, self.space_id)
            self._disk = _Disk(self.table_uri)
            self.reload()  # another writer may have come between opening and locking

    @classmethod
    def open(cls, uri: str, *, write: bool = False, space_id: str | None = None) -> Gallery:
        """The table in use, or that of one model.

        Args:
            uri: folder or object store prefix; endpoint and credentials of a store come from the environment.
            write: be its one writer. A reader follows what is written by `refresh`.
            space_id: of the model whose table is wanted, in use or not; None = the table in use, and a reader follows
                to another one when that is put in use.

        Raises:
            ValueError: there is no gallery or no table of that space, or `write` and somebody else writes to it.
        """
        uri = _absolute(uri)
        current = _current(uri)
        if current is None:
            raise ValueError(f"gallery.uri: expected a gallery, got {uri}, which has none. Make it with tvilfm index.")
        try:
            dataset = lance.dataset(_table_uri(uri, space_id or current))
        except ValueError:
            raise ValueError(
                f"gallery.uri: expected vectors of {space_id} in {uri}, got those of {current}. "
                "Index the pictures again under this model with tvilfm index, or serve the run that it was made with."
            ) from None
        return cls(uri, dataset, writes=write, follows=not write, pinned=space_id is not None)

    @classmethod
    def prepare(cls, uri: str, *, space_id: str, dim: int) -> Gallery:
        """The table of one space for writing, made empty where it is not there yet; `publish` puts it in use.

        Args:
            uri: as of `open`.
            space_id: of the model whose vectors it will hold; see `retrieval.spaces`.
            dim: D.

        Raises:
            ValueError: somebody else writes to that table, or its vectors have another dimension.
        """
        uri = _absolute(uri)
        table = _table_uri(uri, space_id)
        try:
            dataset = lance.dataset(table)
        except ValueError:  # there is none
            schema = table_schema(dim, space_id)
            # Row ids that outlive updates and compaction tell a reader which rows are new to it.
            dataset = lance.write_dataset(schema.empty_table(), table, schema=schema, enable_stable_row_ids=True)
        gallery = cls(uri, dataset, writes=True, follows=False)
        if gallery.dim != dim:
            raise ValueError(f"gallery.uri: expected vectors of dimension {dim} in {table}, got {gallery.dim}.")
        return gallery

    @property
    def space_id(self) -> str:
        space: bytes = self.dataset.schema.metadata[SPACE_KEY]
        return space.decode()

    @property
    def dim(self) -> int:
        dim: int = self.dataset.schema.field("vector").type.list_size
        return dim

    @property
    def version(self) -> int:
        return self.dataset.version

    @property
    def table_uri(self) -> str:
        return _table_uri(self.uri, self.space_id)

    @property
    def in_use(self) -> bool:
        """Whether this is the table that `open` finds."""
        return _current(self.uri) == self.space_id

    def __len__(self) -> int:
        return int(self.dataset.count_rows())

    def check_space(self, space_id: str) -> None:
        """Refuse vectors of another model.

        Raises:
            ValueError: another space than this table's.
        """
        if space_id != self.space_id:
            raise ValueError(
                f"space_id: expected vectors of {self.space_id}, got {space_id}. "
                "Index the gallery again under the new model, or use the model that it was made with."
            )

    def upsert(self, rows: pa.Table, *, space_id: str) -> int:
        """Write rows, replacing those whose id is there; all or none of them.

        Args:
            rows: columns of `row_schema`, each id once.
            space_id: of the model that made the vectors.

        Returns:
            The version that holds them, on disk.

        Raises:
            ValueError: vectors of another space, a column that is missing or of another type, an id that is empty, too
                long or given twice, a vector that is not unit, or no right to write.
            OSError: on an object store, another writer committed the same row at that moment; nothing was written.
        """
        self._check_writer()
        self.check_space(space_id)
        rows = self._checked(rows)
        if rows.num_rows:
            position = self._next_position + np.arange(rows.num_rows)
            table = rows.append_column(self.dataset.schema.field("position"), pa.array(position))
            self._apply(lambda merge: merge.when_matched_update_all().when_not_matched_insert_all(), table)
            self._next_position += rows.num_rows
        return self.version

    def delete(self, ids: Sequence[str]) -> int:
        """Delete rows by id, all in one version; earlier versions keep them until `compact`.

        Returns:
            How many there were.
        """
        self._check_writer()
        keys = pa.table({"id": pa.array(list(dict.fromkeys(ids)), pa.string())})
        return self._apply(lambda merge: merge.when_matched_delete(), keys)["num_deleted_rows"]

    def delete_person(self, pid: int) -> int:
        """Delete every row of an identity; returns how many there were. Gone from disk after `compact`."""
        return self._delete_where(pc.field("pid") == pid)

    def delete_before(self, time: datetime) -> int:
        """Delete every row whose picture was taken before that (aware) time; rows without a time stay.

        See `date_undated`.
        """
        return self._delete_where(pc.field("time") < pa.scalar(time, TIME))

    def date_undated(self, time: datetime) -> int:
        """Give that (aware) time to every row that has none; returns how many there were."""
        self._check_writer()
        count = 0
        undated = self.dataset.scanner(columns=["id"], filter=pc.field("time").is_null()).to_table()
        for batch in undated.to_batches(max_chunksize=DATED_ROWS):
            times = pa.array([time] * batch.num_rows, TIME)
            dated = pa.table({"id": batch["id"], "time": times})
            count += self._apply(lambda merge: merge.when_matched_update_all(), dated)["num_updated_rows"]
        if count:
            self.update_index()  # a row that is written anew has left it
        return count

    def _delete_where(self, rows: pc.Expression) -> int:
        return self.delete(self.dataset.scanner(columns=["id"], filter=rows).to_table()["id"].to_pylist())

    def versions(self) -> list[GalleryVersion]:
        """Versions that can be gone back to, oldest first."""
        return [
            GalleryVersion(number=int(version["version"]), time=version["timestamp"].astimezone())  # type: ignore[union-attr]
            for version in self.dataset.versions()
        ]

    def at(self, version: int) -> Gallery:
        """The table as it was, for reading.

        Raises:
            ValueError: there is no such version (any more).
        """
        known = [one.number for one in self.versions()]
        if version not in known:
            raise ValueError(f"version: expected one of {known[0]} to {known[-1]} that was kept, got {version}.")
        return Gallery(self.uri, self.dataset.checkout_version(version), writes=False, follows=False)

    def restore(self, version: int) -> int:
        """Go back: a new version that equals an old one, whoever was deleted since then included."""
        self._check_writer()
        self.at(version).dataset.restore()  # type: ignore[no-untyped-call]
        self.reload()
        return self.version

    def refresh(self) -> bool:
        """Follow the writer; true if anything has changed."""
        assert self._follows, "a writer, or a fixed version, has nobody to follow"
        space_id = self.space_id if self._pinned else _current(self.uri)
        assert space_id is not None, "a gallery was deleted under its reader"
        before, version = self.space_id, self.version
        if space_id == before:
            self.dataset = _latest(self.dataset)
        else:
            self.dataset = lance.dataset(_table_uri(self.uri, space_id))
        return (space_id, self.version) != (before, version)

    def reload(self) -> None:
        """Take up, and flush to disk, what a job of this writer committed beside it."""
        self._check_writer()
        self.dataset = _latest(self.dataset)
        self._disk.flush()
        self._next_position = self._first_free_position()

    def publish(self) -> None:
        """Put this table in use: from one moment to the next, readers that refresh find it."""
        self._check_writer()
        _point(self.uri, self.space_id)

    @property
    def indexed(self) -> bool:
        """Whether a search of either space finds an index."""
        return not self.unindexed_columns()

    def unindexed_columns(self) -> list[str]:
        """Those columns of vectors that have no index."""
        indexed = {name for index in self.dataset.describe_indices() for name in index.field_names}
        return [name for name in map(column_of, (False, True)) if name not in indexed]

    def update_index(self) -> None:
        """Have the index, if there is one, take up new rows, searched one by one till then, and drop deleted ones."""
        self._check_writer()
        if self.dataset.describe_indices():
            self.dataset.optimize.optimize_indices(num_indices_to_merge=ALL_INDICES)
            self.reload()

    def close(self) -> None:
        """Write no more, and let another writer begin; a killed process has done so."""
        self._check_writer()
        self._lock.close()
        self._writes = False

    def compact(self) -> None:
        """`clean` this table and drop those of other models: a person who was deleted is on no disk of the gallery.

        A table of another model may be just being filled. On a local disk its writer's lock says so. An object store
        has no locks, so no table is dropped there: whoever knows that nobody fills it removes it.

        Raises:
            ValueError: this table is not in use, somebody writes to that of another model, or there is one on an object
                store; nothing was changed, but for tables of other models that nobody writes to.
        """
        self._check_writer()
        self._check_in_use()
        for space_id in sorted(self._spaces() - {self.space_id}):
            table = _table_uri(self.uri, space_id)
            if _is_remote(self.uri):
                raise ValueError(
                    f"gallery: expected no table of another model on an object store, got {table}. Remove it and all "
                    "below it when no tvilfm index fills it, and compact again."
                )
            with closing(_lock(self.uri, space_id)):
                self._check_in_use()  # its writer may have put it in use before it let go of it
                lance.LanceDataset.drop(table)
        self.clean()

    def clean(self) -> None:
        """Merge what was written piece by piece, and remove everything that is deleted from every file of this table.

        No version before this one is left, nor, on a disk, what a killed write left behind: on an object store that may
        be the write of another process that is under way, and goes after seven days. Readers of older versions have to
        refresh.
        """
        self._check_writer()
        self._merge({"materialize_deletions_threshold": 0.0})
        self.update_index()
        self.dataset.cleanup_old_versions(retain_versions=1, delete_unverified=not _is_remote(self.uri))

    def picture(self, id: str) -> tuple[str | None, bytes | None] | None:
        """Where the picture of a row lies and its thumbnail, each if it has one; None if there is no such row.

        Always of the latest version: a picture that was deleted is not shown because a reader is behind.
        """
        table = _latest(self.dataset).scanner(columns=["image", "thumbnail"], filter=pc.field("id") == id).to_table()
        for row in table.to_pylist():
            return row["image"], row["thumbnail"]
        return None

    def snapshot(self) -> Gallery:
        """The table at this version, whatever `refresh` does later."""
        return Gallery(self.uri, self.dataset, writes=False, follows=False)

    def nearest(
        self, vector_D: npt.NDArray[np.float32], columns: Sequence[str], *, base: bool, k: int, where: Where, **how: int
    ) -> pa.Table:
        """About the k rows that are most similar, in no order, by the index where there is one.

        Args:
            vector_D: float32, not necessarily unit.
            columns: of the answer; the vectors come with them.
            base: which vectors are compared.
            k: rows wanted; fewer if fewer take part.
            where: which do.
            how: `minimum_nprobes`, partitions of the index that are read, more if too few of their rows take part;
                `refine_factor`, times as many candidates as k whose own vectors are compared.
        """
        column = column_of(base)
        nearest = {"column": column, "q": vector_D, "k": k, "metric": METRIC, **how}
        scanner = self.dataset.scanner(
            columns=[*columns, column, "_distance"], nearest=nearest, prefilter=True, filter=where.expression()
        )
        return scanner.to_table().drop_columns(["_distance"])

    def stamps(self) -> npt.NDArray[np.void]:
        """What tells rows apart, in table order: `row` is kept for life, `version` is that of its last write.

        A pair names one content for ever, so that a reader need only load pairs that are new to it. It costs a scan of
        two integers a row.
        """
        table = self.dataset.scanner(columns=["_rowid", "_row_last_updated_at_version"]).to_table()
        stamps = np.empty(table.num_rows, dtype=[("row", np.uint64), ("version", np.uint64)])
        stamps["row"], stamps["version"] = (column.to_numpy() for column in table.columns)
        return stamps

    def load(self, offsets: npt.NDArray[np.int64] | None, columns: Sequence[str]) -> pa.Table:
        """Columns of all rows, or of those at some places of `stamps`, in that order."""
        if offsets is None:
            return self.dataset.scanner(columns=list(columns)).to_table()
        return self.dataset.take(offsets.tolist(), columns=list(columns))

    def _first_free_position(self) -> int:
        last = pc.max(self.dataset.scanner(columns=["position"]).to_table()["position"]).as_py()
        return 0 if last is None else last + 1

    def _apply(self, told: Callable[[MergeInsertBuilder], MergeInsertBuilder], rows: pa.Table) -> dict[str, int]:
        """Join rows with the table by id, and commit; returns how many were inserted, updated and deleted."""
        if _is_remote(self.uri):
            # The table as it is now, and no second try: of two writers that touch a row at once, one is refused.
            dataset = lance.dataset(self.table_uri)
            counts: dict[str, int] = told(dataset.merge_insert("id")).conflict_retries(0).execute(rows)
            self.dataset = dataset
        else:
            transaction, counts = told(self.dataset.merge_insert("id")).execute_uncommitted(rows)
            if any(counts.values()):
                self._disk.flush()
                self.dataset = lance.LanceDataset.commit(self.dataset, transaction)
                self._disk.flush()
        if len(self.dataset.get_fragments()) % SMALL_FRAGMENTS == 0:
            self._merge({"target_rows_per_fragment": SMALL_ROWS, "materialize_deletions": False})
        return counts

    def _merge(self, options: CompactionOptions) -> None:
        """Write small fragments as one; the rows stay what they are."""
        plan = Compaction.plan(self.dataset, options)
        results = [task.execute(self.dataset) for task in plan.tasks]
        if results:
            self._disk.flush()
            Compaction.commit(self.dataset, results)
            self._disk.flush()

    def _spaces(self) -> set[str]:
        """Those that the gallery has a table of."""
        folders = [Path(prefix).name for prefix in LanceFileSession(self.uri).list_with_delimiter().common_prefixes]
        return {name.removesuffix(".lance") for name in folders if name.endswith(".lance")}

    def _check_in_use(self) -> None:
        if not self.in_use:
            raise ValueError(
                f"gallery: expected the table in use to compact, got that of {self.space_id} while "
                f"{_current(self.uri)} is in use. Serve the run that the gallery was indexed under last, and compact "
                "there."
            )

    def _check_writer(self) -> None:
        if not self._writes:
            raise ValueError("gallery: expected one opened for writing, got a reader. Open it with write=True.")

    def _checked(self, rows: pa.Table) -> pa.Table:
        schema = row_schema(self.dim)
        for field in schema:
            if field.name not in rows.column_names:
                if field.name not in OPTIONAL:
                    raise ValueError(f"rows: expected a column {field.name}, got {rows.column_names}.")
                rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
        try:
            rows = rows.select(schema.names).cast(schema)
        except (pa.ArrowException, ValueError) as error:
            raise ValueError(f"rows: expected the columns of row_schema({self.dim}), got an error: {error}.") from None
        ids = rows["id"].to_pylist()
        for id in ids:
            if not is_id(id):
                raise ValueError(f"rows.id: expected 1 to {MAX_ID} printable characters, got {id[:MAX_ID]!r}.")
        if len(set(ids)) < len(ids):
            twice = next(id for id in ids if ids.count(id) > 1)
            raise ValueError(f"rows.id: expected each id once, got {twice!r} twice. Send the last one alone.")
        for name in ("vector", "vector_base"):
            length_N = np.linalg.norm(vectors_of(rows[name]), axis=1)
            wrong = np.flatnonzero(~(np.abs(length_N - 1) <= UNIT_TOLERANCE))  # NaN is wrong too
            if len(wrong):
                raise ValueError(
                    f"rows.{name}: expected unit vectors, got one of length {length_N[wrong[0]]:g} for "
                    f"{ids[wrong[0]]!r}. Divide it by its length."
                )
        return rows


class _Disk:
    """Flushes the files that a local table gained; an object store is durable when it has answered."""

    FOLDERS = ("data", "_deletions", "_indices", "_transactions", "_versions")

    def __init__(self, table_uri: str) -> None:
        self._flushed: dict[Path, set[str]] = {}
        if not _is_remote(table_uri):
            self._flushed = {Path(table_uri) / name: set() for name in self.FOLDERS}

    def flush(self) -> None:
        for folder, flushed in self._flushed.items():
            new = set(os.listdir(folder)) - flushed if folder.is_dir() else ()
            for name in new:
                path = folder / name
                if path.is_dir():  # an index
                    for part in path.iterdir():
                        _fsync(part)
                _fsync(path)
            if new:
                _fsync(folder)
            flushed.update(new)


def _fsync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _latest(dataset: lance.LanceDataset) -> lance.LanceDataset:
    return dataset.checkout_version(dataset.latest_version)


def _is_remote(uri: str) -> bool:
    return Place(uri).is_uri


def _absolute(uri: str) -> str:
    return Place(uri).absolute


def _table_uri(uri: str, space_id: str) -> str:
    return f"{uri}/{space_id}.lance"


def _lock(uri: str, space_id: str) -> IO[bytes]:
    """Be the writer of a table until the lock is closed; a killed writer's lock is free."""
    if _is_remote(uri):
        return BytesIO()  # commits are conditional there: of two writers one is refused
    try:
        return lock(Path(uri) / f".{space_id}.writer", wait=False)
    except BlockingIOError:
        raise GalleryLocked(f"gallery.uri: expected one writer of {uri}, got a second one. Stop the first.") from None


def _current(uri: str) -> str | None:
    """The space whose table is in use."""
    if not _is_remote(uri):
        path = Path(uri) / POINTER
        return path.read_text().strip() if path.is_file() else None
    session = LanceFileSession(uri)
    if not session.contains(POINTER):
        return None
    with tempfile.TemporaryDirectory() as folder:
        session.download_file(POINTER, f"{folder}/{POINTER}")
        return (Path(folder) / POINTER).read_text().strip()


def _point(uri: str, space_id: str) -> None:
    if not _is_remote(uri):
        write_whole(Path(uri) / POINTER, space_id, durable=True)
        _fsync(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / POINTER
        path.write_text(space_id)
        LanceFileSession(uri).upload_file(str(path), POINTER)
