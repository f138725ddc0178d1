"""Search a gallery once for all modalities of a query, with the ranking of the evaluation.

Small galleries are searched exactly, in memory. Large galleries are searched with Lance's index, which reads part of
the table and re-scores its best candidates with the full vectors.

Shapes: Q queries, K hits, M modalities, D feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import torch
from torch import Tensor

from tvilfm.config import GallerySection
from tvilfm.models.ensemble import ensemble_query
from tvilfm.models.similarity import similarity
from tvilfm.retrieval.exact import FACTS, ExactIndex, Ranked, best_first, tensor_of
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.query import Query
from tvilfm.retrieval.rows import Where, column_of
from tvilfm.terms import SearchKind

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
    """

    id: str
    score: float
    shares: dict[str, float]
    pid: int | None
    camid: int
    time: datetime | None
    image: str | None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Hits, best first, ties in the order of writing. `version` is the gallery version that was searched."""

    hits: list[Hit]
    version: int


@dataclass(frozen=True, kw_only=True)
class _State:
    """A gallery version, and its in-memory index if the gallery is small enough."""

    gallery: Gallery
    exact: ExactIndex | None


class Searcher:
    """Answer queries from one gallery.

    Args:
        gallery: the gallery to search; `refresh` picks up new versions.
        section: largest size that is searched exactly, and the settings of the index.
        device: device of the first pass of an exact search; half precision on CUDA.
    """

    def __init__(self, gallery: Gallery, section: GallerySection, *, device: str = "cpu") -> None:
        self._gallery, self._section, self._device = gallery, section, torch.device(device)
        self._state = self._load(None)

    @property
    def gallery(self) -> Gallery:
        """The gallery version that is currently searched."""
        return self._state.gallery

    @property
    def kind(self) -> SearchKind:
        """How that version is searched: in memory, with its index, or by reading every row if it has no index."""
        if self._state.exact is not None:
            return "exact"
        return "index" if self._state.gallery.indexed else "scan"

    def refresh(self) -> bool:
        """Load the rows that the latest version adds and search it from now on. Return whether it was new.

        A running search finishes on the version that it started with.
        """
        self._gallery.refresh()
        searched = self._state.gallery  # also outdated if the last load failed
        same_table = self._gallery.space_id == searched.space_id
        if same_table and self._gallery.version == searched.version:
            return False
        self._state = self._load(self._state.exact if same_table else None)
        return True

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
            state.gallery.check_space(query.space_id)
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
            Answer(hits=_hits(ranked[row], query, weights[row]), version=state.gallery.version)
            for row, query in enumerate(queries)
        ]

    def _load(self, before: ExactIndex | None) -> _State:
        gallery = self._gallery.snapshot()
        if len(gallery) > self._section.exact_limit:
            return _State(gallery=gallery, exact=None)
        half = self._device.type == "cuda"
        return _State(gallery=gallery, exact=ExactIndex.load(gallery, device=self._device, half=half, before=before))

    def _rank(
        self, state: _State, vectors_QD: Tensor, wheres: Sequence[Where], count: int, *, base: bool
    ) -> Iterator[Ranked]:
        """Yield one ranking per query. Index searches run lazily, because each loads its own vectors."""
        if state.exact is not None:
            yield from state.exact.rank(vectors_QD, wheres, count, base=base)
            return
        how = {"minimum_nprobes": self._section.probes, "refine_factor": self._section.refine}
        for vector_D, where in zip(vectors_QD, wheres, strict=True):
            table = state.gallery.nearest(vector_D.numpy(), FACTS, base=base, k=count, where=where, **how)
            vectors_RD = tensor_of(table[column_of(base)])
            scores_R = similarity(vector_D[None], vectors_RD)[0].numpy()
            best_K = best_first(scores_R, table["position"].to_numpy())
            yield Ranked(
                candidates=table.select(FACTS), vectors_RD=vectors_RD, rows_K=best_K, scores_K=scores_R[best_K]
            )


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
        )
        for row, facts in enumerate(ranked.facts.to_pylist())
    ]
