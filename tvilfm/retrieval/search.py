"""Search a gallery once for all modalities of a query, with the ranking of the evaluation.

Small galleries are searched exactly, in memory. Large galleries are searched in the database, whose index reads part of
the rows; the best candidates are then scored with their full vectors.

Shapes: Q queries, K hits, M modalities, D feature.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from tvilfm.config import GallerySection
from tvilfm.models.ensemble import ensemble_query
from tvilfm.models.similarity import similarity
from tvilfm.retrieval.exact import ExactIndex, Ranked, best_first, tensor_of
from tvilfm.retrieval.query import Query
from tvilfm.retrieval.rows import FACTS, Where, column_of
from tvilfm.retrieval.store import GalleryStore, Snapshot, Unavailable
from tvilfm.terms import SearchKind

OLD_S = 12 * 3600.0  # a copy that was not updated for so long is loaded again; see `gallery.KEPT_REMOVED`
RECALLED = 10  # nearest rows of a sample of the recall
MORE = 4  # growth of the number of ranked rows when they contain too few identities


@dataclass(frozen=True, kw_only=True)
class Request:
    """Search options of a query.

    Attributes:
        weights: ensemble weight of each modality; ignored for a query with one modality.
        k: number of hits to return, at least 1.
        where: filter on the gallery rows.
        by_identity: return only the best row of each identity; a row without an identity counts as its own.
    """

    weights: Mapping[str, float]
    k: int = 20
    where: Where = field(default_factory=Where)
    by_identity: bool = False


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One ranked row of the gallery.

    Attributes:
        score: similarity; for an ensemble, the weighted sum of the similarities of its modalities.
        shares: modality -> its contribution to the score, weight included.
        position: order of equal scores.
    """

    id: str
    score: float
    shares: dict[str, float]
    pid: str | None
    camid: str
    time: datetime | None
    image: str | None
    position: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Hits, best first, ties in the order of writing. `version` is the gallery version that was searched."""

    hits: list[Hit]
    version: int


def merged(answers: Sequence[Answer], request: Request) -> Answer:
    """Return the answer of a gallery from the answers of its shares, all to the same request."""
    hits = sorted((hit for answer in answers for hit in answer.hits), key=lambda hit: (-hit.score, hit.position))
    if request.by_identity:
        first: dict[object, Hit] = {}
        for hit in hits:
            first.setdefault((hit.pid, hit.id if hit.pid is None else None), hit)
        hits = list(first.values())
    return Answer(hits=hits[: request.k], version=min(answer.version for answer in answers))


@dataclass(frozen=True, kw_only=True)
class _State:
    """What is searched: a snapshot of the gallery, and a copy of its rows if the gallery is small enough.

    `loaded_s` is the time (`time.monotonic`) of the snapshot, `store` where it was read.
    """

    snapshot: Snapshot
    exact: ExactIndex | None
    loaded_s: float
    store: GalleryStore


class Searcher:
    """Answer queries from one gallery.

    Args:
        gallery: the gallery to search; `refresh` takes in what was committed since the last call.
        section: largest size that is searched in memory.
        device: device of the first pass of an exact search; half precision on CUDA.
        replica: the same gallery on a read replica, from which rows are read unless it is away or behind what was read
            before; None = there is none.
    """

    def __init__(
        self,
        gallery: GalleryStore,
        section: GallerySection,
        *,
        device: str = "cpu",
        replica: GalleryStore | None = None,
    ) -> None:
        self.gallery, self._section, self._device = gallery, section, torch.device(device)
        self._replica = replica
        self._state = self._newest(None)
        self._sampled: tuple[Tensor, bool] | None = None  # query that the index answered, and whether it is base

    @property
    def snapshot(self) -> Snapshot:
        """What is searched at the moment. Above `gallery.exact_limit`, searches see all that is committed."""
        return self._state.snapshot

    @property
    def kind(self) -> SearchKind:
        """How queries are answered: in memory, with the database's index, or by reading every row if it has none."""
        return self.gallery.kind if self._state.exact is None else "exact"

    @property
    def age_s(self) -> float | None:
        """Longest time for which a committed change may be missing in the copy; None = there is no copy."""
        state = self._state
        return None if state.exact is None else time.monotonic() - state.loaded_s

    def sample_recall(self) -> float | None:
        """Return the share of the `RECALLED` nearest rows that the index found for the latest query.

        This compares the query with every row.

        Returns:
            None if the index answered no query since the last call.
        """
        sampled, self._sampled = self._sampled, None
        if sampled is None or self.kind != "index":
            return None
        vector_D, base = sampled
        found, true = (
            set(
                self._nearest(self.gallery, vector_D, Where(), RECALLED, base=base, by_scan=by_scan)
                .head(RECALLED)
                .facts["id"]
                .to_pylist()
            )
            for by_scan in (False, True)
        )
        return len(found & true) / len(true) if true else None

    def refresh(self, *, primary: bool = False) -> None:
        """Take in what was committed since the last call.

        A running search finishes on the rows that it started with.

        Args:
            primary: whether to read what the replica does not have yet.
        """
        self._state = self._load(self._state, self.gallery) if primary else self._newest(self._state)

    def search(self, queries: Sequence[Query], requests: Sequence[Request]) -> list[Answer]:
        """Answer queries together.

        Args:
            queries: queries in the gallery's space.
            requests: one per query.

        Returns:
            One answer per query, with k hits, or fewer if fewer rows match the filter.

        Raises:
            ValueError: a query is from another space, or no weight of its modalities is above 0.

        Source: METHOD 7, one search with the weighted sum; METHOD 8, ties. Differs: none known.
        """
        state = self._state
        for query in queries:
            self.gallery.check_space(query.space_id)
        weights = [_weights(query, request) for query, request in zip(queries, requests, strict=True)]
        vectors = [ensemble_query(query.parts, own) for query, own in zip(queries, weights, strict=True)]
        ranked: dict[int, Ranked] = {}
        for base in (False, True):
            rows = [row for row, query in enumerate(queries) if query.base == base]
            count = max((requests[row].k for row in rows), default=0)
            while rows:
                vectors_QD = torch.stack([vectors[row] for row in rows])
                wheres = [requests[row].where for row in rows]
                for row, best in zip(rows, self._rank(state, vectors_QD, wheres, count, base=base), strict=True):
                    exhausted = len(best.scores_K) < count
                    if requests[row].by_identity:
                        best = best.first_of_each_identity()
                    if exhausted or len(best.scores_K) >= requests[row].k:
                        ranked[row] = best.head(requests[row].k)
                rows = [row for row in rows if row not in ranked]
                count *= MORE
        return [
            Answer(hits=_hits(ranked[row], query, weights[row]), version=state.snapshot.version)
            for row, query in enumerate(queries)
        ]

    def _newest(self, before: _State | None) -> _State:
        """Return the current state of the replica, or of the gallery if there is no replica that can tell."""
        if self._replica is not None:
            with suppress(Unavailable):
                state = self._load(before, self._replica)
                if before is None or state.snapshot.version >= before.snapshot.version:
                    return state
        return self._load(before, self.gallery)

    def _load(self, before: _State | None, store: GalleryStore) -> _State:
        """Return the current state of a store, from that of before or from nothing."""
        limit, now_s = self._section.exact_limit, time.monotonic()
        if before is not None and (before.exact is None or now_s - before.loaded_s > OLD_S):
            before = None
        exact = None if before is None else before.exact
        if (store.count(limit + 1) if exact is None else len(exact)) > limit:
            return _State(snapshot=store.snapshot(), exact=None, loaded_s=now_s, store=store)
        changes = store.changes(None if before is None else before.snapshot)
        if exact is None or changes.complete or changes.rows.num_rows or changes.removed.size:
            half = self._device.type == "cuda"
            exact = ExactIndex.load(changes, device=self._device, half=half, before=exact)
        return _State(snapshot=changes.snapshot, exact=exact, loaded_s=now_s, store=store)

    def _candidates(self, store: GalleryStore, vector_D: npt.NDArray[np.float32], **options: Any) -> pa.Table:
        if store is self._replica:
            with suppress(Unavailable):
                return store.nearest(vector_D, **options)
        return self.gallery.nearest(vector_D, **options)

    def _rank(
        self, state: _State, vectors_QD: Tensor, wheres: Sequence[Where], count: int, *, base: bool
    ) -> Iterator[Ranked]:
        """Yield one ranking per query. Index searches run lazily, because each loads its own vectors."""
        if state.exact is not None:
            yield from state.exact.rank(vectors_QD, wheres, count, base=base)
            return
        for vector_D, where in zip(vectors_QD, wheres, strict=True):
            self._sampled = (vector_D, base)
            yield self._nearest(state.store, vector_D, where, count, base=base)

    def _nearest(
        self, store: GalleryStore, vector_D: Tensor, where: Where, count: int, *, base: bool, by_scan: bool = False
    ) -> Ranked:
        table = self._candidates(store, vector_D.numpy(), base=base, count=count, where=where, by_scan=by_scan)
        vectors_RD = tensor_of(table[column_of(base)])
        scores_R = similarity(vector_D[None], vectors_RD)[0].numpy()
        best_K = best_first(scores_R, table["position"].to_numpy())
        return Ranked(candidates=table.select(FACTS), vectors_RD=vectors_RD, rows_K=best_K, scores_K=scores_R[best_K])


def _weights(query: Query, request: Request) -> dict[str, float]:
    """Return the weight of each modality that takes part."""
    if len(query.parts) == 1:
        return dict.fromkeys(query.parts, 1.0)
    return {name: request.weights[name] for name in query.parts if request.weights.get(name, 0.0) > 0}


def _hits(ranked: Ranked, query: Query, weights: Mapping[str, float]) -> list[Hit]:
    shares = {name: (weight * (ranked.vectors_KD @ query.parts[name])).tolist() for name, weight in weights.items()}
    return [
        Hit(
            id=facts["id"],
            score=float(ranked.scores_K[row]),
            shares={name: of_name[row] for name, of_name in shares.items()},
            pid=facts["pid"],
            camid=facts["camid"],
            time=facts["time"],
            image=facts["image"],
            position=facts["position"],
        )
        for row, facts in enumerate(ranked.facts.to_pylist())
    ]
