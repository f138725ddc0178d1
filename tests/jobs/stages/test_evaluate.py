"""A trained model meets other data: `tvilfm evaluate MODEL data.name=... data.root=...`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.cli.app import main
from cluster.places.finished import finished_run
from tests.untrained_run import UntrainedRun
from tvilfm.config import load_run
from tvilfm.datasets.synthetic.layouts import Size, write_layout
from tvilfm.models import TVILFM, ModelSpec
from tvilfm.models.opening import open_model
from tvilfm.models.released import released_state_dict

QUICK = ("cluster.extract_workers=1", "evaluate.batch=8")
SIZE = Size(train=2, val=1, test=3, images_per_camera=1)


def _evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tvilfm", "evaluate", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.mark.slow
def test_a_runs_model_on_a_copy_of_its_data_has_the_runs_numbers_and_trains_nothing(
    untrained_run: UntrainedRun, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(untrained_run.root, tmp_path / "data")
    model = shutil.copytree(
        untrained_run.config.run.path, tmp_path / "runs" / "site", ignore=shutil.ignore_patterns("gallery")
    )
    arguments = (str(model), "data.name=sysu_mm01", f"data.root={data}", *QUICK)
    assert _evaluate(monkeypatch, *arguments) == 0
    path = tmp_path / "runs" / "site-on-sysu_mm01"
    stages = json.loads((path / "run.json").read_text())["stages"]
    assert list(stages) == ["pixels", "trained", "features", "results", "report"]
    rows = {
        (row["query"], row["text_source"], row["protocol"]): row["mAP"]
        for row in json.loads((path / "results.json").read_text())["rows"]
    }
    for case in untrained_run.evaluator.evaluate():
        expected = np.mean([trial.mAP for trial in case.trials])
        assert rows[case.query, case.text_source, case.protocol] == pytest.approx(expected, abs=1e-3)
    page = (path / "report" / "index.html").read_text()
    assert "Nothing was trained" in page and "It was trained on synthetic." in page
    assert finished_run(load_run(path)).model == path / stages["trained"] / "model"
    assert open_model(path).model.spec == untrained_run.model.spec


@pytest.mark.slow
def test_a_released_file_is_evaluated_on_a_dataset_by_one_command(
    ray_session: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_layout(tmp_path / "data", SIZE, seed=1, layout="sysu_mm01")
    torch.manual_seed(0)
    spec = ModelSpec(backbone="resnet50", num_classes=20, text_width=64, text_layers=2, text_heads=1)
    state = released_state_dict(TVILFM(spec), stage="text")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "released.pth")
    monkeypatch.chdir(tmp_path)  # no ray_config.yaml here
    assert _evaluate(monkeypatch, "released.pth", "data.name=sysu_mm01", f"data.root={tmp_path / 'data'}", *QUICK) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the prefix 'module.' was removed" in printed and "training data are not recorded" in printed
    results = json.loads((tmp_path / "runs" / "released-on-sysu_mm01" / "results.json").read_text())
    assert {row["query"] for row in results["rows"]} == {"infrared", "text", "fusion", "ensemble"}


@pytest.mark.slow
def test_a_model_without_a_text_tower_is_evaluated_by_infrared_alone(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout(tmp_path / "data", SIZE, seed=1, layout="regdb")
    spec = ModelSpec(
        backbone="resnet18_half", num_classes=4, text_width=8, text_layers=1, text_heads=2, with_text=False
    )
    TVILFM(spec).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    settings = ("data.name=regdb", "data.root=data", "data.height=48", "data.width=24", *QUICK)
    assert _evaluate(monkeypatch, "model", *settings) == 0
    results = json.loads((tmp_path / "runs" / "model-on-regdb" / "results.json").read_text())
    assert {row["query"] for row in results["rows"]} == {"infrared", "visible"}


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint.pth").touch()
    for arguments, message in (
        ((str(tmp_path / "checkpoint.pth"),), "expected the dataset to evaluate this model on"),
        ((str(tmp_path / "absent"),), "expected section.key=value or the folder of a run"),
        ((str(tmp_path / "absent"), "data.name=regdb", "data.root=/nowhere"), "regdb"),
    ):
        assert _evaluate(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
