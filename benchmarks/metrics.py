"""CMC, mAP and mINP against the per-query loop that the published evaluators share.

The baseline is that loop: a full argsort of the distance matrix, then for each query numpy operations over its
whole ranking and one Python list comprehension for the precisions. The comprehension is part of every published
version and weighs more the longer the gallery and the newer numpy, so the line also tells what the loop takes with
it written as one numpy operation. Both variants and ours must give the same numbers before a ratio is reported.

The data have each benchmark's sizes; features are noisy copies of one random vector an identity. Our time does not
depend on how good the ranking is.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.claim import Claim
from tvilfm.evaluation.metrics import MetricRule, ranking_metrics

GOAL = 40.0
MEMORY_LIMIT = 2**30
Array = npt.NDArray[Any]
Numbers = tuple[Array, float, float]


@dataclass(frozen=True)
class Ranking:
    """One similarity matrix with its labels."""

    similarity_QG: Array
    query_pids: Array
    gallery_pids: Array
    query_camids: Array
    gallery_camids: Array


def published_loop(ranking: Ranking, rule: MetricRule, *, comprehension: bool, max_rank: int = 20) -> Numbers:
    """The published evaluators' algorithm: sort everything, then walk every query's whole ranking."""
    order_QG = np.argsort(-ranking.similarity_QG, axis=1)
    ranked_pids_QG = ranking.gallery_pids[order_QG]
    matches_QG = (ranked_pids_QG == ranking.query_pids[:, None]).astype(np.int32)
    curves, precisions, inps = [], [], []
    for query, (pid, camid) in enumerate(zip(ranking.query_pids, ranking.query_camids, strict=True)):
        order = order_QG[query]
        if rule == "sysu_mm01":
            keep = ~((camid == 3) & (ranking.gallery_camids[order] == 2))
        elif rule == "market1501":
            keep = ~((ranking.gallery_pids[order] == pid) & (ranking.gallery_camids[order] == camid))
        else:
            keep = np.ones(len(order), dtype=bool)
        match = matches_QG[query][keep]
        if not match.any():
            continue
        if rule == "sysu_mm01":
            ranked = ranked_pids_QG[query][keep]
            identities = ranked[np.sort(np.unique(ranked, return_index=True)[1])]
            curve = (identities == pid).astype(np.int32).cumsum()
        else:
            curve = match.cumsum()
            curve[curve > 1] = 1
        curves.append(curve[:max_rank])
        found = match.cumsum()
        last = np.flatnonzero(match == 1).max()
        inps.append(found[last] / (last + 1.0))
        if comprehension:
            precision = np.asarray([count / (place + 1.0) for place, count in enumerate(found)])
        else:
            precision = found / (np.arange(len(found)) + 1.0)
        precisions.append((precision * match).sum() / match.sum())
    return np.mean(curves, axis=0), float(np.mean(precisions)), float(np.mean(inps))


def ours(ranking: Ranking, rule: MetricRule) -> Numbers:
    """`ranking_metrics` in the baseline's shape."""
    found = ranking_metrics(
        ranking.similarity_QG,
        ranking.query_pids,
        ranking.gallery_pids,
        ranking.query_camids,
        ranking.gallery_camids,
        protocol=rule,
    )
    return found.cmc, found.mAP, found.mINP


def measure(name: str, rule: MetricRule, rankings: list[Ranking], repeats: int) -> Claim:
    """Time the loop and ours on the same rankings; ours is the fastest of several, as is a loop that is short."""

    def run(evaluate: Callable[[Ranking], Numbers], times: int) -> tuple[float, list[Numbers]]:
        fastest = float("inf")
        for _ in range(times):
            start = time.perf_counter()
            numbers = [evaluate(ranking) for ranking in rankings]
            fastest = min(fastest, time.perf_counter() - start)
        return fastest, numbers

    run(lambda ranking: ours(ranking, rule), 1)
    ours_s, ours_numbers = run(lambda ranking: ours(ranking, rule), 5)
    plain_s, plain_numbers = run(lambda ranking: published_loop(ranking, rule, comprehension=False), repeats)
    loop_s, loop_numbers = run(lambda ranking: published_loop(ranking, rule, comprehension=True), repeats)
    for numbers in (plain_numbers, loop_numbers):
        for (cmc, mean_ap, mean_inp), (loop_cmc, loop_ap, loop_inp) in zip(ours_numbers, numbers, strict=True):
            np.testing.assert_allclose(cmc, loop_cmc, rtol=0, atol=1e-9)
            np.testing.assert_allclose((mean_ap, mean_inp), (loop_ap, loop_inp), rtol=0, atol=1e-9)
    peak = _additional_memory(lambda: ours(rankings[0], rule))
    fault = f"peak memory above {MEMORY_LIMIT // 2**20} MiB" if peak > MEMORY_LIMIT else None
    return Claim(
        name=name,
        ratio=loop_s / ours_s,
        goal=GOAL,
        ours=f"{ours_s:.4f} s on {torch.get_num_threads()} threads, {peak / 2**20:.0f} MiB more at its peak",
        baseline=f"{loop_s:.2f} s, or {plain_s:.3f} s ({plain_s / ours_s:.1f}x) without its list comprehension",
        fault=fault,
    )


def metrics_sysu() -> Claim:
    """SYSU-MM01 all-search, single-shot: 3,803 queries, 301 gallery images, 10 trials."""
    rng = np.random.default_rng(0)
    shown = np.sort(rng.permutation(96 * 4)[:301])
    gallery_pids, gallery_camids = shown // 4, np.array([1, 2, 4, 5])[shown % 4]
    query_pids, query_camids = np.sort(rng.integers(0, 96, 3803)), rng.choice([3, 6], 3803)
    rankings = [
        Ranking(_similarity(rng, query_pids, gallery_pids), query_pids, gallery_pids, query_camids, gallery_camids)
        for _ in range(10)
    ]
    return measure("metrics_sysu", "sysu_mm01", rankings, repeats=2)


def metrics_regdb() -> Claim:
    """RegDB: 2,060 queries, 2,060 gallery images, ten of each identity on either side."""
    pids = np.repeat(np.arange(206), 10)
    similarity_QG = _similarity(np.random.default_rng(1), pids, pids)
    ranking = Ranking(similarity_QG, pids, pids, np.full(2060, 2), np.full(2060, 1))
    return measure("metrics_regdb", "regdb", [ranking], repeats=2)


def metrics_market() -> Claim:
    """Market-1501: 3,368 queries, 15,913 gallery images, of which 2,798 distractors show nobody of the queries."""
    rng = np.random.default_rng(2)
    gallery_pids = np.concatenate([np.zeros(2798, dtype=int), np.sort(rng.integers(1, 751, 13115))])
    query_pids = np.sort(rng.integers(1, 751, 3368))
    similarity_QG = _similarity(rng, query_pids, gallery_pids)
    ranking = Ranking(similarity_QG, query_pids, gallery_pids, rng.integers(1, 7, 3368), rng.integers(1, 7, 15913))
    return measure("metrics_market", "market1501", [ranking], repeats=1)


def _similarity(rng: np.random.Generator, query_pids: Array, gallery_pids: Array) -> Array:
    centre_ID = rng.standard_normal((800, 64), dtype=np.float32)

    def noisy(pids: Array) -> npt.NDArray[np.float32]:
        feature = centre_ID[pids] + 1.1 * rng.standard_normal((len(pids), 64), dtype=np.float32)
        unit: npt.NDArray[np.float32] = feature / np.linalg.norm(feature, axis=1, keepdims=True)
        return unit

    # Without ties, so that the baseline's unstable sort has only one right answer.
    similarity_QG = noisy(query_pids) @ noisy(gallery_pids).T
    rank_QG = similarity_QG.argsort(axis=1).argsort(axis=1)
    spread_QG: npt.NDArray[np.float32] = (rank_QG / rank_QG.shape[1]).astype(np.float32)
    return spread_QG


def _additional_memory(function: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


CLAIMS: dict[str, Callable[[], Claim]] = {
    "metrics_sysu": metrics_sysu,
    "metrics_regdb": metrics_regdb,
    "metrics_market": metrics_market,
}
