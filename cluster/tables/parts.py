"""A table that grows part by part: an append-only folder of Parquet files, on a local disk or in an object store.

Every part is written atomically, under a name derived from its images, so repeated work skips or overwrites its own
part. A resumed job reads which images are finished. After a kill at any time, no row is lost and `read` returns every
image once.
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

from tvilfm.place import Place, lock, to_parquet

KEY = "image"
MERGED = "merged-"
PARTS_A_MERGE = 100
DELETERS = 16
READERS = 64  # parts that are read at once: an object store answers each of the three requests per part after 30 ms


class Parts:
    """The folder of the parts.

    Args:
        uri: see `Place`.
        folders: subfolders below the URI.
    """

    def __init__(self, uri: str, *folders: str) -> None:
        self.place = Place(uri)
        for folder in folders:
            self.place /= folder
        self.filesystem, self.path = self.place.filesystem, self.place.path

    def write(self, name: str, table: pa.Table) -> None:
        """Write a part atomically, replacing one of the same name.

        Args:
            name: name of the part without suffix; see `part_name`.
            table: rows of the part; the column `image` is their key.
        """
        (self.place / f"{name}.parquet").write(to_parquet(table))

    def has(self, name: str) -> bool:
        """Return whether a part of this name exists; a merged part no longer does."""
        return (self.place / f"{name}.parquet").is_file()

    def keys(self, column: str = KEY) -> pa.ChunkedArray:
        """Return a column of all parts. An image that was written twice occurs twice."""
        table = self._load([column])
        return table[column] if table.num_columns else pa.chunked_array([], type=pa.string())

    def done(self, column: str = KEY) -> set[str]:
        """Return the images that have been written."""
        return set(self.keys(column).to_pylist())

    def read(self) -> pa.Table:
        """Return all rows, each image once, sorted by name; without columns if there is no part yet."""
        table = self._load()
        return _once(table).sort_by(KEY) if table.num_columns else table

    def publish(self, target: Place, schema: pa.Schema) -> None:
        """Write all rows, each image once, to one Parquet file. Only the file and a few parts are held in memory.

        Args:
            target: the file.
            schema: schema of the parts, because there may be no part yet.
        """
        content = None
        while content is None:
            with suppress(FileNotFoundError):  # merged by another process since they were listed
                content = self._as_one_file(schema)
        target.write(content)

    def compact(self) -> None:
        """Merge up to 100 small parts into one: a million images leave 30,000 parts, which take minutes to open.

        A merged part is complete before the parts that it replaces are deleted. So a kill may leave duplicate rows,
        which `read` removes, but loses none.
        """
        small = [path for path in self._paths() if not path.rpartition("/")[2].startswith(MERGED)]
        for start in range(0, len(small), PARTS_A_MERGE):
            group = small[start : start + PARTS_A_MERGE]
            if len(group) == 1:
                continue
            try:
                table = self._scanner(group).to_table()
            except FileNotFoundError:  # another process is merging them
                return
            self.write(MERGED + part_name(group), _once(table))
            with ThreadPoolExecutor(DELETERS) as pool:
                list(pool.map(self._delete, group))

    def _as_one_file(self, schema: pa.Schema) -> pa.Buffer:
        sink, seen, paths = pa.BufferOutputStream(), set[str](), self._paths()
        with pq.ParquetWriter(sink, schema) as writer:
            for batch in self._scanner(paths).to_batches() if paths else ():  # in the order of the parts
                images = batch[KEY].to_pylist()
                fresh = [image not in seen for image in images]  # a part has no image twice
                writer.write_table(pa.Table.from_batches([batch]).filter(fresh))
                seen.update(images)
        return sink.getvalue()

    def _load(self, columns: Sequence[str] | None = None) -> pa.Table:
        while paths := self._paths():
            try:
                return self._scanner(paths, columns).to_table()
            except FileNotFoundError:  # merged by another process since they were listed
                continue
        return pa.table({})

    def _scanner(self, paths: Sequence[str], columns: Sequence[str] | None = None) -> ds.Scanner:
        """Return a scanner that reads many parts at once."""
        if not self.place.is_local:
            pa.set_io_thread_count(max(READERS, pa.io_thread_count()))
        return self._dataset(paths).scanner(columns=columns, fragment_readahead=READERS)

    def _paths(self) -> list[str]:
        infos = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.path for info in infos if info.path.endswith(".parquet"))

    def _dataset(self, paths: Sequence[str]) -> ds.Dataset:
        return ds.dataset(list(paths), format="parquet", filesystem=self.filesystem)

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(path)


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """Lock a local folder while the block runs, so that no other job fills it. The lock of a killed job is free.

    Object stores have no locks. Two jobs in the same folder do no harm there: parts are complete, an image that both
    wrote is read once, and only some work is done twice.

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
            f"{place}: expected a folder that no other job fills, got one that is in use. Wait until that job ends."
        ) from None
    with held:
        yield


def part_name(images: Iterable[str]) -> str:
    """Return the name of the part with these images. It depends only on the images and their order."""
    return hashlib.sha256("\0".join(images).encode()).hexdigest()[:24]


def _once(table: pa.Table) -> pa.Table:
    """Return the first row of every image."""
    rows = pa.table({KEY: table[KEY], "row": np.arange(table.num_rows)})
    first = rows.group_by(KEY).aggregate([("row", "min")])["row_min"]
    return table if len(first) == table.num_rows else table.take(first)
