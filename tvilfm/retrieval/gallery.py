"""The gallery: images of people from visible cameras, stored in a crash-safe Lance table.

A gallery is a folder or an object store prefix. It holds one table per model, named after the model's space, and a
small file `current` that names the table in use. Vectors of different models cannot be compared, so a new model needs
a new table. The new table is filled beside the old one, and `publish` switches to it with one rename.

Every write is one Lance commit: it creates a new version, which readers see completely or not at all. Lance does not
flush files to disk. So on a local disk this module flushes the data, then commits, then flushes the commit, and only
then returns. A table has one writer. On a local disk a lock enforces this. On an object store nothing enforces it, but
two writers cannot create duplicate rows.

A row has two vectors because the evaluation compares in two spaces: infrared alone through the base stage's head, and
queries with text through the current head. Raw features would take half the space, but Lance can only index vectors as
they are compared, and a reader would need the model's weights to use raw features.

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
ALL_INDICES = 1 << 20  # more parts than an index ever has, so that all are merged
# Each write adds a fragment. With this many fragments, a lookup by id takes several times as long as with one.
SMALL_FRAGMENTS, SMALL_ROWS = 128, 1024
DATED_ROWS = 4096  # rows per write in `date_undated`
METRIC = "cosine"  # of the index; the vectors are unit, so cosine ranks like the similarity


@dataclass(frozen=True, kw_only=True)
class GalleryVersion:
    """Number and time of one write."""

    number: int
    time: datetime


class GalleryLocked(ValueError):
    """Another writer holds the lock of the table."""


class Gallery:
    """One version of one table of a gallery. Create it with `open` or `prepare`."""

    def __init__(
        self, uri: str, dataset: lance.LanceDataset, *, writes: bool, follows: bool, pinned: bool = False
    ) -> None:
        self.uri, self.dataset = uri, dataset
        self._writes, self._follows, self._pinned = writes, follows, pinned
        if writes:
            self._lock = _lock(uri, self.space_id)
            self._disk = _Disk(self.table_uri)
            self.reload()  # another writer may have committed between opening and locking

    @classmethod
    def open(cls, uri: str, *, write: bool = False, space_id: str | None = None) -> Gallery:
        """Open the table in use or the table of one model.

        Args:
            uri: folder or object store prefix. The environment provides the endpoint and credentials of a store.
            write: open as the table's only writer. A reader picks up new versions with `refresh`.
            space_id: space of the table to open, in use or not. None = the table in use; a reader then switches to
                another table when that is published.

        Raises:
            ValueError: the gallery or its table of that space does not exist, or `write` is set and the table has
                another writer.
        """
        uri = Place(uri).absolute
        current = _current(uri)
        if current is None:
            raise ValueError(
                f"gallery.uri: expected a gallery, got {uri}, which has none. Create one with tvilfm index."
            )
        try:
            dataset = lance.dataset(_table_uri(uri, space_id or current))
        except ValueError:
            raise ValueError(
                f"gallery.uri: expected vectors of {space_id} in {uri}, got those of {current}. "
                "Index the images again under this model with tvilfm index, or serve the run that created the gallery."
            ) from None
        return cls(uri, dataset, writes=write, follows=not write, pinned=space_id is not None)

    @classmethod
    def prepare(cls, uri: str, *, space_id: str, dim: int) -> Gallery:
        """Open the table of one space for writing; create an empty one if it is missing. `publish` puts it in use.

        Args:
            uri: as in `open`.
            space_id: space of the vectors that the table will hold; see `retrieval.spaces`.
            dim: D.

        Raises:
            ValueError: the table has another writer, or its vectors have another dimension.
        """
        uri = Place(uri).absolute
        table = _table_uri(uri, space_id)
        try:
            dataset = lance.dataset(table)
        except ValueError:  # the table does not exist
            schema = table_schema(dim, space_id)
            # Stable row ids survive updates and compaction, so a reader can tell which rows it has not loaded yet.
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
        """Whether this is the gallery's table in use."""
        return _current(self.uri) == self.space_id

    def __len__(self) -> int:
        return int(self.dataset.count_rows())

    def check_space(self, space_id: str) -> None:
        """Check that vectors are from this table's space.

        Raises:
            ValueError: `space_id` is not this table's space.
        """
        if space_id != self.space_id:
            raise ValueError(
                f"space_id: expected vectors of {self.space_id}, got {space_id}. "
                "Index the gallery again under the new model, or use the model that created the gallery."
            )

    def upsert(self, rows: pa.Table, *, space_id: str) -> int:
        """Write all rows or none of them; a row with an existing id replaces the old row.

        Args:
            rows: columns of `row_schema`, each id once.
            space_id: space of the vectors.

        Returns:
            The version that holds the rows. It is on disk when this returns.

        Raises:
            ValueError: the vectors are from another space, a column is missing or has another type, an id is empty, too
                long or given twice, a vector is not a unit vector, or the gallery is not open for writing.
            OSError: another writer of an object store committed the same row at the same time; nothing was written.
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
            The number of deleted rows.
        """
        self._check_writer()
        keys = pa.table({"id": pa.array(list(dict.fromkeys(ids)), pa.string())})
        return self._apply(lambda merge: merge.when_matched_delete(), keys)["num_deleted_rows"]

    def delete_person(self, pid: int) -> int:
        """Delete every row of an identity and return their number. `compact` removes them from disk."""
        return self._delete_where(pc.field("pid") == pid)

    def delete_before(self, time: datetime) -> int:
        """Delete every row whose image was taken before an aware time; rows without a time stay (see `date_undated`).

        Returns:
            The number of deleted rows.
        """
        return self._delete_where(pc.field("time") < pa.scalar(time, TIME))

    def date_undated(self, time: datetime) -> int:
        """Set an aware time for every row that has none, and return the number of these rows."""
        self._check_writer()
        count = 0
        undated = self.dataset.scanner(columns=["id"], filter=pc.field("time").is_null()).to_table()
        for batch in undated.to_batches(max_chunksize=DATED_ROWS):
            times = pa.array([time] * batch.num_rows, TIME)
            dated = pa.table({"id": batch["id"], "time": times})
            count += self._apply(lambda merge: merge.when_matched_update_all(), dated)["num_updated_rows"]
        if count:
            self.update_index()  # rewritten rows are no longer in the index
        return count

    def _delete_where(self, rows: pc.Expression) -> int:
        return self.delete(self.dataset.scanner(columns=["id"], filter=rows).to_table()["id"].to_pylist())

    def versions(self) -> list[GalleryVersion]:
        """Return the versions that can be restored, oldest first."""
        return [
            GalleryVersion(number=int(version["version"]), time=version["timestamp"].astimezone())  # type: ignore[union-attr]
            for version in self.dataset.versions()
        ]

    def at(self, version: int) -> Gallery:
        """Return an earlier version of the table, for reading.

        Raises:
            ValueError: the version does not exist or was removed.
        """
        known = [one.number for one in self.versions()]
        if version not in known:
            raise ValueError(f"version: expected one of the kept versions {known[0]} to {known[-1]}, got {version}.")
        return Gallery(self.uri, self.dataset.checkout_version(version), writes=False, follows=False)

    def restore(self, version: int) -> int:
        """Create a new version that equals an old one. This also brings back rows that were deleted since then."""
        self._check_writer()
        self.at(version).dataset.restore()  # type: ignore[no-untyped-call]
        self.reload()
        return self.version

    def refresh(self) -> bool:
        """Switch to the latest version, and return whether anything has changed."""
        assert self._follows, "only a reader of the latest version can refresh"
        space_id = self.space_id if self._pinned else _current(self.uri)
        assert space_id is not None, "the gallery was deleted while it was open"
        before, version = self.space_id, self.version
        if space_id == before:
            self.dataset = _latest(self.dataset)
        else:
            self.dataset = lance.dataset(_table_uri(self.uri, space_id))
        return (space_id, self.version) != (before, version)

    def reload(self) -> None:
        """Load and flush to disk what other jobs of this writer have committed."""
        self._check_writer()
        self.dataset = _latest(self.dataset)
        self._disk.flush()
        self._next_position = self._first_free_position()

    def publish(self) -> None:
        """Put this table in use. The switch is atomic; readers get the table at their next refresh."""
        self._check_writer()
        _point(self.uri, self.space_id)

    @property
    def indexed(self) -> bool:
        """Whether the vectors of both spaces have an index."""
        return not self.unindexed_columns()

    def unindexed_columns(self) -> list[str]:
        """Return the vector columns that have no index."""
        indexed = {name for index in self.dataset.describe_indices() for name in index.field_names}
        return [name for name in map(column_of, (False, True)) if name not in indexed]

    def update_index(self) -> None:
        """Add new rows to the index, if there is one, and drop deleted rows. Until then, new rows are scanned."""
        self._check_writer()
        if self.dataset.describe_indices():
            self.dataset.optimize.optimize_indices(num_indices_to_merge=ALL_INDICES)
            self.reload()

    def close(self) -> None:
        """Stop writing and release the writer lock. The lock of a killed process is released automatically."""
        self._check_writer()
        self._lock.close()
        self._writes = False

    def compact(self) -> None:
        """Run `clean` on this table and drop the tables of other models, so that no file keeps a deleted row.

        A table of another model may have an active writer. On a local disk, the writer's lock shows this. An object
        store has no locks, so no table is dropped there: an operator has to remove it once nobody writes to it.

        Raises:
            ValueError: this table is not in use, a table of another model has a writer, or an object store has a table
                of another model. Nothing was changed, except that unused tables of other models may be gone.
        """
        self._check_writer()
        self._check_in_use()
        for space_id in sorted(self._spaces() - {self.space_id}):
            table = _table_uri(self.uri, space_id)
            if Place(self.uri).is_uri:
                raise ValueError(
                    f"gallery: expected no table of another model on an object store, got {table}. Remove it with all "
                    "its files once no tvilfm index writes to it, then compact again."
                )
            with closing(_lock(self.uri, space_id)):
                self._check_in_use()  # its writer may have published it before releasing the lock
                lance.LanceDataset.drop(table)
        self.clean()

    def clean(self) -> None:
        """Merge small fragments and remove deleted rows from every file of this table.

        This removes all earlier versions; readers of these have to refresh. On a local disk it also removes what killed
        writes left behind. On an object store such files may belong to a running write of another process, so they are
        only removed after seven days.
        """
        self._check_writer()
        self._merge({"materialize_deletions_threshold": 0.0})
        self.update_index()
        self.dataset.cleanup_old_versions(retain_versions=1, delete_unverified=not Place(self.uri).is_uri)

    def picture(self, id: str) -> tuple[str | None, bytes | None] | None:
        """Return a row's image reference and thumbnail (each None if missing), or None if the row does not exist.

        This reads the latest version, so that an outdated reader does not show a deleted image.
        """
        table = _latest(self.dataset).scanner(columns=["image", "thumbnail"], filter=pc.field("id") == id).to_table()
        for row in table.to_pylist():
            return row["image"], row["thumbnail"]
        return None

    def snapshot(self) -> Gallery:
        """Return a reader of this version that later calls of `refresh` do not change."""
        return Gallery(self.uri, self.dataset, writes=False, follows=False)

    def nearest(
        self, vector_D: npt.NDArray[np.float32], columns: Sequence[str], *, base: bool, k: int, where: Where, **how: int
    ) -> pa.Table:
        """Return approximately the k most similar rows, unordered; uses the index if there is one.

        Args:
            vector_D: float32, not necessarily unit.
            columns: columns to return; the vector column is added.
            base: whether the base stage's vectors are compared.
            k: number of rows; fewer are returned if fewer match the filter.
            where: filter on the rows.
            how: `minimum_nprobes`: partitions of the index to read, more if too few of their rows match the filter.
                `refine_factor`: k times this many candidates are re-scored with their full vectors.
        """
        column = column_of(base)
        nearest = {"column": column, "q": vector_D, "k": k, "metric": METRIC, **how}
        scanner = self.dataset.scanner(
            columns=[*columns, column, "_distance"], nearest=nearest, prefilter=True, filter=where.expression()
        )
        return scanner.to_table().drop_columns(["_distance"])

    def stamps(self) -> npt.NDArray[np.void]:
        """Return each row's stamp in table order: `row` is its stable id, `version` the version of its last write.

        The content of a stamp never changes, so a reader only has to load rows with new stamps. The call scans two
        integers per row.
        """
        table = self.dataset.scanner(columns=["_rowid", "_row_last_updated_at_version"]).to_table()
        stamps = np.empty(table.num_rows, dtype=[("row", np.uint64), ("version", np.uint64)])
        stamps["row"], stamps["version"] = (column.to_numpy() for column in table.columns)
        return stamps

    def load(self, offsets: npt.NDArray[np.int64] | None, columns: Sequence[str]) -> pa.Table:
        """Return columns of all rows, or of the rows at `offsets` (indices into `stamps`), in that order."""
        if offsets is None:
            return self.dataset.scanner(columns=list(columns)).to_table()
        return self.dataset.take(offsets.tolist(), columns=list(columns))

    def _first_free_position(self) -> int:
        last = pc.max(self.dataset.scanner(columns=["position"]).to_table()["position"]).as_py()
        return 0 if last is None else last + 1

    def _apply(self, actions: Callable[[MergeInsertBuilder], MergeInsertBuilder], rows: pa.Table) -> dict[str, int]:
        """Join rows with the table by id and commit. Return the numbers of inserted, updated and deleted rows."""
        if Place(self.uri).is_uri:
            # Use the latest version and do not retry: of two writers that change a row at once, one must fail.
            dataset = lance.dataset(self.table_uri)
            counts: dict[str, int] = actions(dataset.merge_insert("id")).conflict_retries(0).execute(rows)
            self.dataset = dataset
        else:
            transaction, counts = actions(self.dataset.merge_insert("id")).execute_uncommitted(rows)
            if any(counts.values()):
                self._disk.flush()
                self.dataset = lance.LanceDataset.commit(self.dataset, transaction)
                self._disk.flush()
        if len(self.dataset.get_fragments()) % SMALL_FRAGMENTS == 0:
            self._merge({"target_rows_per_fragment": SMALL_ROWS, "materialize_deletions": False})
        return counts

    def _merge(self, options: CompactionOptions) -> None:
        """Merge small fragments; the rows do not change."""
        plan = Compaction.plan(self.dataset, options)
        results = [task.execute(self.dataset) for task in plan.tasks]
        if results:
            self._disk.flush()
            Compaction.commit(self.dataset, results)
            self._disk.flush()

    def _spaces(self) -> set[str]:
        """Return the spaces that the gallery has a table of."""
        folders = [Path(prefix).name for prefix in LanceFileSession(self.uri).list_with_delimiter().common_prefixes]
        return {name.removesuffix(".lance") for name in folders if name.endswith(".lance")}

    def _check_in_use(self) -> None:
        if not self.in_use:
            raise ValueError(
                f"gallery: expected the table in use to compact, got that of {self.space_id} while "
                f"{_current(self.uri)} is in use. Serve the run that the gallery was last indexed with, and compact it "
                "there."
            )

    def _check_writer(self) -> None:
        if not self._writes:
            raise ValueError("gallery: expected one opened for writing, got a reader. Pass write=True to Gallery.open.")

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
            raise ValueError(f"rows.id: expected each id once, got {twice!r} twice. Send only the last one.")
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
    """Flush the new files of a local table. An object store needs no flush: its writes are durable on return."""

    FOLDERS = ("data", "_deletions", "_indices", "_transactions", "_versions")

    def __init__(self, table_uri: str) -> None:
        self._flushed: dict[Path, set[str]] = {}
        if not Place(table_uri).is_uri:
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


def _table_uri(uri: str, space_id: str) -> str:
    return f"{uri}/{space_id}.lance"


def _lock(uri: str, space_id: str) -> IO[bytes]:
    """Take the writer lock of a table until it is closed; the lock of a killed writer is free."""
    if Place(uri).is_uri:
        return BytesIO()  # no lock: commits are conditional, so one of two conflicting writers fails
    try:
        return lock(Path(uri) / f".{space_id}.writer", wait=False)
    except BlockingIOError:
        raise GalleryLocked(f"gallery.uri: expected one writer of {uri}, got a second one. Stop the first.") from None


def _current(uri: str) -> str | None:
    """Return the space whose table is in use, or None if there is no gallery."""
    if not Place(uri).is_uri:
        path = Path(uri) / POINTER
        return path.read_text().strip() if path.is_file() else None
    session = LanceFileSession(uri)
    if not session.contains(POINTER):
        return None
    with tempfile.TemporaryDirectory() as folder:
        session.download_file(POINTER, f"{folder}/{POINTER}")
        return (Path(folder) / POINTER).read_text().strip()


def _point(uri: str, space_id: str) -> None:
    if not Place(uri).is_uri:
        write_whole(Path(uri) / POINTER, space_id, durable=True)
        _fsync(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / POINTER
        path.write_text(space_id)
        LanceFileSession(uri).upload_file(str(path), POINTER)
