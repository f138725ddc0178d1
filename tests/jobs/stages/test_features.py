"""Extraction on Ray equals the plain call, row for row, whatever the number of actors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cluster.stages.extraction import Encoder, image_chunks, text_chunks, write_features, write_views
from tvilfm.config import ClusterSection
from tvilfm.evaluation.features import FeatureTable
from tvilfm.models import TVILFM, ModelSpec

NUM_IMAGES, CHUNK = 23, 8
TEXTS = [f"a man in a {colour} coat with {n} bags" for n in range(3) for colour in ("red", "dark blue")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("features")
    torch.manual_seed(0)
    spec = ModelSpec(backbone="resnet18_half", num_classes=4, text_width=32, text_layers=1, text_heads=2)
    model = TVILFM(spec).eval()
    for module in model.modules():  # a fresh BN does nothing; a moved one shows whether it was loaded
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    model.save_pretrained(folder / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 32, 16, 3), dtype=np.uint8)
    np.save(folder / "pixels.npy", pixels)
    return SimpleNamespace(folder=folder, model=folder / "model", pixels=folder / "pixels.npy")


def _pool(lab: SimpleNamespace, workers: int) -> dict[str, object]:
    return {
        "model": lab.model,
        "pixels": lab.pixels,
        "pad": 2,
        "seed": 5,
        "section": ClusterSection(extract_workers=workers),
        "chunk_size": CHUNK,
    }


@pytest.mark.slow
def test_features_of_the_job_equal_the_plain_call(lab: SimpleNamespace, ray_session: None, tmp_path: Path) -> None:
    visible, infrared = list(range(0, 15)), list(range(15, NUM_IMAGES))
    names = {"visible": [f"v{row}" for row in visible], "infrared": [f"i{row}" for row in infrared]}
    images = {"visible": (names["visible"], visible), "infrared": (names["infrared"], infrared)}
    write_features(tmp_path, images, TEXTS, **_pool(lab, workers=2))

    plain = Encoder(lab.model, lab.pixels, pad=2, seed=5, cuda=False)
    found = FeatureTable.read(tmp_path / "images.parquet")
    assert found.keys == tuple(names["visible"] + names["infrared"])
    for modality, rows in (("visible", visible), ("infrared", infrared)):
        chunks = image_chunks(modality, rows, modality, size=CHUNK)
        expected = np.concatenate([plain.encode(chunk) for chunk in chunks])
        np.testing.assert_array_equal(found.select(names[modality]), expected)
    texts = FeatureTable.read(tmp_path / "texts.parquet")
    expected = np.concatenate([plain.encode(chunk) for chunk in text_chunks("text", TEXTS, size=CHUNK)])
    np.testing.assert_array_equal(texts.select(TEXTS), expected)


def test_a_view_of_an_image_is_the_same_in_any_chunk(lab: SimpleNamespace) -> None:
    encoder = Encoder(lab.model, lab.pixels, pad=2, seed=5, cuda=False)

    def encode(rows: list[int], size: int) -> np.ndarray:
        chunks = image_chunks("", rows, "visible", size=size, recipe="visible", view=1)
        return np.concatenate([encoder.encode(chunk) for chunk in chunks])

    rows = list(range(10))
    whole = encode(rows, 10)
    np.testing.assert_allclose(encode(rows, 3), whole, atol=1e-5)
    np.testing.assert_allclose(encode(rows[::-1], 4)[::-1], whole, atol=1e-5)
    assert np.abs(encode([0, 0], 2) - encode([0, 1], 2))[1].max() > 1e-3


@pytest.mark.slow
def test_cached_views_equal_the_plain_call_and_differ_from_each_other(
    lab: SimpleNamespace, ray_session: None, tmp_path: Path
) -> None:
    rows = {"visible": list(range(10)), "infrared": list(range(10, NUM_IMAGES))}
    images = {"visible": (["a", "b"], [2, 0]), "infrared": (["c"], [20])}
    write_views(tmp_path, rows, 2, images, **_pool(lab, 2))  # type: ignore[arg-type]

    plain = Encoder(lab.model, lab.pixels, pad=2, seed=5, cuda=False)
    for recipe, of_recipe in rows.items():
        views = np.load(tmp_path / f"{recipe}.npy")
        assert views.shape == (2, len(of_recipe), 256)
        for view in range(2):
            chunks = image_chunks("", of_recipe, recipe, size=CHUNK, recipe=recipe, view=view)
            expected = np.concatenate([plain.encode(chunk) for chunk in chunks])
            np.testing.assert_array_equal(views[view], expected)
        assert not np.array_equal(views[0], views[1])
    found = FeatureTable.read(tmp_path / "images.parquet")
    for modality, (names, of_images) in images.items():
        (chunk,) = image_chunks("", of_images, modality, size=CHUNK)
        np.testing.assert_array_equal(found.select(names), plain.encode(chunk))
