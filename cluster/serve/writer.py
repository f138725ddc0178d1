"""The writer replica: the only one of its kind; every change of the gallery goes through it."""

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

LOCK_S = 0.2  # between two looks whether the writer before has ended
RETENTION_S = 3600.0  # between two looks for people who have to leave the gallery


class Writer:
    """Replica, the only one of its kind: every change of the gallery goes through it.

    Where a service is replaced, the writer before ends only once this one is ready. So it is ready at once, and begins
    when that has ended; changes wait for it as they do for each other.
    """

    def __init__(self, config: Config, space: str) -> None:
        self._config, self._space = config, space
        self._days = config.serve.retention_days
        self._on_disk = True  # whether people who left may still be in files: a writer before may have been killed
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
            raise Unavailable("gallery: expected the end of the writer before, got none in time")
        return self._writer

    async def upsert(self, rows: pa.Table, space: str, by: str | None) -> Change:
        """Write rows."""
        if self._days is not None:  # who has no time could never leave; see also `_forget_before`
            now = pa.scalar(datetime.now(UTC), rows["time"].type)
            rows = rows.set_column(rows.column_names.index("time"), "time", pc.fill_null(rows["time"], now))
        end = turn_end()
        return await asyncio.to_thread(lambda: self._at_work(end).upsert(rows, space_id=space, by=by, until=end))

    async def delete(self, ids: Sequence[str], by: str | None) -> Change:
        """Remove rows."""
        end = turn_end()
        return await asyncio.to_thread(lambda: self._at_work(end).delete(ids, by=by, until=end))

    async def delete_person(self, pid: int, by: str | None) -> Change:
        """Remove the rows of a person."""
        end = turn_end()
        return await asyncio.to_thread(lambda: self._at_work(end).delete_person(pid, by=by, until=end))

    async def compact(self, by: str | None) -> Change:
        """Remove from disk what was removed, and have a large gallery indexed."""
        end = turn_end()
        return await asyncio.to_thread(lambda: self._at_work(end).change("compact", self._compact, by=by))

    async def ready(self) -> None:
        """Answers when there is a writer, begun or not."""

    def _compact(self) -> int:
        self._gallery.compact()
        if len(self._gallery) > self._config.gallery.exact_limit:
            with keep_going("the gallery could not be indexed"):  # compact it is
                build_index(self._gallery, self._config, workers=False)
        return len(self._gallery)

    def _forget_before(self, time: datetime) -> int:
        """Delete who came before, and then from files too; who has no time came now at the latest."""
        self._gallery.date_undated(datetime.now(UTC))
        count = self._gallery.delete_before(time)
        self._on_disk |= count > 0
        if self._on_disk:
            try:
                self._compact()
            except ValueError:
                self._gallery.clean()  # tables of other models may show them; this one does not
                raise
            self._on_disk = False
        return count

    def _retain(self, days: int) -> None:
        while True:
            oldest = datetime.now(UTC) - timedelta(days=days)
            with keep_going("people who have to leave could not be removed from every file"):
                self._writer.change("retention", partial(self._forget_before, oldest), by=None)
            time.sleep(RETENTION_S)


def turn_end() -> float:
    """Till when a write that comes now waits; its wait for a thread is counted in."""
    return time.monotonic() + TURN_S
