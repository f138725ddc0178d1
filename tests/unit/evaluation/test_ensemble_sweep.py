"""The free sweep against the evaluator itself, weighting by weighting, with ties, ignored cameras and lost queries."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from tvilfm.config import EnsembleWeights, EvaluateSection
from tvilfm.data.manifest import CAPTION_SCHEMA, build_manifest
from tvilfm.evaluation import weight_sweep as ensemble_sweep
from tvilfm.evaluation.evaluator import Evaluator, default_case
from tvilfm.evaluation.features import FeatureTable
from tvilfm.evaluation.query_texts import draw_query_texts
from tvilfm.evaluation.weight_sweep import SweepResult, sweep_ensemble, weight_grid
from tvilfm.models import TVILFM, ModelSpec
from tvilfm.sweeps.space import written
from tvilfm.terms import PARTS

PROTOCOLS = ("sysu_mm01/all/single", "sysu_mm01/indoor/multi", "llcm/infrared-visible", "regdb/infrared-visible")
METRICS = ("rank1", "mAP", "mINP")


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of one match fall into several runs."""
    monkeypatch.setattr(ensemble_sweep, "_RUN", 4)


@pytest.fixture(scope="module")
def manifest() -> pa.Table:
    """Five people on six cameras, three images each; of the last only camera 2 has a visible image."""
    rows = []
    for pid in range(5):
        for camid in range(1, 7):
            modality = "infrared" if camid in (3, 6) else "visible"
            if pid == 4 and modality == "visible" and camid != 2:
                continue
            for n in range(3):
                image = f"cam{camid}/{pid}/{n}.jpg"
                rows.append({"image": image, "pid": pid, "camid": camid, "modality": modality, "split": "val"})
    return build_manifest(rows)


@pytest.fixture(scope="module")
def captions(manifest: pa.Table) -> pa.Table:
    rows = [{"image": name, "caption": f"of {name}", "rephrased": None} for name in manifest["image"].to_pylist()]
    return pa.Table.from_pylist(rows, schema=CAPTION_SCHEMA)


@pytest.fixture(scope="module")
def model() -> TVILFM:
    torch.manual_seed(0)
    return TVILFM(ModelSpec(backbone="resnet18_half", num_classes=4, text_width=8, text_layers=1, text_heads=2)).eval()


def make_evaluator(
    model: TVILFM,
    manifest: pa.Table,
    captions: pa.Table,
    weights: EnsembleWeights,
    *,
    protocol: str = PROTOCOLS[0],
    axes: int | None = None,
) -> Evaluator:
    """Random features, or with `axes` one of so many axes each, so that similarities are few and ties are exact."""
    rng = np.random.default_rng(0)

    def features(keys: list[str]) -> FeatureTable:
        if axes is None:
            vectors = rng.standard_normal((len(keys), model.spec.dim)).astype(np.float32)
        else:
            vectors = np.eye(model.spec.dim, dtype=np.float32)[rng.integers(0, axes, len(keys))]
        return FeatureTable(keys=tuple(keys), vectors_ND=vectors)

    section = EvaluateSection(protocols=(protocol,), text_sources=("witness",), ensemble=weights)
    images, texts = (features(table) for table in (manifest["image"].to_pylist(), captions["caption"].to_pylist()))
    query_texts = draw_query_texts(manifest, captions, section, seed=0, splits=("val",))
    return Evaluator(model, manifest, query_texts, images, texts, section, filter_text=True, split="val")


def by_the_evaluator(evaluator: Evaluator) -> list[float]:
    case = default_case(evaluator.evaluate(only_default=True), evaluator.section, "ensemble")
    assert case is not None
    return [float(np.mean([getattr(trial, metric) for trial in case.trials])) for metric in METRICS]


@pytest.mark.parametrize("temperature", [None, 0.1])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_weighting_scores_as_the_evaluator_scores_it(
    model: TVILFM,
    manifest: pa.Table,
    captions: pa.Table,
    protocol: str,
    temperature: float | None,
) -> None:
    weightings = np.random.default_rng(1).dirichlet([1, 1, 1], 4)
    options = {"manifest": manifest, "captions": captions, "protocol": protocol}
    swept = sweep_ensemble(
        make_evaluator(model, weights=EnsembleWeights(temperature=temperature), **options), weightings
    )
    for row, weighting in enumerate(weightings):
        weights = EnsembleWeights(**dict(zip(PARTS, weighting, strict=True)), temperature=temperature)
        expected = by_the_evaluator(make_evaluator(model, weights=weights, **options))
        assert [getattr(swept, metric)[row] for metric in METRICS] == pytest.approx(expected, abs=1e-12)
    assert len(set(swept.mAP.tolist())) > 1  # random features that tell the weightings apart


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ties_fall_as_the_evaluator_lets_them_fall(
    model: TVILFM, manifest: pa.Table, captions: pa.Table, protocol: str
) -> None:
    # Sums of these weights and similarities are exact, so ties between different votes are ties on both sides.
    weightings = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.0), (0.25, 0.75, 0.0)]
    options = {"manifest": manifest, "captions": captions, "protocol": protocol, "axes": 3}
    swept = sweep_ensemble(make_evaluator(model, weights=EnsembleWeights(), **options), weightings)
    for row, weighting in enumerate(weightings):
        weights = EnsembleWeights(**dict(zip(PARTS, weighting, strict=True)))
        expected = by_the_evaluator(make_evaluator(model, weights=weights, **options))
        assert [getattr(swept, metric)[row] for metric in METRICS] == pytest.approx(expected, abs=1e-12)


def test_the_grid_is_every_share_once_with_equal_weights_first() -> None:
    grid = weight_grid(4)
    assert len(grid) == 1 + 15
    assert grid[0].tolist() == [1, 1, 1]
    np.testing.assert_allclose(grid[1:].sum(axis=1), 1)
    assert len({tuple(row) for row in (4 * grid[1:]).tolist()}) == 15
    assert {tuple(row) for row in np.eye(3).tolist()} <= {tuple(row) for row in grid.tolist()}


def test_the_best_of_equals_is_the_one_nearest_to_equal_weights() -> None:
    values = np.array([0.4, 0.5, 0.5, 0.5])
    weights = np.array([(1, 1, 1), (1, 0, 0), (4, 3, 3), (0, 1, 1)], dtype=np.float64)
    swept = SweepResult(metric="mAP", weights_WM=weights, rank1=values[::-1], mAP=values, mINP=values)
    assert swept.best == {"infrared": 4, "text": 3, "fusion": 3}
    assert dataclasses.replace(swept, metric="rank1").best_row == 0


def test_chosen_weights_survive_the_command_line_bit_for_bit() -> None:
    for weighting in weight_grid(50)[:200].tolist():
        overrides = written({f"evaluate.ensemble.{name}": w for name, w in zip(PARTS, weighting, strict=True)})
        assert [yaml.safe_load(override.partition("=")[2]) for override in overrides] == weighting


@pytest.mark.parametrize("weights", [[(1.0, 1.0)], [(0.0, 0.0, 0.0)], [(1.0, -1.0, 1.0)], np.empty((0, 3))])
def test_weights_that_are_none_are_refused(
    model: TVILFM, manifest: pa.Table, captions: pa.Table, weights: object
) -> None:
    with pytest.raises(ValueError, match=r"^weights_WM: expected"):
        sweep_ensemble(make_evaluator(model, manifest, captions, EnsembleWeights()), weights)  # type: ignore[arg-type]


def test_a_protocol_without_texts_is_refused(model: TVILFM, manifest: pa.Table, captions: pa.Table) -> None:
    evaluator = make_evaluator(model, manifest, captions, EnsembleWeights(), protocol="regdb/visible-infrared")
    with pytest.raises(ValueError, match=r"^evaluate\.default_text_source: expected .* got witness"):
        sweep_ensemble(evaluator, weight_grid(2))


def test_a_gallery_without_any_match_is_refused(model: TVILFM, manifest: pa.Table, captions: pa.Table) -> None:
    # Camera 3 ignores camera 2, the only one that shows the last person.
    rows = [row for row in manifest.to_pylist() if row["pid"] == 4 and row["camid"] != 6]
    with pytest.raises(ValueError, match=r"^query: expected at least one identity that is in the gallery"):
        sweep_ensemble(make_evaluator(model, build_manifest(rows), captions, EnsembleWeights()), weight_grid(1))
