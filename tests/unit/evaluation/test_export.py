"""Exported models: the parts compute what the model computes, and rank as it ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.untrained_run import UntrainedRun
from tvilfm.data.captions import texts_of
from tvilfm.data.manifest import select
from tvilfm.data.pixels import decode_files
from tvilfm.data.tokens import tokenize
from tvilfm.data.transforms import normalise
from tvilfm.datasets.caption_files import read_captions
from tvilfm.models import TVILFM
from tvilfm.models.export import export_model
from tvilfm.models.opening import open_model
from tvilfm.retrieval.find import find

PARTS = ("visible", "infrared", "text", "head", "base_head")


def test_onnx_parts_rank_as_the_model_does(untrained_run: UntrainedRun, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    opened = open_model(untrained_run.config.run.path)
    parity = export_model(opened, tmp_path / "onnx", "onnx")
    assert [one.part for one in parity] == list(PARTS)
    assert all(one.cosine > 0.99999 and one.difference < 1e-4 for one in parity)
    sessions = {name: onnxruntime.InferenceSession(tmp_path / "onnx" / f"{name}.onnx") for name in PARTS}

    def run(name: str, inputs: np.ndarray) -> np.ndarray:
        return np.asarray(sessions[name].run(None, {"inputs": inputs})[0])

    def images(names: list[str]) -> np.ndarray:
        pixels = decode_files(untrained_run.root, names, height=opened.height, width=opened.width)
        return normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()

    gallery = select(untrained_run.manifest, split="gallery", modality="visible")["image"].to_pylist()
    query = select(untrained_run.manifest, split="query", modality="infrared")["image"].to_pylist()[0]
    captions = read_captions(untrained_run.manifest, untrained_run.root, None)
    (sentence,), _ = texts_of(captions, gallery[:1])
    (filter_text,), _ = texts_of(captions, [query])

    infrared = run("infrared", images([query]))
    text = run("text", tokenize([sentence, filter_text], pad_to_context=True).numpy())
    fusion = infrared + text[:1] - text[1:]
    vectors = sum(run("head", raw) for raw in (infrared, text[:1], fusion))
    scores = (vectors @ run("head", run("visible", images(gallery))).T)[0]

    folder = tmp_path / "crops"
    for name in gallery:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((untrained_run.root / name).read_bytes())
    ranking, _ = find(
        opened,
        folder,
        images=[untrained_run.root / query],
        sentence=sentence,
        infrared_caption=filter_text,
        count=len(gallery),
    )
    expected = {one.path: one.score for one in ranking}
    np.testing.assert_allclose(scores, [expected[name] for name in gallery], atol=1e-4)
    assert [gallery[row] for row in np.argsort(-scores, kind="stable")[:3]] == [one.path for one in ranking[:3]]


def test_torchscript_parts_take_any_batch(untrained_run: UntrainedRun, tmp_path: Path) -> None:
    parity = export_model(open_model(untrained_run.config.run.path), tmp_path / "scripts", "torchscript")
    assert [one.part for one in parity] == list(PARTS)  # compared at other batch sizes than the traced one
    assert all(one.difference < 1e-5 for one in parity)
    assert {path.stem for path in (tmp_path / "scripts").glob("*.pt")} == set(PARTS)


def test_a_hub_folder_keeps_weights_settings_and_results(untrained_run: UntrainedRun, tmp_path: Path) -> None:
    run = untrained_run.config.run.path
    opened = open_model(run)
    assert all(one.difference == 0 for one in export_model(opened, tmp_path / "hub", "hub-folder"))
    again = open_model(tmp_path / "hub")
    assert again.settings == opened.settings and again.reported == ()
    weights = again.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in opened.model.state_dict().items())
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "Training data: synthetic." in card and "## What it must not be used for" in card
    assert json.loads((tmp_path / "hub" / "settings.json").read_text())["height"] == opened.height


def test_a_model_without_a_text_tower_has_no_text_part(untrained_run: UntrainedRun, tmp_path: Path) -> None:
    spec = {**untrained_run.model.spec.__dict__, "with_text": False}
    TVILFM(type(untrained_run.model.spec)(**spec)).save_pretrained(tmp_path / "base")
    parity = export_model(open_model(tmp_path / "base"), tmp_path / "out", "safetensors")
    assert [one.part for one in parity] == ["visible", "infrared", "head", "base_head"]


def test_an_existing_folder_and_missing_packages_are_refused(
    untrained_run: UntrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(untrained_run.config.run.path)
    with pytest.raises(ValueError, match="--out: expected a folder that does not exist"):
        export_model(opened, tmp_path, "safetensors")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install 'tvilfm\[export\]'"):
        export_model(opened, tmp_path / "new", "onnx")
    assert not (tmp_path / "new").exists()
