"""What search and the service need of the place that stores a gallery.

Shapes: N rows, D feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tvilfm.retrieval.rows import Where
from tvilfm.terms import SearchKind


class Unavailable(Exception):
    """The gallery or a replica cannot answer at the moment; the client should retry soon."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A committed write: the version that holds it and the number of affected rows."""

    version: int
    count: int


@dataclass(frozen=True)
class Snapshot:
    """The transactions that a reader sees.

    A version is the number of a write transaction. Transactions may commit in another order than they began, so a
    reader that sees version 7 may not see version 5 yet. A snapshot knows which ones it sees.

    Attributes:
        text: PostgreSQL's form, `xmin:xmax:running,running,...`. All transactions below xmin have ended, none from xmax
            on has begun.
    """

    text: str

    @cached_property
    def _parts(self) -> tuple[int, int, frozenset[int]]:
        low, high, running = self.text.split(":")
        return int(low), int(high), frozenset(map(int, running.split(","))) if running else frozenset()

    @property
    def version(self) -> int:
        """The latest version that may be visible."""
        return self._parts[1] - 1

    @property
    def oldest_running(self) -> int:
        return self._parts[0]

    def includes(self, version: int) -> bool:
        """Return whether the write of a version is visible."""
        _, high, running = self._parts
        return version < high and version not in running


@dataclass(frozen=True, kw_only=True)
class Changes:
    """The difference between two snapshots.

    Attributes:
        snapshot: the later one.
        rows: columns of `rows.STORED` of rows that were written since the earlier one.
        removed: stamps of rows that were replaced or deleted since then; some may have been written since then too.
        complete: whether `rows` are all rows of the gallery, and an earlier copy is to be dropped.
    """

    snapshot: Snapshot
    rows: pa.Table
    removed: npt.NDArray[np.int64]
    complete: bool


class GalleryStore(Protocol):
    """The images of one model's gallery.

    Each write is one transaction, together with its entry in the audit trail. When it returns, it survives the death of
    any process. `by` is the name of the API key for the audit trail; None = the service requires no keys.

    Each method may raise `Unavailable`.
    """

    space_id: str
    dim: int

    def check_space(self, space_id: str) -> None:
        """Check that vectors are from this gallery's space.

        Raises:
            ValueError: `space_id` is not this gallery's space.
        """

    def upsert(self, rows: pa.Table, *, space_id: str, by: str | None = None) -> Change:
        """Write all rows of `rows.row_schema` or none; a row with an existing id replaces the old row.

        Raises:
            ValueError: a row is not as `rows.checked` expects it, or the vectors are from another space.
        """

    def delete(self, ids: Sequence[str], *, by: str | None = None) -> Change:
        """Delete rows by id; missing ids are ignored."""

    def delete_person(self, pid: str, *, by: str | None = None) -> Change:
        """Delete every row of an identity."""

    def delete_camera(self, camid: str, *, by: str | None = None) -> Change:
        """Delete every row of a camera."""

    def delete_before(self, time: datetime, *, by: str | None = None) -> Change:
        """Delete every row whose image was taken, or if that is unknown was added, before an aware time."""

    def vector(self, id: str) -> npt.NDArray[np.float32] | None:
        """Return a row's (D,) unit vector from the current head, or None if the row does not exist."""

    def picture(self, id: str) -> tuple[str | None, bytes | None] | None:
        """Return a row's image reference and thumbnail (each None if missing), or None if the row does not exist."""

    def changes(self, since: Snapshot | None) -> Changes:
        """Return what was committed since a snapshot; None = all rows."""

    def snapshot(self) -> Snapshot:
        """Return what is committed now."""

    def nearest(
        self, vector_D: npt.NDArray[np.float32], *, base: bool, count: int, where: Where, by_scan: bool = False
    ) -> pa.Table:
        """Return about the `count` rows most similar to a vector, unordered, with the columns of `rows.STORED`.

        It returns fewer only if fewer rows match the filter.

        Args:
            vector_D: float32, not necessarily unit.
            base: whether the base stage's vectors are compared.
            count: number of rows.
            where: filter on the rows.
            by_scan: compare with every row, without an index.
        """

    def wait(self, seconds: float) -> Iterator[None]:
        """Yield after each change, and at the latest after the given time."""

    def count(self, limit: int | None = None) -> int:
        """Return the number of rows, or `limit` if there are more."""

    def cameras(self) -> list[str]:
        """Return the cameras that have rows, in natural order."""

    @property
    def in_use(self) -> bool:
        """Whether this is the database's gallery in use."""

    @property
    def kind(self) -> SearchKind:
        """How `nearest` searches: with an index, or by reading every row."""
