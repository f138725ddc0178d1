"""Sweeps end to end: every space, a scheduler that stops, a trial that fails, and a driver that is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml

from cluster import sweep as tune
from cluster import trial as trial_module
from cluster.sweep import SPACES, report_sweep, sweep_space
from tests.quick import QUICK, ROWS, copy_stages, records_of, space_of
from tvilfm.evaluation.results import Results
from tvilfm.sweeps.plan import Sweep
from tvilfm.sweeps.results import TrialRecord, read_trials
from tvilfm.sweeps.space import Space, Trial, load_space

CONFIG = Path("ray_config.yaml")
SHORT = (
    "model.weights=random",  # no pre-training
    "cluster.cpus_per_train_worker=1",
    "cluster.extract_workers=1",
    "train.base.epochs=1",
    "train.base.milestones=[]",
    "train.text.epochs=2",
    "train.text.milestones=[]",
)
CAPTIONS = "caption.source=files"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that let the sweeps of this file share a dataset and all stages that they have in common."""
    folder = tmp_path_factory.mktemp("sweeps")
    return (*SHORT, f"run.dir={folder}", f"run.stages_dir={folder / 'stages'}")


def _sweep(space: Space, name: str, overrides: tuple[str, ...]) -> tuple[Path, list[TrialRecord]]:
    folder = sweep_space(space, name=name, config_path=CONFIG, overrides=overrides, size="tiny")
    return folder, read_trials(folder / "trials.jsonl")


def _one_trial(space: Space) -> Space:
    """The space cut down to a single trial: its reference row, or the first value of every parameter."""
    values: dict[str, Any] = space.model_dump(exclude_none=True)
    values["seeds"] = [space.seeds[0]]
    if space.rows:
        values["rows"] = {space.reference: values["rows"][space.reference]}
    if space.searcher != "grid":
        values["budget"] = {"num_samples": 1}
    for parameter in values.get("parameters", {}).values():
        if "choices" in parameter:
            parameter["choices"] = parameter["choices"][:1]
        if "settings" in parameter:
            parameter["settings"] = dict(list(parameter["settings"].items())[:1])
    return Space.model_validate(values)


def _bare_records(sweep: Sweep, *, name: str, status: tune.Status, **_: object) -> list[TrialRecord]:
    """In place of those of trials that ran."""
    return [TrialRecord(name=name, setting="", seed=0, query="fusion", status=status)]


# One space for each way to describe trials. The others differ in parameters and are searched as in
# test_asha_stops_bad_trials; tests/unit/sweeps resolves the trials of all.
@pytest.mark.parametrize("name", ["ablations", "fusion", "text_source"])
def test_a_space_runs_and_reports(name: str, shared: tuple[str, ...], ray_session: None) -> None:
    space = _one_trial(load_space(SPACES / f"{name}.yaml"))
    varied = "caption.source" in space.parameters
    folder, records = _sweep(space, name, shared if varied else (*shared, CAPTIONS))
    (record,) = records
    assert record.status == "done", record.reason
    results = Results.read(folder / "trials" / record.name / "results.json")
    (row,) = (row for row in results.default_rows if row.query == record.query)
    assert record.metrics["mAP"] == row.mAP
    assert {step["stage"] for step in record.learning} == {"base", "text"}
    if space.free_steps:
        config = yaml.safe_load((folder / "trials" / record.name / "config.yaml").read_text())
        assert {part: config["evaluate"]["ensemble"][part] for part in record.chosen} == record.chosen
    report_sweep(folder)
    assert record.setting in (folder / "report" / "table.csv").read_text()


@pytest.mark.long
def test_asha_stops_bad_trials_and_their_epochs_show_it(shared: tuple[str, ...], ray_session: None) -> None:
    space = Space.model_validate(
        {
            "name": "rates",
            "description": "a rate that learns and rates that cannot",
            "searcher": "optuna",
            "scheduler": {"name": "asha", "stage": "text", "grace": 0.1, "reduction_factor": 4},
            "budget": {"num_samples": 3, "max_concurrent": 1},
            "parameters": {"optim.text_lr": {"loguniform": [1e-9, 1e-2]}},
        }
    )
    # Looked at after epochs 4 and 16: a worker trains for some seconds more before it learns of the stop.
    _, records = _sweep(space, "rates", (*shared, CAPTIONS, "train.text.epochs=40"))
    epochs = {record.name: len(record.learning) for record in records}
    stopped = [record for record in records if record.status == "stopped"]
    assert len(records) == 3 and stopped
    # One epoch of base, and as many of text as were trained before the stop arrived.
    assert all(epochs[record.name] < 1 + 40 and not record.metrics for record in stopped), epochs
    assert all(epochs[record.name] == 1 + 40 for record in records if record.status == "done"), epochs


@pytest.mark.parametrize(("fault", "at_first"), [("raises", "failed"), ("dies", "done")])
def test_a_trial_whose_process_died_starts_again_and_one_that_raised_an_error_only_when_resumed(
    fault: str, at_first: str, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_at_first(params: dict[str, Any], *, sweep: Sweep) -> None:
        mark = sweep.folder / ray.tune.get_context().get_trial_id()

        def run_(sweep: Sweep, _: Trial) -> dict[str, float]:
            if not mark.exists():
                mark.touch()
                if fault == "dies":
                    os._exit(1)
                raise ValueError("a full disk")
            return {sweep.space.metric: params["optim.text_lr"]}

        (sweep.folder / "trials" / mark.name).mkdir(parents=True, exist_ok=True)
        trial_module._run = run_
        trial_module.run_trial(params, sweep=sweep)

    monkeypatch.setattr(tune, "run_trial", fails_at_first)
    monkeypatch.setattr(tune, "_records", _bare_records)
    where = {"config_path": CONFIG, "overrides": [f"run.dir={tmp_path}", CAPTIONS], "size": "tiny"}
    values = {"searcher": "optuna", "budget": {"num_samples": 2}, "parameters": {"optim.text_lr": [1e-3, 1e-2]}}
    space = Space.model_validate({"name": "rates", "description": "trials that fail at first", **values})
    first, resumed = (
        read_trials(sweep_space(space, name="rates", resume=resume, **where) / "trials.jsonl")
        for resume in (False, True)
    )
    assert [record.status for record in first] == [at_first] * 2
    assert resumed == [replace(record, status="done") for record in first]  # under the names that they had


@pytest.mark.long
def test_a_killed_sweep_goes_on_and_ends_with_the_table_of_the_unbroken_one(
    undisturbed: Path, tiny_benchmark: Path, tmp_path: Path
) -> None:
    unbroken = records_of(undisturbed)
    assert unbroken["broken"].status == "failed"
    assert "model.text.weights: expected" in unbroken["broken"].reason
    assert [unbroken[name].status for name in ROWS if name != "broken"] == ["done"] * 3

    path = tmp_path / "rows.yaml"
    path.write_text(yaml.safe_dump(space_of(*ROWS)))
    stages = tmp_path / "stages"
    copy_stages(undisturbed, stages)
    command = [sys.executable, "-m", "cluster", "tune", str(path), "--size", "tiny", *QUICK]
    command += [f"run.dir={tmp_path}", f"run.stages_dir={stages}", f"data.root={tiny_benchmark}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 400
    ended = tmp_path / "rows" / "ended.jsonl"
    # One run is done, and another is in its text stage.
    while not (ended.exists() and '"done"' in ended.read_text() and any(stages.glob("text-*.partial/metrics.jsonl"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = {folder.name for folder in stages.glob("[!.]*") if not folder.name.endswith(".partial")}
    times = {name: (stages / name).stat().st_mtime_ns for name in made}

    resumed = subprocess.run(
        [*command, "--resume"], check=False, capture_output=True, text=True, timeout=400, env=environment
    )
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert {name: (stages / name).stat().st_mtime_ns for name in made} == times, "a finished stage was made again"
    records = records_of(tmp_path / "rows")
    assert {setting: (record.status, record.metrics) for setting, record in records.items()} == {
        setting: (record.status, record.metrics) for setting, record in unbroken.items()
    }


def _prepared(space: Space, folder: Path) -> Sweep:
    """A sweep of the space as its trials see it."""
    folder.mkdir(parents=True)
    shutil.copy(CONFIG, folder / "ray_config.yaml")
    return Sweep(folder=folder, stages=folder / "stages", space=space, overrides=(CAPTIONS,), size="tiny")


@pytest.mark.parametrize("name", ["12345678", "0000-seed0"])
def test_a_trial_keeps_its_name_and_its_folder_whatever_yaml_makes_of_them(name: str, tmp_path: Path) -> None:
    sweep = _prepared(load_space(SPACES / "ablations.yaml"), tmp_path / "lr: 1 #2")
    run = sweep.config(replace(sweep.space.trials()[0], name=name)).run
    assert (run.name, run.dir, run.stages_dir) == (name, sweep.folder / "trials", sweep.stages)


@pytest.mark.parametrize(
    ("ended", "message"),
    [
        (0, r"expected 5 runs to end, got 0, without 0000-seed0, 0001-seed0, 0002-seed0, \.\.\.\. Continue with"),
        (4, r"expected 5 runs to end, got 4, without 0004-seed0\. Continue with --resume; `tvilfm report .*/rates`"),
    ],
)
def test_a_sweep_that_ended_early_keeps_its_table_and_does_not_pass_for_a_finished_one(
    ended: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{number:04d}-seed0" for number in range(ended)]

    def interrupted(sweep: Sweep, *_: object, **__: object) -> SimpleNamespace:
        ends = [{"name": name, "params": {"trial": name}, "status": "failed", "reason": ""} for name in names]
        lines = "".join(json.dumps(end) + "\n" for end in ends)
        return SimpleNamespace(fit=lambda: (sweep.folder / "ended.jsonl").write_text(lines) if lines else None)

    monkeypatch.setattr(tune, "_tuner", interrupted)
    monkeypatch.setattr(tune, "_records", _bare_records)
    monkeypatch.setattr(tune, "make_synthetic", lambda *_: None)
    monkeypatch.setattr(tune, "session", lambda _: nullcontext())
    monkeypatch.setattr(tune, "require_room", lambda _: None)
    rows = {f"{rate}": {"overrides": {"optim.text_lr": rate}} for rate in (0.1, 0.2, 0.3, 0.4, 0.5)}
    values = {"name": "rates", "description": "five rates", "reference": "0.1", "rows": rows}
    with pytest.raises(ValueError, match=message):
        _sweep(Space.model_validate(values), "rates", (f"run.dir={tmp_path}", CAPTIONS))
    assert [record.name for record in read_trials(tmp_path / "rates" / "trials.jsonl")] == names
    report_sweep(tmp_path / "rates")

    limited = Space.model_validate({**values, "budget": {"time_limit_s": 60}})
    _sweep(limited, "limited", (f"run.dir={tmp_path}", CAPTIONS))
    assert f"expected 5 runs to end, got {ended}" in capsys.readouterr().err


def test_the_line_of_an_ended_run_says_the_time_left_and_the_best_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 600.0, 1200.0])
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    sweep = _prepared(load_space(SPACES / "ablations.yaml"), tmp_path / "sweep")
    ends, total, metric = tune._Ends(sweep), sweep.num_runs(), sweep.space.metric

    def ended(name: str, value: float) -> SimpleNamespace:
        result = {metric: value, tune.DONE: True}
        return SimpleNamespace(config={"trial": name}, trial_id=name, last_result=result, is_finished=lambda: True)

    first, second = ended("a", 0.5), ended("b", 0.25)
    for trials in ([first], [first, second]):
        ends.on_trial_complete(0, trials, trials[-1])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"a: done; {total - 1} left, about {10 * (total - 1)} min; best {metric} 50.00 in a"
    assert lines[1] == f"b: done; {total - 2} left, about {10 * (total - 2)} min; best {metric} 50.00 in a"


def test_ctrl_c_ends_a_sweep_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        assert os.environ["TUNE_DISABLE_SIGINT_HANDLER"] == "1"  # else Tune returns as if the sweep were finished
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "_tuner", lambda *_, **__: SimpleNamespace(fit=interrupt))
    monkeypatch.setattr(tune, "make_synthetic", lambda *_: None)
    monkeypatch.setattr(tune, "session", lambda _: nullcontext())
    monkeypatch.setattr(tune, "require_room", lambda _: None)
    with pytest.raises(KeyboardInterrupt, match="continue with --resume"):
        _sweep(_one_trial(load_space(SPACES / "ablations.yaml")), "ablations", (f"run.dir={tmp_path}", CAPTIONS))


def test_a_trial_without_its_captions_is_a_row_of_the_table_like_another(tmp_path: Path) -> None:
    sweep = _prepared(load_space(SPACES / "ablations.yaml"), tmp_path / "sweep")
    sweep = replace(sweep, overrides=("data.captions=/nowhere.parquet", *sweep.overrides))
    name = sweep.space.trials()[0].name
    record, *_ = tune._records(sweep, name=name, params={"trial": name}, status="failed", reason="no captions")
    assert (record.status, record.reason, record.learning) == ("failed", "no captions", [])


@pytest.mark.parametrize("fault", ["of the config", "of the run", "of the results"])
def test_an_error_is_noted_wherever_a_trial_fails_and_tried_again_no_more(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = _prepared(load_space(SPACES / "fusion.yaml"), tmp_path / "sweep")
    name = sweep.space.trials()[0].name
    note = sweep.folder / "trials" / name / "error.txt"
    groups = []

    def fails(*_: object, group: str | None = None, **__: object) -> None:
        groups.append(group)
        raise ValueError(fault)

    monkeypatch.setattr(trial_module, "run", lambda *_, **__: None)
    monkeypatch.setattr(trial_module, "_with_best_weights", lambda config, *_: config)
    place = {
        "of the config": (Sweep, "config"),
        "of the run": (trial_module, "run"),
        "of the results": (trial_module, "metrics_of"),
    }
    with monkeypatch.context() as patched:
        patched.setattr(*place[fault], fails)
        with pytest.raises(ValueError, match=fault):
            tune.run_trial({"trial": name}, sweep=sweep)
    assert note.read_text() == fault
    assert groups == (["sweep"] if fault == "of the run" else [None])
    monkeypatch.setattr(trial_module, "run", lambda *_, **__: pytest.fail("it runs again"))
    with pytest.raises(RuntimeError, match=fault):
        tune.run_trial({"trial": name}, sweep=sweep)


def test_a_sweep_that_is_there_is_not_started_again_and_one_that_is_not_cannot_go_on(tmp_path: Path) -> None:
    space = load_space(SPACES / "ablations.yaml")
    with pytest.raises(ValueError, match=r"--resume: expected a sweep in .*got none"):
        sweep_space(space, name="none", config_path=CONFIG, overrides=[f"run.dir={tmp_path}"], size="tiny", resume=True)
    with pytest.raises(ValueError, match=r"report: expected a sweep's folder, got .* without trials\.jsonl"):
        report_sweep(tmp_path)


@pytest.mark.parametrize(
    ("seeds", "overrides", "size", "message"),
    [
        ([0, 1], [], "tiny", r"got another seeds: \[0, 1\], not \[0, 1, 2\]\. Give the same space and --seeds"),
        ([0, 1, 2], ["train.p=2"], "tiny", r"got train\.p=2, not 4\. Give the same --size and overrides"),
        ([0, 1, 2], [], None, r"got data\.height=288, not 48"),
    ],
)
def test_a_sweep_does_not_go_on_with_other_settings(
    seeds: list[int], overrides: list[str], size: str | None, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    where = [f"run.dir={tmp_path}", CAPTIONS]
    began = load_space(SPACES / "ablations.yaml")
    monkeypatch.setattr(tune, "_tuner", lambda *_, **__: pytest.fail("it started"))
    monkeypatch.setattr(tune, "make_synthetic", lambda *_: pytest.fail("it is prepared"))
    with pytest.raises(pytest.fail.Exception, match="it is prepared"):
        sweep_space(began, name="sweep", config_path=CONFIG, overrides=where, size="tiny")
    monkeypatch.setattr(tune.Tuner, "can_restore", lambda _: True)
    with pytest.raises(pytest.fail.Exception, match="it is prepared"):
        more = ["cluster.extract_workers=1"]
        sweep_space(began, name="sweep", config_path=CONFIG, overrides=[*where, *more], size="tiny", resume=True)
    with pytest.raises(ValueError, match=message):
        again = began.model_copy(update={"seeds": tuple(seeds)})
        sweep_space(again, name="sweep", config_path=CONFIG, overrides=[*where, *overrides], size=size, resume=True)
