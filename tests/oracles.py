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


def wrt_triplet_loop(features: Sequence[Sequence[float]], labels: Sequence[int], numerics: str) -> float:
    """Weighted regularised triplet (METHOD 3), one anchor at a time; `published` keeps the masked maximum's fault."""

    def weights(scores: list[float], mask: list[bool]) -> list[float]:
        if numerics == "published":
            top = max(score if taken else 0.0 for score, taken in zip(scores, mask, strict=True))
        else:
            top = max((score for score, taken in zip(scores, mask, strict=True) if taken), default=0.0)
        exponents = [math.exp(score - top) if taken else 0.0 for score, taken in zip(scores, mask, strict=True)]
        total = sum(exponents) + (1e-6 if numerics == "published" else 0.0)
        return [exponent / total if total else 0.0 for exponent in exponents]

    losses = []
    for anchor, label in zip(features, labels, strict=True):
        distances = [
            math.sqrt(max(sum((a - b) ** 2 for a, b in zip(anchor, other, strict=True)), 1e-12)) for other in features
        ]
        same = [other == label for other in labels]
        pull = sum(d * w for d, w in zip(distances, weights(distances, same), strict=True))
        away = weights([-d for d in distances], [not match for match in same])
        push = sum(d * w for d, w in zip(distances, away, strict=True))
        losses.append(max(pull - push, 0.0) + math.log1p(math.exp(-abs(pull - push))))
    return sum(losses) / len(losses)


def hetero_center_loop(features: Floats, labels: Sequence[int], groups: Sequence[int]) -> float:
    """Hetero-centre loss, one identity and group at a time; group 0 is visible."""
    gaps = []
    for label in sorted(set(labels)):
        centers = {}
        for group in sorted(set(groups)):
            rows = [row for row, *at in zip(features, labels, groups, strict=True) if at == [label, group]]
            if rows:
                centers[group] = sum(rows[1:], start=rows[0]) / len(rows)
        for group, center in centers.items():
            if group and 0 in centers:
                gaps.append(sum((float(a) - float(b)) ** 2 for a, b in zip(center, centers[0], strict=True)))
    return sum(gaps) / len(gaps) if gaps else 0.0


def lr_factors_loop(num_epochs: int, warmup_epochs: int, milestones: Sequence[int]) -> list[float]:
    """The rate's factor epoch by epoch: climb in equal steps from 0.01 to 1, fall tenfold when a milestone comes."""
    factors, fallen = [], 1.0
    for epoch in range(num_epochs):
        if epoch in milestones:
            fallen /= 10
        climb = 0.01 + 0.99 * epoch / warmup_epochs if epoch < warmup_epochs else 1.0
        factors.append(climb * fallen)
    return factors


def stretch_loop(matrix: Sequence[Sequence[float]], dim: int) -> list[list[float]]:
    """Linear interpolation of each row to `dim` columns, pixel centres at half integers (align_corners false)."""
    stretched = []
    for row in matrix:
        line = []
        for column in range(dim):
            place = min(max((column + 0.5) * len(row) / dim - 0.5, 0.0), len(row) - 1.0)
            left = min(int(place), len(row) - 1)
            right = min(left + 1, len(row) - 1)
            line.append(row[left] + (row[right] - row[left]) * (place - left))
        stretched.append(line)
    return stretched


def gem_loop(maps: Floats, p: float, eps: float) -> Floats:
    """Generalised mean of each channel: (mean of x^p)^(1/p), x no smaller than eps."""
    pooled = np.zeros(maps.shape[:2])
    for b in range(maps.shape[0]):
        for d in range(maps.shape[1]):
            values = [max(float(value), eps) ** p for value in maps[b, d].ravel()]
            pooled[b, d] = (sum(values) / len(values)) ** (1 / p)
    return pooled


def augment_loop(
    image: npt.NDArray[np.uint8],
    pad: int,
    *,
    top: int,
    left: int,
    flip: bool,
    gray: bool,
    erase: Sequence[int],
    channel: int,
) -> Floats:
    """One image through PIL's pad, crop, flip and gray, then normalised, erased and its channels exchanged."""
    from PIL import Image, ImageOps

    height, width, _ = image.shape
    picture = ImageOps.expand(Image.fromarray(image), border=pad, fill=(0, 0, 0))
    picture = picture.crop((left, top, left + width, top + height))
    if flip:
        picture = ImageOps.mirror(picture)
    if gray:
        picture = picture.convert("L").convert("RGB")
    mean, std, fill = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.4914, 0.4822, 0.4465)
    values = np.asarray(picture, dtype=np.float64)
    out = np.zeros((3, height, width))
    for c in range(3):
        out[c] = (values[:, :, c] / 255 - mean[c]) / std[c]
        for y in range(erase[0], erase[0] + erase[2]):
            for x in range(erase[1], erase[1] + erase[3]):
                out[c, y, x] = fill[c]
    if channel == 3:
        return np.stack([0.2989 * out[0] + 0.5870 * out[1] + 0.1140 * out[2]] * 3)
    return out if channel == -1 else np.stack([out[channel]] * 3)


def erasing_area_share_loop(height: int, width: int, count: int, seed: int) -> list[float]:
    """Share of the picture that random erasing erases when it erases: draw area and ratio until the box fits."""
    rng = random.Random(seed)
    shares = []
    while len(shares) < count:
        area = rng.uniform(0.02, 0.4) * height * width
        ratio = rng.uniform(0.3, 1 / 0.3)
        box_height, box_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if box_height < height and box_width < width:
            shares.append(box_height * box_width / (height * width))
    return shares
