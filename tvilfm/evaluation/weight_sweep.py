"""Sweep the ensemble's weights: many weightings of the same features, without a forward pass.

A weighted sum of votes ranks a gallery image g ahead of a true match p where w . (s_g - s_p) > 0, s being the three
modalities' similarities. Where all three agree about g and p, as they do for most pairs, no weighting changes that;
only the rest is multiplied by the weights, all weightings at once, and the ranks that CMC, mAP and mINP need are
counts of it.

The sweep chooses, on validation identities; what is reported of the chosen weights comes from the `Evaluator`, so it is
what `tvilfm evaluate` says. In the sweep a difference within float rounding of zero may fall the other way, and no
second look (`rerank`) is taken.

Shapes: W weightings, M modalities, Q queries, G gallery, K gallery kept for a query, P its true matches, U pairs that
the modalities do not agree about.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # it ships no types

from tvilfm.data.manifest import column
from tvilfm.evaluation.evaluator import Evaluator
from tvilfm.evaluation.protocols import get_protocol, ignored_gallery
from tvilfm.terms import PARTS

SweptMetric = Literal["rank1", "mAP", "mINP"]
_Floats = npt.NDArray[np.float64]
_Single = npt.NDArray[np.float32]

# Pairs counted at a time: as many as one byte can count, and with some 1,000 weightings about a level-2 cache.
_RUN = 255


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The scores of every weighting, fractions 0-1, mean over queries and then over gallery draws.

    Attributes:
        metric: by which weightings are compared.
        weights_WM: float64, in the order of `PARTS`.
        rank1, mAP, mINP: [W] float64.
    """

    metric: SweptMetric
    weights_WM: _Floats
    rank1: _Floats
    mAP: _Floats
    mINP: _Floats

    @property
    def best_row(self) -> int:
        """Return the weighting with the highest metric; of equals, the one nearest to equal weights, then the first."""
        share_WM = self.weights_WM / self.weights_WM.sum(axis=1, keepdims=True)
        away_W = np.abs(share_WM - 1 / len(PARTS)).sum(axis=1)
        return int(np.lexsort((away_W, -getattr(self, self.metric)))[0])

    @property
    def best(self) -> dict[str, float]:
        """The best weighting by modality, as in `evaluate.ensemble`."""
        return dict(zip(PARTS, self.weights_WM[self.best_row].tolist(), strict=True))


def weight_grid(steps: int) -> _Floats:
    """Return all weightings whose shares are multiples of 1 / steps; equal weights come first.

    Only the ratio of the weights matters, so they are shares that sum to 1.

    Args:
        steps: cuts of a side of the triangle, >= 1.

    Returns:
        (1 + (steps + 1)(steps + 2) / 2, 3), in the order of `PARTS`.
    """
    shares = [(i / steps, j / steps, (steps - i - j) / steps) for i in range(steps + 1) for j in range(steps + 1 - i)]
    return np.array([(1.0, 1.0, 1.0), *shares])


def sweep_ensemble(evaluator: Evaluator, weights_WM: npt.ArrayLike, *, metric: SweptMetric = "mAP") -> SweepResult:
    """Score every weighting of the ensemble under the default protocol and text source.

    Args:
        evaluator: features, protocol, text source and temperature; its own weights and `rerank` are not used.
        weights_WM: (W, 3) >= 0, one above 0 in each row, in the order of `PARTS`.
        metric: by which weightings are compared.

    Returns:
        rank-1, mAP and mINP of each weighting, as `Evaluator.evaluate` gives them up to float rounding.

    Raises:
        ValueError: weights that are not such, a protocol whose queries have no such text, or no query with a match.

    Source: METHOD 7 and 8. Differs: ensemble weights are all 1 as published.
    """
    weights_WM = np.asarray(weights_WM, dtype=np.float64)
    if weights_WM.ndim != 2 or weights_WM.shape[1] != len(PARTS) or not len(weights_WM):
        raise ValueError(f"weights_WM: expected (W, {len(PARTS)}), got {weights_WM.shape}. One row a weighting.")
    if not (weights_WM >= 0).all() or not (weights_WM.sum(axis=1) > 0).all():
        raise ValueError("weights_WM: expected weights >= 0 and one above 0 in every row, got others. Fix them.")
    protocol = get_protocol(evaluator.section.protocols[0])
    source = evaluator.section.default_text_source
    texts = evaluator.texts(protocol, source)
    if texts is None:
        raise ValueError(
            f"evaluate.default_text_source: expected one that {protocol.name} has texts of, got {source}. "
            "Sweep another protocol or text source."
        )
    query = evaluator.query(protocol)
    parts = evaluator.part_vectors(query, texts)
    kept = query.take(texts.kept)
    pids, camids = column(kept, "pid"), column(kept, "camid")
    weights_MW = np.ascontiguousarray(weights_WM.T, dtype=np.float32)
    draws = []
    for trial in range(protocol.num_trials):
        gallery = evaluator.gallery(protocol, trial)
        votes = evaluator.votes(parts, gallery)
        votes_MQG = np.stack([votes[name].cpu().numpy() for name in PARTS])
        ignored = {
            pair: ignored_gallery(protocol, *pair, gallery)
            for pair in set(zip(pids.tolist(), camids.tolist(), strict=True))
        }
        is_match = {pid: column(gallery, "pid") == pid for pid in set(pids.tolist())}
        scores = (
            _score(votes_MQG[:, q], is_match[pid], ~ignored[pid, camid], weights_MW)
            for q, (pid, camid) in enumerate(zip(pids.tolist(), camids.tolist(), strict=True))
        )
        draws.append(_mean(scores))
    rank1, mean_precision, mean_inp = np.mean(draws, axis=0)
    return SweepResult(metric=metric, weights_WM=weights_WM, rank1=rank1, mAP=mean_precision, mINP=mean_inp)


def _mean(scores: Iterator[_Floats | None]) -> _Floats:
    """(3, W) mean over the queries that have a match."""
    total, valid = np.zeros(1), 0
    with threadpool_limits(1):  # on products this small, more threads wait for each other
        for score in scores:
            if score is not None:
                total, valid = total + score, valid + 1
    if not valid:
        raise ValueError(
            "query: expected at least one identity that is in the gallery, got none. "
            "Take query and gallery from the same split."
        )
    return total / valid


def _score(
    votes_MG: _Single, match_G: npt.NDArray[np.bool_], kept_G: npt.NDArray[np.bool_], weights_MW: _Single
) -> _Floats | None:
    """(3, W) rank-1, average precision and INP of one query under every weighting; None without a true match."""
    votes_MK = votes_MG[:, kept_G]
    places_P = np.flatnonzero(match_G[kept_G])
    if not len(places_P):
        return None
    # ahead_MPK > 0: modality m puts gallery image k ahead of the true match p.
    ahead_MPK = votes_MK[:, None] - votes_MK[:, places_P, None]
    low_PK, high_PK = ahead_MPK.min(axis=0), ahead_MPK.max(axis=0)
    agreed_P = np.count_nonzero(low_PK > 0, axis=1)
    open_PK = (low_PK <= 0) & (high_PK >= 0)
    rank_PW = np.empty((len(places_P), weights_MW.shape[1]), dtype=np.int32)
    for p, place in enumerate(places_P):
        open_PK[p, place] = False
        pairs_U = np.flatnonzero(open_PK[p])
        rank_PW[p] = _count_ahead(ahead_MPK[:, p, pairs_U].T, int(np.searchsorted(pairs_U, place)), weights_MW)
        rank_PW[p] += agreed_P[p] + 1
    # Counting the matches ahead of each is cheaper than sorting these short columns.
    nth_PW = 1 + (rank_PW < rank_PW[:, None]).sum(axis=1, dtype=np.int16)
    return np.stack([rank_PW.min(axis=0) == 1, (nth_PW / rank_PW).mean(axis=0), len(rank_PW) / rank_PW.max(axis=0)])


def _count_ahead(ahead_UM: _Single, num_left: int, weights_MW: _Single) -> npt.NDArray[np.int32]:
    """[W] how many of the pairs each weighting puts ahead of the match; left of it in the gallery, equal is ahead."""
    count_W = np.zeros(weights_MW.shape[1], dtype=np.int32)
    for first in range(0, len(ahead_UM), _RUN):
        sum_UW = ahead_UM[first : first + _RUN] @ weights_MW
        left = max(0, num_left - first)
        is_ahead_UW = np.empty(sum_UW.shape, dtype=bool)
        np.greater_equal(sum_UW[:left], 0, out=is_ahead_UW[:left])
        np.greater(sum_UW[left:], 0, out=is_ahead_UW[left:])
        count_W += np.add.reduce(is_ahead_UW.view(np.uint8), axis=0, dtype=np.uint8)
    return count_W
