"""`fusion_sweep`: weightings a second of the free sweep, against evaluating the ensemble once a weighting.

SYSU-MM01's sizes: 3,803 infrared queries, ten draws of a gallery of 301, 2,048-d features. Both sides start from the
same cached raw features and give the same rank-1 and mAP; the baseline is the evaluator's ensemble case alone, not the
whole table and not a new process. Features are noisy copies of one random vector an identity, with noise that makes
the searches about as hard as the paper's: the sweep is faster the more often the modalities agree.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from benchmarks.claim import Claim
from tvilfm.config import EnsembleWeights, EvaluateSection
from tvilfm.data.manifest import CAPTION_SCHEMA, build_manifest, column
from tvilfm.evaluation.evaluator import Evaluator
from tvilfm.evaluation.features import FeatureTable
from tvilfm.evaluation.metrics import RankingMetrics, ranking_metrics
from tvilfm.evaluation.protocols import get_protocol
from tvilfm.evaluation.query_texts import draw_query_texts
from tvilfm.evaluation.weight_sweep import sweep_ensemble, weight_grid
from tvilfm.models import TVILFM, ModelSpec
from tvilfm.terms import PARTS

PROTOCOL = "sysu_mm01/all/single"
IDENTITIES, QUERIES, SHOWN, IMAGES_PER_CAMERA = 96, 3803, 301, 22
STEPS, CHECKED = 44, 5  # 1,036 weightings
# Infrared captions say nothing of the person: what they share with the visible ones is no part of these vectors.
SIGNAL = {"visible": 1.0, "infrared": 1.0, "text": 1.0, "filter": 0.0}
NOISE = {"visible": 3.8, "infrared": 5.4, "text": 5.8, "filter": 0.5}
GOAL = 50.0


def fusion_sweep() -> Claim:
    """Seconds of the whole sweep, and of one evaluation, in the same process; the sweep itself runs on one thread."""
    make_evaluator = sysu_sized_evaluator(np.random.default_rng(0))
    weights_WM = weight_grid(STEPS)
    started = time.perf_counter()
    swept = sweep_ensemble(make_evaluator(EnsembleWeights()), weights_WM)
    sweep_s = time.perf_counter() - started
    seconds, fault = [], None
    for row in np.linspace(0, len(weights_WM) - 1, CHECKED).astype(int):
        weights = EnsembleWeights(**dict(zip(PARTS, weights_WM[row].tolist(), strict=True)))
        started = time.perf_counter()
        draws = evaluate_ensemble(make_evaluator(weights))
        seconds.append(time.perf_counter() - started)
        for metric in ("rank1", "mAP"):
            slow = float(np.mean([getattr(draw, metric) for draw in draws]))
            if abs(slow - getattr(swept, metric)[row]) > 1e-4:  # some four of 38,030 rankings
                fault = (
                    f"{metric} of weighting {row} is {getattr(swept, metric)[row]:.6f}, the evaluator says {slow:.6f}"
                )
    evaluation_s = statistics.median(seconds)
    return Claim(
        name="fusion_sweep",
        ratio=evaluation_s * len(weights_WM) / sweep_s,
        goal=GOAL,
        ours=f"{len(weights_WM) / sweep_s:.1f} weightings/s, {len(weights_WM)} in {sweep_s:.1f} s "
        f"(rank-1 {100 * swept.rank1[swept.best_row]:.1f} at best)",
        baseline=f"{1 / evaluation_s:.2f} weightings/s, {evaluation_s:.2f} s an evaluation of the ensemble on "
        f"{torch.get_num_threads()} threads",
        fault=fault,
    )


def evaluate_ensemble(evaluator: Evaluator) -> list[RankingMetrics]:
    """What `Evaluator.evaluate` does for one row of its table, the ensemble with a witness description."""
    protocol = get_protocol(PROTOCOL)
    query, texts = evaluator.query(protocol), evaluator.texts(protocol, "witness")
    assert texts is not None and len(texts.kept) == query.num_rows
    parts = evaluator.part_vectors(query, texts)
    draws = []
    for trial in range(protocol.num_trials):
        gallery = evaluator.gallery(protocol, trial)
        similarity_QG = evaluator.ensemble_similarity(parts, gallery)(slice(None))
        labels = (column(table, name) for name in ("pid", "camid") for table in (query, gallery))
        draws.append(ranking_metrics(similarity_QG, *labels, protocol=protocol.dataset))
    return draws


def sysu_sized_evaluator(rng: np.random.Generator) -> Callable[[EnsembleWeights], Evaluator]:
    """Evaluators, one for each weighting, of a test split with SYSU-MM01's numbers of queries and gallery images."""
    rows: list[dict[str, Any]] = []
    for place in np.sort(rng.permutation(IDENTITIES * 4)[:SHOWN]):
        pid, camid = int(place) // 4, (1, 2, 4, 5)[place % 4]
        rows += [_row(pid, camid, n, "visible", "gallery") for n in range(IMAGES_PER_CAMERA)]
    for n, pid in enumerate(rng.integers(0, IDENTITIES, QUERIES).tolist()):
        rows.append(_row(pid, int(rng.choice([3, 6])), n, "infrared", "query"))
    manifest = build_manifest(rows)
    captions = [
        {"image": row["image"], "caption": f"{row['modality']} {row['image']}", "rephrased": None} for row in rows
    ]
    captions_table = pa.Table.from_pylist(captions, schema=CAPTION_SCHEMA)
    spec = ModelSpec(backbone="resnet50", num_classes=8, text_width=64, text_layers=1, text_heads=1)
    pids = [int(row["pid"]) for row in rows]
    person_ID = rng.standard_normal((IDENTITIES, spec.dim), dtype=np.float32)

    def features(keys: list[str], kinds: list[str]) -> FeatureTable:
        noise, signal = (np.array([of[kind] for kind in kinds], dtype=np.float32)[:, None] for of in (NOISE, SIGNAL))
        vectors_ND: npt.NDArray[np.float32] = rng.standard_normal((len(keys), spec.dim), dtype=np.float32) * noise
        return FeatureTable(keys=tuple(keys), vectors_ND=vectors_ND + signal * person_ID[pids])

    modalities = [row["modality"] for row in rows]
    images = features([row["image"] for row in rows], modalities)
    texts = features(
        [row["caption"] for row in captions], ["text" if kind == "visible" else "filter" for kind in modalities]
    )
    model = TVILFM(spec).eval()

    def make(weights: EnsembleWeights) -> Evaluator:
        section = EvaluateSection(protocols=(PROTOCOL,), text_sources=("witness",), ensemble=weights)
        query_texts = draw_query_texts(manifest, captions_table, section, seed=0)
        return Evaluator(model, manifest, query_texts, images, texts, section, filter_text=True)

    return make


def _row(pid: int, camid: int, number: int, modality: str, split: str) -> dict[str, Any]:
    image = f"cam{camid}/{pid:04d}/{number:04d}.jpg"
    return {"image": image, "pid": pid, "camid": camid, "modality": modality, "split": split}


CLAIMS = {"fusion_sweep": fusion_sweep}
