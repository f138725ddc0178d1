"""Changes of a gallery, one at a time, each noted down where it is made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pyarrow as pa

from tvilfm.retrieval.gallery import Gallery
from tvilfm.service.audit import Audit
from tvilfm.service.backend import Change, Unavailable


class GalleryWriter:
    """Carries changes out; a client that is gone before the end of one finds it in the audit trail all the same.

    A change waits for the one before it till `until` (of `time.monotonic`; None = for ever): made later, when its
    client has been told that it was not, it could bring back somebody who was erased meanwhile.

    Args:
        gallery: open for writing.
        audit: where changes are noted down.
    """

    def __init__(self, gallery: Gallery, audit: Audit) -> None:
        self.gallery, self._audit = gallery, audit
        self._lock = threading.Lock()

    def upsert(self, rows: pa.Table, *, space_id: str, by: str | None, until: float | None = None) -> Change:
        """Write rows of `gallery.row_schema`."""
        ids = rows["id"].to_pylist()
        return self.change(
            "upsert",
            lambda: self.gallery.upsert(rows, space_id=space_id) and rows.num_rows,
            by=by,
            ids=ids,
            until=until,
        )

    def delete(self, ids: Sequence[str], *, by: str | None, until: float | None = None) -> Change:
        """Remove rows."""
        return self.change("delete", lambda: self.gallery.delete(ids), by=by, ids=ids, until=until)

    def delete_person(self, pid: int, *, by: str | None, until: float | None = None) -> Change:
        """Remove the rows of a person."""
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
        """Do something to the gallery.

        Args:
            action: its name in the audit trail.
            work: does it, and returns the number of rows.
            by: name of the API key; None = no keys are asked for, or the service itself.
            ids: of the rows, as far as they are known.
            until: when it is given up, if it has not begun.
            facts: further numbers for the audit trail.

        Raises:
            Unavailable: another change was under way till then; nothing is changed.
        """
        if not self._lock.acquire(timeout=-1 if until is None else max(0.0, until - time.monotonic())):
            raise Unavailable("gallery: expected the end of a change that is under way, got none in time")
        try:
            count = work()
            change = Change(version=self.gallery.version, count=count)
        finally:
            self._lock.release()
        self._audit.note(action, key=by, version=change.version, ids=ids, **facts)
        return change
