"""The writer replica: there is only one, and it makes every change of the gallery."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from cluster.serve.replicas import TURN_S, keep_going
from cluster.tables.indexing import build_index
from tvilfm.config import Config
from tvilfm.retrieval.gallery import Gallery, GalleryLocked
from tvilfm.service.audit import Audit
from tvilfm.service.backend import Change, Unavailable
from tvilfm.service.writer import GalleryWriter

LOCK_S = 0.2  # interval of checks whether the previous writer has ended
RETENTION_S = 3600.0  # interval of the deletion of expired rows


class Writer:
    """The only replica that changes the gallery.

    When a service is replaced, the previous writer ends only after this one is ready. So this replica is ready
    immediately, and opens the gallery once the previous writer has ended. Changes wait until then, as they wait for
    each other.
    """

    def __init__(self, config: Config, space: str) -> None:
        self._config, self._space = config, space
        self._days = config.serve.retention_days
        self._on_disk = True  # whether deleted rows may still be in files: a previous writer may have been killed
        self._begun = threading.Event()
        try:
            self._begin()
        except GalleryLocked:
            threading.Thread(target=self._begin_later, daemon=True).start()

    def _begin(self) -> None:
        audit = Audit(self._config.audit_path, days=self._config.serve.audit_days)
        self._gallery = Gallery.open(self._config.gallery_uri, write=True, space_id=self._space)
        self._writer = GalleryWriter(self._gallery, audit)
        self._begun.set()
        if self._days is not None:
            threading.Thread(target=self._retain, args=(self._days,), daemon=True).start()

    def _begin_later(self) -> None:
        while not self._begun.is_set():
            time.sleep(LOCK_S)
            with keep_going("the gallery could not be opened"), suppress(GalleryLocked):
                self._begin()

    def _at_work(self, until: float) -> GalleryWriter:
        if not self._begun.wait(max(0.0, until - time.monotonic())):
            raise Unavailable("gallery: expected the previous writer to end, got a timeout. Retry.")
        return self._writer

    async def upsert(self, rows: pa.Table, space: str, by: str | None) -> Change:
        """Insert or replace rows."""
        if self._days is not None:  # rows without a timestamp would never expire; see also `_forget_before`
            now = pa.scalar(datetime.now(UTC), rows["time"].type)
            rows = rows.set_column(rows.column_names.index("time"), "time", pc.fill_null(rows["time"], now))
        end = turn_end()
        return await asyncio.to_thread(lambda: self._at_work(end).upsert(rows, space_id=space, by=by, until=end))

    async def delete(self, ids: Sequence[str], by: str | None) -> Change:
        """Delete rows."""
        end = turn_end()
        return await asyncio.to_thread(lambda: self._at_work(end).delete(ids, by=by, until=end))

    async def delete_person(self, pid: int, by: str | None) -> Change:
        """Delete the rows of a person."""
        end = turn_end()
        return await asyncio.to_thread(lambda: self._at_work(end).delete_person(pid, by=by, until=end))

    async def compact(self, by: str | None) -> Change:
        """Remove deleted rows from disk, and build the index of a large gallery."""
        end = turn_end()
        return await asyncio.to_thread(lambda: self._at_work(end).change("compact", self._compact, by=by))

    async def ready(self) -> None:
        """Return once the replica is ready, even if it has not opened the gallery yet."""

    def _compact(self) -> int:
        self._gallery.compact()
        if len(self._gallery) > self._config.gallery.exact_limit:
            with keep_going("the gallery could not be indexed"):  # the gallery is compact anyway
                build_index(self._gallery, self._config, workers=False)
        return len(self._gallery)

    def _forget_before(self, time: datetime) -> int:
        """Delete rows older than `time`, also from files. Rows without a timestamp get the current time."""
        self._gallery.date_undated(datetime.now(UTC))
        count = self._gallery.delete_before(time)
        self._on_disk |= count > 0
        if self._on_disk:
            try:
                self._compact()
            except ValueError:
                self._gallery.clean()  # tables of other models may still contain the rows; this one does not
                raise
            self._on_disk = False
        return count

    def _retain(self, days: int) -> None:
        while True:
            oldest = datetime.now(UTC) - timedelta(days=days)
            with keep_going("expired rows could not be removed from every file"):
                self._writer.change("retention", partial(self._forget_before, oldest), by=None)
            time.sleep(RETENTION_S)


def turn_end() -> float:
    """Return the deadline of a write that arrives now, including its wait for a thread."""
    return time.monotonic() + TURN_S
