"""Plain-loop oracles: each formula as the paper or the released code states it, in float64, as slow as it likes."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def ranking_metrics_loop(
    similarity: Any,
    query_pids: Sequence[int],
    gallery_pids: Sequence[int],
    query_camids: Sequence[int],
    gallery_camids: Sequence[int],
    protocol: str,
    max_rank: int,
) -> tuple[list[float], float, float, int]:
    """CMC, mAP, mINP and the number of valid queries, one query and one gallery image at a time."""
    hits, precisions, inps = [0] * max_rank, [], []
    for q, (pid, camid) in enumerate(zip(query_pids, query_camids, strict=True)):
        kept = []
        for g in range(len(gallery_pids)):
            same = gallery_pids[g] == pid and gallery_camids[g] == camid
            if protocol in ("llcm", "market1501") and same:
                continue
            if protocol == "sysu_mm01" and camid == 3 and gallery_camids[g] == 2:
                continue
            kept.append(g)
        kept.sort(key=lambda g: (-float(similarity[q][g]), g))
        ranked = [int(gallery_pids[g]) for g in kept]
        if pid not in ranked:
            continue
        found, precision, last = 0, 0.0, 0
        for rank, found_pid in enumerate(ranked, start=1):
            if found_pid == pid:
                found += 1
                precision += found / rank
                last = rank
        precisions.append(precision / found)
        inps.append(found / last)
        counted: list[int] = []
        for found_pid in ranked:
            if protocol in ("regdb", "market1501") or found_pid not in counted:
                counted.append(found_pid)
        for k in range(max_rank):
            hits[k] += pid in counted[: k + 1]
    valid = len(precisions)
    return [hit / valid for hit in hits], sum(precisions) / valid, sum(inps) / valid, valid


def gallery_draw_loop(folders: dict[tuple[int, int], list[str]], cameras: Sequence[int], trial: int) -> list[str]:
    """The released single-shot draw: global seed, identities, then camera folders that exist, one file of each."""
    random.seed(trial)
    drawn = []
    for name in sorted({f"{pid:04d}" for pid, _ in folders}):
        for camera in cameras:
            if (int(name), camera) in folders:
                drawn.append(random.choice(sorted(folders[int(name), camera])))
    return drawn


def k_reciprocal_rerank_loop(query: Floats, gallery: Floats, k1: int, k2: int, lambda_value: float) -> Floats:
    """k-reciprocal re-ranking with Python sets; minus the final distance."""
    feature = np.concatenate([query, gallery])
    num_images = len(feature)
    distance = np.zeros((num_images, num_images))
    for i in range(num_images):
        for j in range(num_images):
            distance[i, j] = sum((feature[i, d] - feature[j, d]) ** 2 for d in range(feature.shape[1]))
    nearest = [sorted(range(num_images), key=lambda j: distance[i, j]) for i in range(num_images)]
    scaled = [[distance[i, j] / max(distance[i]) for j in range(num_images)] for i in range(num_images)]

    def reciprocal(i: int, k: int) -> set[int]:
        return {j for j in nearest[i][: k + 1] if i in nearest[j][: k + 1]}

    code = np.zeros((num_images, num_images))
    for i in range(num_images):
        mine = reciprocal(i, k1)
        widened = set(mine)
        for candidate in mine:
            theirs = reciprocal(candidate, round(k1 / 2))
            if len(theirs & mine) > 2 / 3 * len(theirs):
                widened |= theirs
        for j in widened:
            code[i, j] = math.exp(-scaled[i][j])
        code[i] /= code[i].sum()
    averaged = np.stack([np.mean([code[j] for j in nearest[i][:k2]], axis=0) for i in range(num_images)])
    similarity = np.zeros((len(query), len(gallery)))
    for q in range(len(query)):
        for g in range(len(gallery)):
            shared = sum(min(averaged[q, j], averaged[len(query) + g, j]) for j in range(num_images))
            jaccard = 1 - shared / (2 - shared)
            similarity[q, g] = -((1 - lambda_value) * jaccard + lambda_value * scaled[q][len(query) + g])
    return similarity


def expand_queries_loop(query: Floats, gallery: Floats, k: int, alpha: float) -> Floats:
    """Alpha query expansion, one query at a time."""
    expanded = []
    for vector in query:
        scores = [float(vector @ other) for other in gallery]
        total = vector.copy()
        for g in sorted(range(len(gallery)), key=lambda g: -scores[g])[:k]:
            total = total + max(scores[g], 0.0) ** alpha * gallery[g]
        expanded.append(total / math.sqrt(float(total @ total)))
    return np.stack(expanded)
