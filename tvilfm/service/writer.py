"""Write to a gallery, one change at a time, and record each change in the audit trail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pyarrow as pa

from tvilfm.retrieval.gallery import Gallery
from tvilfm.service.audit import Audit
from tvilfm.service.backend import Change, Unavailable


class GalleryWriter:
    """Apply changes to a gallery and record them in the audit trail, even if the client has disconnected.

    A change waits for the previous one until the deadline `until` (of `time.monotonic`; None = forever). It is never
    made later: the client was told that it failed, and it could bring back a person who was erased in the meantime.

    Args:
        gallery: open for writing.
        audit: the audit trail.
    """

    def __init__(self, gallery: Gallery, audit: Audit) -> None:
        self.gallery, self._audit = gallery, audit
        self._lock = threading.Lock()

    def upsert(self, rows: pa.Table, *, space_id: str, by: str | None, until: float | None = None) -> Change:
        """Write rows of `rows.row_schema`."""
        ids = rows["id"].to_pylist()
        return self.change(
            "upsert",
            lambda: self.gallery.upsert(rows, space_id=space_id) and rows.num_rows,
            by=by,
            ids=ids,
            until=until,
        )

    def delete(self, ids: Sequence[str], *, by: str | None, until: float | None = None) -> Change:
        """Remove rows by id."""
        return self.change("delete", lambda: self.gallery.delete(ids), by=by, ids=ids, until=until)

    def delete_person(self, pid: int, *, by: str | None, until: float | None = None) -> Change:
        """Remove all rows of a person."""
        return self.change("delete person", lambda: self.gallery.delete_person(pid), by=by, until=until, pid=pid)

    def change(
        self,
        action: str,
        work: Callable[[], int],
        *,
        by: str | None,
        ids: Sequence[str] = (),
        until: float | None = None,
        **facts: int,
    ) -> Change:
        """Apply one change to the gallery.

        Args:
            action: name of the change in the audit trail.
            work: function that makes the change and returns the number of affected rows.
            by: name of the API key; None = the service requires no keys, or makes the change itself.
            ids: ids of the affected rows, if known.
            until: deadline for the start of the change.
            facts: additional numbers for the audit trail.

        Raises:
            Unavailable: another change was running until the deadline; nothing was changed.
        """
        if not self._lock.acquire(timeout=-1 if until is None else max(0.0, until - time.monotonic())):
            raise Unavailable("gallery: expected the end of a change that is running, got a timeout. Retry.")
        try:
            count = work()
            change = Change(version=self.gallery.version, count=count)
        finally:
            self._lock.release()
        self._audit.note(action, key=by, version=change.version, ids=ids, **facts)
        return change
