"""Open-set search: is the person in the gallery at all? Score thresholds, and the errors that they make.

A ranked list always has somebody at the top. A threshold on the score can leave the list empty. Two errors follow: a
false accept (the person is not in the gallery, and the best hit of somebody else reaches the threshold) and a false
reject (the person is in the gallery, and no image of this person reaches it). For the first, every query is also asked
without the images of its person.

A threshold is fitted on validation identities and holds for one set of voting modalities, because their scores have
different scales. False accepts grow with the number of people in the gallery.

Shapes: Q queries, G gallery, N scores, T thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tvilfm.data.manifest import column
from tvilfm.evaluation.open_set import OpenSet
from tvilfm.evaluation.protocols import Protocol, ignored_gallery

Scores = npt.NDArray[np.float32]
BLOCK_ELEMENTS = 2**24  # similarities that are in memory at a time
NUM_THRESHOLDS = 101


@dataclass(frozen=True, kw_only=True)
class BestScores:
    """The scores that decide about a threshold.

    Attributes:
        present_N: score of the best image of each query's person, for queries whose person is in the gallery.
        absent_N: score of the best image of somebody else, for all queries.
        gallery_people: mean number of people in the searched galleries.
    """

    present_N: Scores
    absent_N: Scores
    gallery_people: float

    def false_accepts(self, threshold: float) -> float:
        return float((self.absent_N >= threshold).mean())

    def false_rejects(self, threshold: float) -> float:
        return float((self.present_N < threshold).mean())

    def fit(self, max_false_accepts: float) -> float:
        """Return the lowest threshold with at most this share of false accepts."""
        allowed = math.floor(max_false_accepts * len(self.absent_N))
        falling_N = np.sort(self.absent_N)[::-1]
        if allowed >= len(falling_N):
            return float(min(falling_N[-1], self.present_N.min(initial=np.inf)))
        return float(np.nextafter(falling_N[allowed], np.float32(np.inf)))

    def open_set(self, fitted: float | None) -> OpenSet:
        """Return the two errors at quantiles of all scores, and at a fitted threshold."""
        scores_N = np.concatenate([self.present_N, self.absent_N])
        thresholds_T = np.unique(np.quantile(scores_N, np.linspace(0, 1, NUM_THRESHOLDS), method="nearest"))
        return OpenSet(
            thresholds=tuple(thresholds_T.tolist()),
            false_accepts=tuple(self.false_accepts(threshold) for threshold in thresholds_T),
            false_rejects=tuple(self.false_rejects(threshold) for threshold in thresholds_T),
            gallery_people=self.gallery_people,
            fitted=fitted,
            fitted_false_accepts=None if fitted is None else self.false_accepts(fitted),
            fitted_false_rejects=None if fitted is None else self.false_rejects(fitted),
        )


def best_scores(
    similarity: Callable[[slice], Scores], query: pa.Table, gallery: pa.Table, protocol: Protocol
) -> BestScores:
    """Return the best scores of queries in one gallery, by the protocol's rule for ignored images.

    Args:
        similarity: queries -> their rows of the (Q, G) similarity.
        query, gallery: rows from `select_query` and `select_gallery`.
        protocol: protocol of both.
    """
    pids_Q, camids_Q, pids_G = column(query, "pid"), column(query, "camid"), column(gallery, "pid")
    present_Q = np.full(len(pids_Q), -np.inf, dtype=np.float32)
    absent_Q = present_Q.copy()
    block = max(1, BLOCK_ELEMENTS // max(1, len(pids_G)))
    for start in range(0, len(pids_Q), block):
        rows = similarity(slice(start, start + block))
        for row, scores_G in enumerate(rows, start=start):
            kept_G = ~ignored_gallery(protocol, int(pids_Q[row]), int(camids_Q[row]), gallery)
            own_G = pids_G == pids_Q[row]
            present_Q[row] = scores_G[kept_G & own_G].max(initial=-np.inf)
            absent_Q[row] = scores_G[kept_G & ~own_G].max(initial=-np.inf)
    return BestScores(
        present_N=present_Q[np.isfinite(present_Q)],
        absent_N=absent_Q[np.isfinite(absent_Q)],
        gallery_people=float(len(np.unique(pids_G))),
    )


def pooled(draws: Sequence[BestScores]) -> BestScores:
    """Return the scores of several gallery draws together."""
    return BestScores(
        present_N=np.concatenate([one.present_N for one in draws]),
        absent_N=np.concatenate([one.absent_N for one in draws]),
        gallery_people=float(np.mean([one.gallery_people for one in draws])),
    )
