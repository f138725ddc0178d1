"""A table that grows part by part: an append-only folder of Parquet files, on this disk or in an object store.

Every part appears whole or not at all, under a name that follows from the images in it, so work that is done a second
time finds its part or writes it over itself. A resumed job reads which images are there; whatever was killed when, no
row is lost and `read` gives every image once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from tvilfm.place import Place, lock

KEY = "image"
MERGED = "merged-"
PARTS_A_MERGE = 100
DELETERS = 16


class Parts:
    """The folder.

    Args:
        uri: see `Place`.
        folders: further folders below it.
    """

    def __init__(self, uri: str, *folders: str) -> None:
        self.place = Place(uri) / "/".join(folders)
        self.filesystem, self.path = self.place.filesystem, self.place.path

    def write(self, name: str, table: pa.Table) -> None:
        """Write a part, whole or not at all; writing it again replaces it.

        Args:
            name: of the part, without suffix; see `part_name`.
            table: its rows; the column `image` names them.
        """
        (self.place / f"{name}.parquet").write(to_parquet(table))

    def has(self, name: str) -> bool:
        """Whether that part is there, under its own name (not merged)."""
        return (self.place / f"{name}.parquet").is_file()

    def keys(self, column: str = KEY) -> pa.ChunkedArray:
        """The column of every part, as it lies there: an image that was written twice comes twice."""
        table = self._load([column])
        return table[column] if table.num_columns else pa.chunked_array([], type=pa.string())

    def done(self, column: str = KEY) -> set[str]:
        """Images that are written."""
        return set(self.keys(column).to_pylist())

    def read(self) -> pa.Table:
        """Every row, each image once, in the order of their names; no column at all before the first part."""
        table = self._load()
        return _once(table).sort_by(KEY) if table.num_columns else table

    def publish(self, target: Place, schema: pa.Schema) -> None:
        """Write every row, each image once, as one Parquet file, holding no more than a part beside the file itself.

        Args:
            target: the file.
            schema: of the parts; there may be none yet.
        """
        content = None
        while content is None:
            with suppress(FileNotFoundError):  # merged by another process since they were listed
                content = self._as_one_file(schema)
        target.write(content)

    def compact(self) -> None:
        """Merge small parts, a hundred into one, as a million images leave 30,000 that take minutes to open.

        A merged part is complete before the parts it replaces go, so a kill leaves rows that lie there twice, never
        rows that are gone; `read` gives them once.
        """
        small = [path for path in self._paths() if not path.rpartition("/")[2].startswith(MERGED)]
        for start in range(0, len(small), PARTS_A_MERGE):
            group = small[start : start + PARTS_A_MERGE]
            if len(group) == 1:
                continue
            try:
                table = self._dataset(group).to_table()
            except FileNotFoundError:  # another process is merging them
                return
            self.write(MERGED + part_name(group), _once(table))
            with ThreadPoolExecutor(DELETERS) as pool:
                list(pool.map(self._delete, group))

    def _as_one_file(self, schema: pa.Schema) -> pa.Buffer:
        sink, seen = pa.BufferOutputStream(), set[str]()
        with pq.ParquetWriter(sink, schema) as writer:
            for path in self._paths():
                table = pq.read_table(path, filesystem=self.filesystem)
                images = table[KEY].to_pylist()
                writer.write_table(table.filter([image not in seen for image in images]))
                seen.update(images)
        return sink.getvalue()

    def _load(self, columns: Sequence[str] | None = None) -> pa.Table:
        while paths := self._paths():
            try:
                return self._dataset(paths).to_table(columns=columns)
            except FileNotFoundError:  # merged by another process since they were listed
                continue
        return pa.table({})

    def _paths(self) -> list[str]:
        found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.path for info in found if info.path.endswith(".parquet"))

    def _dataset(self, paths: Sequence[str]) -> ds.Dataset:
        return ds.dataset(list(paths), format="parquet", filesystem=self.filesystem)

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(path)


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """Be the only job that fills a folder while the block runs, on a local path; a killed job's lock is free.

    An object store knows no lock. There two jobs may run into each other without harm: parts are whole, an image that
    both wrote is read once, and only the work is done twice.

    Raises:
        ValueError: another job holds the folder.
    """
    place = Place(uri)
    if not place.is_local:
        yield
        return
    try:
        held = lock(Path(place.path) / ".lock", wait=False)
    except BlockingIOError:
        raise ValueError(
            f"{place}: expected a folder that no other job fills, got one that is in use. Wait for that job."
        ) from None
    with held:
        yield


def part_name(images: Iterable[str]) -> str:
    """The name of the part that holds these images: the same images in the same order, the same name."""
    return hashlib.sha256("\0".join(images).encode()).hexdigest()[:24]


def to_parquet(table: pa.Table) -> pa.Buffer:
    """The bytes of a Parquet file of that table."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue()


def _once(table: pa.Table) -> pa.Table:
    """The first row of every image."""
    rows = pa.table({KEY: table[KEY], "row": np.arange(table.num_rows)})
    first = rows.group_by(KEY).aggregate([("row", "min")])["row_min"]
    return table if len(first) == table.num_rows else table.take(first)
