"""What reaches TensorBoard, MLflow and Weights & Biases, read back with their own readers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster import trackers as module
from cluster.stages.learning import Learning, follow, read_records
from cluster.stages.store import StageStore
from cluster.trackers import check_trackers, log_record, trackers
from tvilfm.config import Config, load_config
from tvilfm.terms import Record

RECORDS: list[Record] = [
    {"stage": "base", "step": 1, "epoch": 0, "loss": 3.0, "val_mAP": 0.25},
    {"stage": "text", "step": 2, "epoch": 0, "loss": 2.0, "val_mAP": 0.5},
]


def _config(folder: Path, *overrides: str) -> Config:
    config = load_config(Path("ray_config.yaml"), [f"run.dir={folder}", *overrides], size="tiny")
    config.run.path.mkdir(parents=True, exist_ok=True)
    return config


def _log(config: Config, group: str | None = None) -> None:
    with trackers(config, group=group) as opened:
        for record in RECORDS:
            log_record(opened, record)


def test_tensorboard_holds_every_epoch_once_even_when_a_run_went_on(tmp_path: Path) -> None:
    config = _config(tmp_path)
    _log(config)
    _log(config)
    events = EventAccumulator(str(config.run.path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("base/val_mAP")] == [(1, 0.25)]
    assert [(event.step, event.value) for event in events.Scalars("text/loss")] == [(2, 2.0)]


def test_mlflow_holds_parameters_metrics_and_how_the_run_ended(tmp_path: Path) -> None:
    config = _config(tmp_path, "run.trackers=[mlflow]")
    _log(config, group="ablations")
    with pytest.raises(RuntimeError), trackers(config, group="ablations"):
        raise RuntimeError("training failed")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ablations")
    failed, finished = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])
    assert (failed.info.status, finished.info.status) == ("FAILED", "FINISHED")
    assert finished.data.params["train.text.epochs"] == str(config.train.text.epochs)
    assert finished.data.metrics["text/val_mAP"] == 0.5


def test_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = _config(tmp_path, "run.trackers=[wandb]")
    _log(config)
    (folder,) = (config.run.path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    assert b"text/val_mAP" in file.read_bytes()


def test_a_tracker_that_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"run\.trackers: expected installed packages, got mlflow"):
        check_trackers(["mlflow"])
    check_trackers([])


def test_learning_is_told_once_in_order_across_stages_kills_and_half_written_lines(tmp_path: Path) -> None:
    config = _config(tmp_path, "train.base.epochs=2")
    store = StageStore(tmp_path / "stages", {"base": "b0", "text": "t0"})
    learning = Learning(store, config)
    assert learning.new() == []
    lines = [json.dumps({"epoch": epoch, "loss": 1.0}) + "\n" for epoch in range(2)]
    partial = store.partial("base") / "metrics.jsonl"
    partial.parent.mkdir(parents=True)
    partial.write_text(lines[0] + lines[1][:7])
    assert [record["step"] for record in learning.new()] == [1]
    partial.write_text("".join(lines[:1]))  # a resumed attempt drops what its checkpoint does not hold
    assert learning.new() == []
    partial.write_text("".join(lines))
    store.partial("base").rename(store.path("base"))
    text = store.path("text") / "metrics.jsonl"
    text.parent.mkdir()
    text.write_text(lines[0])
    assert [(record["stage"], record["step"]) for record in learning.new()] == [("base", 2), ("text", 3)]
    assert learning.new() == []

    heard: list[Record] = []
    with follow(Learning(store, config), heard.append):
        pass
    assert [record["step"] for record in heard] == [1, 2, 3]
    with pytest.raises(RuntimeError, match="no room"), follow(Learning(store, config), _no_room):
        pass


def test_learning_is_read_while_its_stage_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StageStore(tmp_path / "stages", {"base": "b0", "text": "t0"})
    store.partial("base").mkdir(parents=True)
    (store.partial("base") / "metrics.jsonl").write_text(json.dumps({"epoch": 0}) + "\n")

    def read_just_after(path: Path) -> list[Record]:
        if path.parent == store.partial("base"):
            path.parent.rename(store.path("base"))
        return read_records(path)

    monkeypatch.setattr("cluster.stages.learning.read_records", read_just_after)
    assert [record["step"] for record in Learning(store, _config(tmp_path)).records()] == [1]


def _no_room(record: Record) -> None:
    raise RuntimeError("no room")
