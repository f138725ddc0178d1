"""Compute CMC, mAP and mINP from a similarity matrix, without sorting it.

All three need only the rank of each true match: one plus the number of kept gallery images ahead of it, which
`counting` counts. Queries are processed in order of identity: in a gallery sorted by identity, as every protocol here
draws it, the matches of a chunk are then close together, which makes counting faster.

Queries are independent of each other: blocks and chunks limit the memory and never change a result. A matrix that does
not fit into memory is given as a function that computes blocks of its rows.

Shape suffixes: Q query, G gallery, R query rows of one chunk, P true matches of a query (padded to the maximum of the
chunk), M true matches of one chunk in one list, I identities, K ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tvilfm.evaluation.counting import Ignored, Ints, Matrix, count_ahead, take_rows

MetricRule = Literal["sysu_mm01", "regdb", "llcm", "market1501"]
Rows = Callable[[slice], Matrix]  # queries -> their rows of the similarity matrix
Labels = npt.NDArray[Any] | Tensor | Sequence[int]
_Floats = npt.NDArray[np.float64]

_FLOATS = ("float16", "bfloat16", "float32", "float64")
# Similarities that one thread processes at a time, at most 16 MB when copied.
CHUNK_ELEMENTS = 2**21
# Similarities that a function computes at a time, 512 MB in single precision.
BLOCK_ELEMENTS = 2**27
# Below this number of similarities (about 0.3 ms of work), starting threads costs more than it saves.
_WORTH_THREADS = 2**17


@dataclass(frozen=True)
class RankingMetrics:
    """Retrieval quality of one ranking, fractions 0-1.

    Attributes:
        cmc: [K] float64, share of valid queries whose identity is found within rank k + 1.
        rank1: first entry of `cmc`.
        mAP: mean average precision.
        mINP: mean inverse negative penalty.
        num_valid_queries: queries with a true match in the gallery kept for them; all means are over these.
    """

    cmc: _Floats
    rank1: float
    mAP: float
    mINP: float
    num_valid_queries: int


def ranking_metrics(
    similarity_QG: Matrix | Rows,
    query_pids: Labels,
    gallery_pids: Labels,
    query_camids: Labels,
    gallery_camids: Labels,
    *,
    protocol: MetricRule,
    max_rank: int = 20,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> RankingMetrics:
    """Score the ranking of the gallery for each query, by the rules of one benchmark.

    | protocol | gallery ignored by a query | CMC counts |
    |---|---|---|
    | sysu_mm01 | all of camera 2, for a query of camera 3 (the same place) | identities |
    | regdb | nothing | images |
    | llcm | same identity and same camera | identities |
    | market1501 | same identity and same camera | images |

    "Identities" is the deduplicated CMC: each identity in the ranked list is counted once, at its first occurrence.
    mAP and mINP always use all kept images. Average precision is not interpolated: it is the mean, over true matches,
    of (matches so far) / rank. INP is (number of matches) / (rank of the last match).

    Args:
        similarity_QG: [Q, G] float16, bfloat16, float32 or float64; higher is closer; without NaN; not necessarily
            normalised. A numpy array, a torch tensor on any device (compared on that device), or a function that
            returns the rows of a slice of the queries.
        query_pids: [Q] identity of each query.
        gallery_pids: [G] identity of each gallery image.
        query_camids: [Q] camera of each query.
        gallery_camids: [G] camera of each gallery image.
        protocol: benchmark rule from the table above.
        max_rank: length of the CMC curve, >= 1. Ranks past the end of the gallery repeat the last value.
        chunk_elements: number of similarities processed at a time; limits the memory and never changes a result.

    Returns:
        Metrics as fractions 0-1. Equal similarities rank by gallery index, lowest first.

    Raises:
        ValueError: the protocol is unknown, the similarity is not a two-dimensional float matrix or contains NaN,
            labels have another length, `max_rank` or `chunk_elements` is below 1, or no query has a match.

    Source: CMC of SYSU-MM01: Wu et al., ICCV 2017, and the evaluators released with AGW (Ye et al., TPAMI 2021,
        which also defines mINP) and, for LLCM, with DEEN (Zhang and Wang, CVPR 2023); Market-1501: Zheng et
        al., ICCV 2015.
    Differs: ties, which the released evaluators leave to an unstable sort. Released TVI-LFM scores its
        infrared-only LLCM row by the SYSU-MM01 rule; pass `sysu_mm01` to repeat that.
    """
    _check_options(protocol, max_rank=max_rank, chunk_elements=chunk_elements)
    if callable(similarity_QG):
        rows_of, num_queries, num_gallery = similarity_QG, len(query_pids), len(gallery_pids)
        step = max(1, BLOCK_ELEMENTS // max(1, num_gallery))
    else:
        matrix = _checked_similarity(similarity_QG)
        rows_of, (num_queries, num_gallery), step = matrix.__getitem__, matrix.shape, matrix.shape[0]
    labels = _Labels(
        query_pids=_checked_labels("query_pids", query_pids, num_queries),
        gallery_pids=_checked_labels("gallery_pids", gallery_pids, num_gallery),
        query_camids=_checked_labels("query_camids", query_camids, num_queries),
        gallery_camids=_checked_labels("gallery_camids", gallery_camids, num_gallery),
    )
    parts: list[_Scores] = []
    for start in range(0, num_queries, step):
        block = slice(start, min(start + step, num_queries))
        part = _checked_similarity(rows_of(block), (block.stop - block.start, num_gallery))
        parts += _scores(part, labels.of(block), protocol, chunk_elements)
    return _mean(parts, max_rank)


def _check_options(protocol: str, **counts: int) -> None:
    if protocol not in get_args(MetricRule):
        known = ", ".join(get_args(MetricRule))
        raise ValueError(f"protocol: expected one of {known}, got {protocol!r}. Choose the benchmark's rule.")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: expected >= 1, got {count}. Raise it.")


@dataclass(frozen=True)
class _Labels:
    query_pids: Ints
    gallery_pids: Ints
    query_camids: Ints
    gallery_camids: Ints

    def of(self, queries: slice) -> _Labels:
        return replace(self, query_pids=self.query_pids[queries], query_camids=self.query_camids[queries])


@dataclass(frozen=True)
class _Scores:
    """Average precision, INP, and the rank of the CMC hit for each valid query of one chunk."""

    precision: _Floats
    inp: _Floats
    hit_rank: Ints


def _scores(matrix: Matrix, labels: _Labels, rule: MetricRule, chunk_elements: int) -> list[_Scores]:
    """Score all queries, in chunks by identity, on several threads if that is worth it."""
    num_queries, num_gallery = int(matrix.shape[0]), int(matrix.shape[1])
    threads = torch.get_num_threads() if isinstance(matrix, np.ndarray) or matrix.device.type == "cpu" else 1
    if num_queries * num_gallery < _WORTH_THREADS:
        threads = 1
    rows_at_a_time = min(max(1, chunk_elements // num_gallery), -(-num_queries // threads))
    ranker = _Ranker(matrix, labels, rule)
    by_pid = np.argsort(labels.query_pids, kind="stable")
    work = [by_pid[low : low + rows_at_a_time] for low in range(0, num_queries, rows_at_a_time)]
    if threads == 1:
        return [ranker.score(chunk) for chunk in work]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(ranker.score, work))


class _Ranker:
    """Scorer of chunks of one similarity matrix, with the data that chunks share: gallery by identity, and rules."""

    def __init__(self, matrix: Matrix, labels: _Labels, rule: MetricRule) -> None:
        self.matrix = matrix
        self.labels = labels
        self.rule = rule
        self.pids, slot_G, self.count = np.unique(labels.gallery_pids, return_inverse=True, return_counts=True)
        self.columns = np.argsort(slot_G, kind="stable")
        self.start = np.cumsum(self.count) - self.count
        self.hidden_G = labels.gallery_camids == 2 if rule == "sysu_mm01" else np.zeros(len(slot_G), dtype=bool)
        self.turns = self._turns() if rule in ("sysu_mm01", "llcm") else None

    def _turns(self) -> list[Ints]:
        """Return columns in turns, with one image per identity in each; identities with the most images come first."""
        by_count = np.argsort(-self.count, kind="stable")
        turns = []
        for turn in range(int(self.count.max())):
            slots = by_count[: np.count_nonzero(self.count > turn)]
            turns.append(self.columns[self.start[slots] + turn])
        return turns

    def score(self, rows: Ints) -> _Scores:
        """Score the queries in the given rows."""
        block_RG = take_rows(self.matrix, rows)
        if np.isnan(float(block_RG.max())):  # a maximum propagates NaN
            raise ValueError(
                f"similarity_QG: expected no NaN, got some in query rows {rows.min()} to {rows.max()}. "
                "Check the features for zero-length or diverged vectors."
            )
        query_camids = self.labels.query_camids[rows]
        row_M, column_M = self._matches(self.labels.query_pids[rows])
        blind_R = query_camids == 3
        if self.rule in ("llcm", "market1501"):
            ignored_M = query_camids[row_M] == self.labels.gallery_camids[column_M]
        else:
            ignored_M = blind_R[row_M] & self.hidden_G[column_M]
        ignored = Ignored(blind_R, self.hidden_G, row_M[ignored_M], column_M[ignored_M])
        row_M, column_M = row_M[~ignored_M], column_M[~ignored_M]
        num_matches_R = np.bincount(row_M, minlength=len(rows))
        if not len(row_M):
            return _Scores(np.empty(0), np.empty(0), np.empty(0, dtype=np.int64))

        nth_M = np.arange(len(row_M)) - (np.cumsum(num_matches_R) - num_matches_R)[row_M]
        column_RP = np.zeros((len(rows), int(num_matches_R.max())), dtype=np.int64)
        # Padding repeats the row's first match, so it is never better than the best match.
        valid_R = num_matches_R > 0
        column_RP[valid_R] = column_M[nth_M == 0][:, None]
        column_RP[row_M, nth_M] = column_M
        ahead_RP, best_RG = count_ahead(block_RG, column_RP, num_matches_R, ignored, want_best=self.turns is not None)

        num_matches_R, rank_RP = num_matches_R[valid_R], ahead_RP[valid_R] + 1
        nth_RP = np.arange(1, rank_RP.shape[1] + 1)
        padding_RP = nth_RP > num_matches_R[:, None]
        last_R = np.where(padding_RP, 0, rank_RP).max(axis=1)
        rank_RP[padding_RP] = np.iinfo(np.int64).max
        rank_RP.sort(axis=1)
        precision_RP = np.where(padding_RP, 0.0, nth_RP / rank_RP)
        hit_rank = rank_RP[:, 0]
        if self.turns is not None and best_RG is not None:
            seen_RI = np.zeros((len(rows), len(self.pids)), dtype=bool)
            for turn in self.turns:
                seen_RI[:, : len(turn)] |= np.take(best_RG, turn, axis=1)
            hit_rank = np.count_nonzero(seen_RI, axis=1)[valid_R] + 1
        # Unlike a pairwise sum, a running sum does not depend on the amount of padding.
        precision = precision_RP.cumsum(axis=1)[:, -1] / num_matches_R
        return _Scores(precision, num_matches_R / last_R, hit_rank)

    def _matches(self, query_pids: Ints) -> tuple[Ints, Ints]:
        """Return row and column of every gallery image of each query's identity, by ascending row, then column."""
        slot_R = np.minimum(np.searchsorted(self.pids, query_pids), len(self.pids) - 1)
        count_R = np.where(self.pids[slot_R] == query_pids, self.count[slot_R], 0)
        row_M = np.repeat(np.arange(len(query_pids)), count_R)
        nth_M = np.arange(len(row_M)) - np.repeat(np.cumsum(count_R) - count_R, count_R)
        return row_M, self.columns[self.start[slot_R][row_M] + nth_M]


def _mean(parts: list[_Scores], max_rank: int) -> RankingMetrics:
    hit_rank = np.concatenate([part.hit_rank for part in parts])
    if not len(hit_rank):
        raise ValueError(
            "query_pids: expected at least one query whose identity is in the gallery kept for it, got none. "
            "Check that query and gallery come from the same split."
        )
    hits = np.bincount(np.minimum(hit_rank, max_rank + 1), minlength=max_rank + 2)[1 : max_rank + 1]
    cmc = np.cumsum(hits) / len(hit_rank)
    return RankingMetrics(
        cmc=cmc,
        rank1=float(cmc[0]),
        mAP=float(np.mean(np.concatenate([part.precision for part in parts]))),
        mINP=float(np.mean(np.concatenate([part.inp for part in parts]))),
        num_valid_queries=len(hit_rank),
    )


def _checked_similarity(matrix: Matrix, shape: tuple[int, int] | None = None) -> Matrix:
    matrix = matrix.detach() if isinstance(matrix, Tensor) else np.asarray(matrix)
    dtype = str(matrix.dtype).removeprefix("torch.")
    if matrix.ndim != 2 or dtype not in _FLOATS or 0 in matrix.shape or shape not in (None, tuple(matrix.shape)):
        raise ValueError(
            f"similarity_QG: expected a matrix of queries by gallery in {', '.join(_FLOATS)}, got shape "
            f"{tuple(matrix.shape)} in {dtype}. Pass one row per query and one column per gallery image."
        )
    return matrix


def _checked_labels(name: str, labels: Labels, length: int) -> Ints:
    array = np.asarray(labels.cpu().numpy() if isinstance(labels, Tensor) else labels)
    if array.shape != (length,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: expected {length} integers to fit similarity_QG, got shape {array.shape} in "
            f"{array.dtype}. Pass one label per row for queries and one per column for the gallery."
        )
    return array.astype(np.int64)
