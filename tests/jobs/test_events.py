"""Lines for a log collector: each says of which run, trial and job it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray

from cluster.events import Events


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_has_the_ids_and_a_failure_says_why(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "raysubmit_7"}}))
    events = Events(tmp_path / "events.jsonl", run="demo", sweep="ablations")
    with events.around("stage", stage="base"):
        pass
    with pytest.raises(ValueError), events.around("stage", stage="text"):
        raise ValueError("no captions")
    found = lines(tmp_path / "events.jsonl")
    assert [(line["event"], line["stage"]) for line in found] == [
        ("stage started", "base"),
        ("stage done", "base"),
        ("stage started", "text"),
        ("stage failed", "text"),
    ]
    job = ray.get_runtime_context().get_job_id()
    assert {(line["run"], line["sweep"], line["job"], line["ray_job"]) for line in found} == {
        ("demo", "ablations", "raysubmit_7", job)
    }
    assert found[-1]["error"] == "ValueError: no captions" and float(str(found[1]["seconds"])) >= 0


def test_a_worker_writes_the_same_job(ray_session: None, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    @ray.remote
    def work() -> None:
        Events(path, run="demo", sweep=None).write("trial")

    ray.get(work.remote())
    Events(path, run="demo", sweep=None).write("driver")
    trial, driver = lines(path)
    assert trial["ray_job"] == driver["ray_job"] and trial["pid"] != driver["pid"] and "job" not in trial
