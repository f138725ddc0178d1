"""What one trial of a sweep does, in its own process: an ordinary run that reports its metrics to Tune."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from cluster.run import evaluator_of, run
from tvilfm.config import Config
from tvilfm.evaluation.results import RESULTS_FILES, Results
from tvilfm.evaluation.weight_sweep import SweptMetric, sweep_ensemble, weight_grid
from tvilfm.place import write_whole
from tvilfm.sweeps.plan import Sweep
from tvilfm.sweeps.space import Trial, written
from tvilfm.terms import Record, Split

WATCHED = "watched_epoch"  # finished epochs of the stage that ASHA watches
DONE = "finished"  # marks the last report of a trial; a trial that ASHA stopped never sends it
ERROR_FILE = "error.txt"
SPLIT_METRICS: dict[Split, tuple[str, ...]] = {"val": ("val_rank1", "val_mAP"), "test": ("rank1", "mAP", "mINP")}


def run_trial(params: dict[str, Any], *, sweep: Sweep) -> None:
    """Run one trial, in its own process."""
    name = params["trial"] if "trial" in params else tune.get_context().get_trial_id()
    path = error_path(sweep.folder, name)
    if path.exists():  # Tune restarts failed trials; do not repeat one that raised an error
        raise RuntimeError(path.read_text())
    try:
        metrics = _run(sweep, sweep.trials_of(params, name)[0])
    except Exception as error:
        # Tune reports the error only after the trial has ended.
        write_whole(path, str(error))
        raise
    tune.report({**metrics, DONE: True})


def error_path(folder: Path, name: str) -> Path:
    return folder / "trials" / name / ERROR_FILE


def _run(sweep: Sweep, trial: Trial) -> dict[str, float]:
    """Run one trial and return its metrics."""
    space, config = sweep.space, sweep.config(trial)
    # Epochs are validated with the fusion query. Trials with another query or a test metric report only at their end.
    live = space.metric.startswith("val_") and trial.query == "fusion"

    def report(record: Record) -> None:
        if live and space.metric in record:
            watched = {WATCHED: int(record["epoch"]) + 1} if record["stage"] == space.scheduler.stage else {}
            tune.report(
                {space.metric: record[space.metric], "stage": record["stage"], "step": record["step"], **watched}
            )

    if space.free_steps is not None:
        run(config, until="features", group=sweep.folder.name)
        config = _with_best_weights(config, sweep, trial)
    run(config, until="results", listener=report, group=sweep.folder.name)
    return metrics_of(config.run.path, trial.query)


def _with_best_weights(config: Config, sweep: Sweep, trial: Trial) -> Config:
    """Return the trial's config with the MER weights that are best on the validation identities."""
    assert sweep.space.free_steps is not None
    metric: SweptMetric = sweep.space.metric.removeprefix("val_")  # type: ignore[assignment]
    weights = sweep_ensemble(evaluator_of(config, "val"), weight_grid(sweep.space.free_steps), metric=metric)
    chosen = {f"evaluate.ensemble.{name}": weight for name, weight in weights.best.items()}
    return sweep.config(replace(trial, overrides=(*trial.overrides, *written(chosen))))


def metrics_of(folder: Path, query: str) -> dict[str, float]:
    """Return a query's metrics in the default table: `val_*` of validation identities, others of test identities."""
    metrics: dict[str, float] = {}
    for split, names in SPLIT_METRICS.items():
        path = folder / RESULTS_FILES[split]
        if path.exists():
            (row,) = (row for row in Results.read(path).default_rows if row.query == query)
            metrics |= {name: row.metric(name.removeprefix("val_")) for name in names}
    return metrics
