"""Sweep the weights of the ensemble: score many weightings of the same features, without a forward pass.

A weighted sum of votes ranks a gallery image g ahead of a true match p if w . (s_g - s_p) > 0, where s are the
similarities of the three modalities. For most pairs, all three modalities agree about the order of g and p, so the
weights do not affect it. Only the other pairs are multiplied by the weights, for all weightings at once. Counting the
positive results gives the ranks for CMC, mAP and mINP.

The sweep only chooses weights, on validation identities. The reported results of the chosen weights come from the
`Evaluator`, so they are equal to those of `tvilfm evaluate`. In the sweep, a difference within float rounding of zero
can have the other sign, and there is no re-ranking (`rerank`).

Shapes: W weightings, M modalities, Q queries, G gallery, K gallery kept for a query, P its true matches, U pairs about
which the modalities disagree.
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

# Pairs counted at a time: the maximum of one byte; with about 1,000 weightings, this fills about a level-2 cache.
_RUN = 255


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The scores of every weighting: fractions 0-1, averaged over queries and then over gallery draws.

    Attributes:
        metric: metric by which weightings are compared.
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
        """The row with the highest metric; ties go to the weights nearest to equal weights, then to the first row."""
        share_WM = self.weights_WM / self.weights_WM.sum(axis=1, keepdims=True)
        away_W = np.abs(share_WM - 1 / len(PARTS)).sum(axis=1)
        return int(np.lexsort((away_W, -getattr(self, self.metric)))[0])

    @property
    def best(self) -> dict[str, float]:
        """The best weighting as modality -> weight, as in `evaluate.ensemble`."""
        return dict(zip(PARTS, self.weights_WM[self.best_row].tolist(), strict=True))


def weight_grid(steps: int) -> _Floats:
    """Return equal weights, followed by all weightings whose shares are multiples of 1 / steps.

    Only the ratio of the weights matters, so the shares sum to 1.

    Args:
        steps: number of steps per side of the triangle of weightings, >= 1.

    Returns:
        (1 + (steps + 1)(steps + 2) / 2, 3), in the order of `PARTS`.
    """
    shares = [(i / steps, j / steps, (steps - i - j) / steps) for i in range(steps + 1) for j in range(steps + 1 - i)]
    return np.array([(1.0, 1.0, 1.0), *shares])


def sweep_ensemble(evaluator: Evaluator, weights_WM: npt.ArrayLike, *, metric: SweptMetric = "mAP") -> SweepResult:
    """Score every weighting of the ensemble under the default protocol and text source.

    Args:
        evaluator: provides features, protocol, text source and temperature; its own weights and `rerank` are not used.
        weights_WM: (W, 3) in the order of `PARTS`; >= 0, with at least one weight above 0 in each row.
        metric: metric by which weightings are compared.

    Returns:
        rank-1, mAP and mINP of each weighting; equal to those of `Evaluator.evaluate` up to float rounding.

    Raises:
        ValueError: the weights are invalid, the protocol's queries have no text of this source, or no query has a
            match.

    Source: METHOD 7 and 8. Differs: published ensemble weights are all 1.
    """
    weights_WM = np.asarray(weights_WM, dtype=np.float64)
    if weights_WM.ndim != 2 or weights_WM.shape[1] != len(PARTS) or not len(weights_WM):
        raise ValueError(f"weights_WM: expected (W, {len(PARTS)}), got {weights_WM.shape}. Pass one row per weighting.")
    if not (weights_WM >= 0).all() or not (weights_WM.sum(axis=1) > 0).all():
        raise ValueError("weights_WM: expected weights >= 0 and one above 0 in every row, got others. Fix the weights.")
    protocol = get_protocol(evaluator.section.protocols[0])
    source = evaluator.section.default_text_source
    texts = evaluator.texts(protocol, source)
    if texts is None:
        raise ValueError(
            f"evaluate.default_text_source: expected a source with texts for {protocol.name}, got {source}. "
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
    """Return the mean (3, W) over the queries that have a match."""
    total, valid = np.zeros(1), 0
    with threadpool_limits(1):  # for such small products, more threads only wait for each other
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
    """Return rank-1, average precision and INP (3, W) of one query for every weighting; None without a true match."""
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
    """Return the number of pairs [W] that each weighting ranks ahead of the match.

    The first `num_left` pairs are left of the match in the gallery; for them, an equal similarity is ahead.
    """
    count_W = np.zeros(weights_MW.shape[1], dtype=np.int32)
    for first in range(0, len(ahead_UM), _RUN):
        sum_UW = ahead_UM[first : first + _RUN] @ weights_MW
        left = max(0, num_left - first)
        is_ahead_UW = np.empty(sum_UW.shape, dtype=bool)
        np.greater_equal(sum_UW[:left], 0, out=is_ahead_UW[:left])
        np.greater(sum_UW[left:], 0, out=is_ahead_UW[left:])
        count_W += np.add.reduce(is_ahead_UW.view(np.uint8), axis=0, dtype=np.uint8)
    return count_W
