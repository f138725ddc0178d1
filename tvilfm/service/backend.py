"""The interface between the HTTP service and the code that does its work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tvilfm.data.images import Pixels
from tvilfm.retrieval.audit import NewEntry
from tvilfm.retrieval.query import Query, Question
from tvilfm.retrieval.search import Answer, Request
from tvilfm.retrieval.store import Change
from tvilfm.service.messages import ModelFacts, Status


class Busy(Exception):
    """Too many requests are waiting; the client should retry later."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """One search of a client.

    Attributes:
        asked: what to search for, encoded or not.
        request: search options.
        min_version: search this version of the gallery or a later one, if it exists.
        min_score: hits with a lower score are left out; None = none are.
        min_score_unfiltered: the same if fusion subtracts no filter text.
        facts: how the client searched, for the audit trail.
        by: name of the client's API key; None = the service requires no keys.
    """

    asked: Question | Query
    request: Request
    min_version: int
    min_score: float | None = None
    min_score_unfiltered: float | None = None
    facts: Mapping[str, Any]
    by: str | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a search shows.

    Attributes:
        query: the encoded query.
        answer: hits with at least the minimum score.
        min_score: the minimum score; None = there is none.
        left_out: number of hits with a lower score.
    """

    query: Query
    answer: Answer
    min_score: float | None
    left_out: int

    @classmethod
    def of(cls, search: Search, query: Query, answer: Answer) -> Result:
        """Return the result of a search: its answer without hits below the minimum score."""
        min_score = search.min_score_unfiltered if query.filter_text is None else search.min_score
        hits = [hit for hit in answer.hits if min_score is None or hit.score >= min_score]
        left_out = len(answer.hits) - len(hits)
        return cls(query=query, answer=replace(answer, hits=hits), min_score=min_score, left_out=left_out)


def entries_of(searches: Sequence[Search], results: Sequence[Result]) -> list[NewEntry]:
    """Return the entries of a request's searches for the audit trail.

    A client gets no answer, so there are no entries, if a result is of a version before its `min_version`.
    """
    if any(result.answer.version < search.min_version for search, result in zip(searches, results, strict=True)):
        return []
    return [
        NewEntry(
            "search",
            {"modalities": list(result.query.parts), **search.facts},
            search.by,
            result.answer.version,
            [hit.id for hit in result.answer.hits],
        )
        for search, result in zip(searches, results, strict=True)
    ]


class Backend(Protocol):
    """Encode, search and write. Each method may raise `Busy` and `Unavailable`, and ValueError for invalid input.

    A change and its entry in the audit trail are one transaction. `by` is the name of the API key in that entry; None =
    the service requires no keys.
    """

    facts: ModelFacts

    async def encode_visible(self, pictures: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        """Encode (H, W, 3) uint8 images of any size, and return their raw features (N, `ModelFacts.width`)."""

    async def caption(self, picture: Pixels) -> str:
        """Return what an infrared image shows, without colors. Only if `ModelFacts.captioner`."""

    async def like(self, id: str) -> Query | None:
        """Return a query for images similar to a row of the gallery, or None if the row does not exist."""

    async def search(self, searches: Sequence[Search]) -> list[Result]:
        """Return one result per search, after they were added to the audit trail.

        They are not added if a result is of a version before `Search.min_version`.
        """

    async def upsert(self, rows: pa.Table, *, space_id: str, by: str | None) -> Change:
        """Write rows of `rows.row_schema`; they are on disk when this returns."""

    async def delete(self, ids: Sequence[str], *, by: str | None) -> Change:
        """Remove rows by id; ids of missing rows are ignored."""

    async def delete_person(self, pid: str, *, by: str | None) -> Change:
        """Remove all rows of an identity."""

    async def picture(self, id: str) -> bytes | None:
        """Return the thumbnail of a row as JPEG, or None if there is none."""

    async def ready(self) -> None:
        """Return once every replica answers."""

    async def status(self) -> Status:
        """Return the status of the service."""
