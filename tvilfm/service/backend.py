"""Who does the work behind the HTTP service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tvilfm.data.images import Pixels
from tvilfm.retrieval.query import Query, Question
from tvilfm.retrieval.search import Answer, Request
from tvilfm.service.messages import ModelFacts, Status


class Busy(Exception):
    """Too many requests wait already; worth another try later."""


class Unavailable(Exception):
    """A part of the service is being replaced, or a long change keeps it; worth another try soon."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A committed write: the version that holds it, and how many rows it touched."""

    version: int
    count: int


class Backend(Protocol):
    """Encodes, searches and writes. Each method may raise `Busy` and `Unavailable`, and ValueError for its input.

    A change is noted in the audit trail under `by`, the name of the API key (None = no keys are asked for), also when
    nobody waits for its end any more.
    """

    facts: ModelFacts

    async def encode(self, questions: Sequence[Question]) -> list[Query]:
        """The vectors of questions, as of `QueryEncoder.encode`."""

    async def encode_visible(self, pictures: Sequence[Pixels]) -> list[dict[str, npt.NDArray[np.float32]]]:
        """Of each (H, W, 3) uint8 picture of any size: column of `gallery.row_schema` -> (D,) unit vector."""

    async def search(
        self, queries: Sequence[Query], requests: Sequence[Request], *, min_version: int = 0
    ) -> list[Answer]:
        """One answer a query, as of `Searcher.search`, of that version or a later one if there is one."""

    async def upsert(self, rows: pa.Table, *, space_id: str, by: str | None) -> Change:
        """Write rows of `gallery.row_schema`; on disk when it returns."""

    async def delete(self, ids: Sequence[str], *, by: str | None) -> Change:
        """Remove those of the rows that are there."""

    async def delete_person(self, pid: int, *, by: str | None) -> Change:
        """Remove all rows of an identity; on disk they stay until `compact`."""

    async def compact(self, *, by: str | None) -> Change:
        """Remove from disk, and so from every version, what is deleted; count is how many rows are left.

        Raises:
            ValueError: as of `Gallery.compact`.
        """

    async def picture(self, id: str) -> bytes | None:
        """The thumbnail of a row, a JPEG; None if there is none."""

    async def ready(self) -> None:
        """Returns when every part answers."""

    async def status(self) -> Status:
        """What is served."""
