"""The shortest runs of the whole chain, as one sweep; lost machines, kills and other ways to run are compared with it.

Kept in one place so that the undisturbed runs are made once: fixture `undisturbed` in tests/jobs/conftest.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tvilfm.evaluation.results import Results
from tvilfm.sweeps.results import TrialRecord, read_trials

# The chain without what it can do without: no pre-training, no captioners, no cached views, one epoch of base.
QUICK = (
    *("model.weights=random", "train.text.cache_views=0", "caption.source=files"),
    *("train.base={epochs: 1, milestones: []}", "train.text={epochs: 6, milestones: [4]}"),
    *("cluster.cpus_per_train_worker=1", "cluster.extract_workers=1"),
)
ROWS: dict[str, dict[str, Any]] = {
    "joint": {"overrides": {"loss.joint": True}},  # as in a run without a sweep
    "not joint": {"overrides": {"loss.joint": False}},
    "joint, ensemble": {"overrides": {"loss.joint": True}, "query": "ensemble"},
    "broken": {"overrides": {"model.text.weights": "/nowhere.pt"}},
}


def space_of(*rows: str) -> dict[str, Any]:
    """Return the space of some rows, one run at a time, so that there is a moment when one is done and another not."""
    return {
        "name": "rows",
        "description": "settings, one after the other",
        "reference": "joint",
        "rows": {row: ROWS[row] for row in rows},
        "budget": {"max_concurrent": 1},
    }


def copy_stages(sweep: Path, stages: Path) -> None:
    """Copy pixels and base model, which all rows share, so that what is disturbed begins with the text stage."""
    for folder in (sweep / "stages").glob("[pb]*"):
        shutil.copytree(folder, stages / folder.name)


def records_of(folder: Path) -> dict[str, TrialRecord]:
    """Return row -> record of a sweep of these rows."""
    return {record.setting: record for record in read_trials(folder / "trials.jsonl")}


def results_of(folder: Path, row: str) -> Results:
    """Return the results of the run of a row."""
    return Results.read(folder / "trials" / records_of(folder)[row].name / "results.json")
