"""Sweeps on Ray Tune: run the trials of a search space, each as an ordinary run, and collect their results.

Trials share one folder of stages, which makes a sweep cheap. A stage that several trials have in common (decoded
images, base model, cached views) is executed once, by the first trial that needs it. A trial that was killed resumes
from the last epoch of its current stage. Tune generates trials, schedules them and stops bad ones early; it saves this
state, so a sweep can be resumed after its driver was killed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from ray import tune
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console

from cluster.machines.room import largest_room, require_room
from cluster.run import learning_of, make_synthetic
from cluster.session import session
from cluster.trackers import check_trackers
from cluster.trial import DONE, ERROR_FILE, SPLIT_METRICS, WATCHED, error_path, metrics_of, run_trial
from tvilfm.config import Config, load_config, to_yaml
from tvilfm.evaluation.feasibility import require_feasible
from tvilfm.place import write_whole
from tvilfm.report.sweep import write_sweep_report
from tvilfm.sweeps.check import check_same, check_space
from tvilfm.sweeps.plan import Sweep
from tvilfm.sweeps.results import SweepData, TrialRecord, read_trials
from tvilfm.sweeps.space import Parameter, Space, written
from tvilfm.terms import PARTS, Record
from tvilfm.versions import version_of

TRIAL_MEMORY = 1_300_000_000  # bytes of a trial's driver process; its stages reserve CPUs themselves
TRIALS_FILE = "trials.jsonl"
ENDED_FILE = "ended.jsonl"  # one line per ended run, written when it ends
ALL_METRICS = [name for names in SPLIT_METRICS.values() for name in names]
Status = Literal["done", "stopped", "failed"]
SPACE_FILE = "space.json"
BASE_FILE = "config.yaml"  # run description that all trials start from
EXPERIMENT = "tune"
SPACES = Path(str(files("tune_spaces")))


def sweep_space(
    space: Space,
    *,
    name: str,
    config_path: Path,
    overrides: Sequence[str] = (),
    size: str | None = None,
    resume: bool = False,
) -> Path:
    """Run the trials of a search space, or resume an interrupted sweep.

    Args:
        space: search space.
        name: name of the sweep's folder in `run.dir`.
        config_path: run description.
        overrides: overrides given by the user, `section.key=value`.
        size: recipe of the run description.
        resume: resume the sweep of this name: keep finished trials, continue unfinished ones, run failed ones again.

    Returns:
        The sweep's folder, with `trials.jsonl`: one line per trial.

    Raises:
        ValueError: the space does not fit the run description; without `resume`, a sweep of this name exists; with
            `resume`, it does not exist or was started with other settings; or fewer runs ended than were planned for
            another reason than `budget.time_limit_s` (the ended ones are in `trials.jsonl`).
    """
    base = check_space(space, config_path, overrides, size=size)
    check_trackers(base.run.trackers)
    require_feasible(base)
    folder = (base.run.dir / name).absolute()
    _prepare(folder, config_path, resume=resume)
    if resume:
        began = (folder / SPACE_FILE).read_text()
        check_same(space, base, began=json.loads(began), noted=load_config(folder / BASE_FILE))
        space = Space.model_validate_json(began)  # Tune keeps the original budget
        for path in folder.glob(f"trials/*/{ERROR_FILE}"):
            path.unlink()
    else:
        write_whole(folder / SPACE_FILE, space.model_dump_json(indent=2))
        write_whole(folder / BASE_FILE, to_yaml(base))
    # A default data.root depends on run.dir, which differs for trials.
    sweep = Sweep(
        folder=folder,
        stages=(base.run.stages_dir or folder / "stages").absolute(),
        space=space,
        overrides=(*overrides, *written({"data.root": str(base.data_root.absolute())})),
        size=size,
    )
    make_synthetic(base, Console(stderr=True))
    _quiet_tune()
    with session(base.cluster):
        require_room(base.cluster)
        try:
            _tuner(sweep, base, resume=resume).fit()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped: ended trials are kept; continue with --resume") from None
    _check_ended(sweep, _write_records(sweep))
    return folder


def _quiet_tune() -> None:
    # Tune's loggers would write every metric a second time, into Tune's folder.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # its own ends a sweep at Ctrl-C as if it were finished
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials are printed by name and are in the table


def report_sweep(folder: Path) -> SweepData:
    """Write the tables and the page of a sweep to its folder `report/`, from the results of its trials.

    Args:
        folder: folder of the sweep, as returned by `sweep_space`.

    Raises:
        ValueError: the folder has no finished sweep.
    """
    if not (folder / TRIALS_FILE).is_file():
        raise ValueError(
            f"report: expected a sweep's folder, got {folder} without {TRIALS_FILE}. "
            "Run `tvilfm tune`, with --resume if it was interrupted."
        )
    base = load_config(folder / BASE_FILE)
    data = SweepData(
        space=Space.model_validate_json((folder / SPACE_FILE).read_text()),
        records=read_trials(folder / TRIALS_FILE),
        dataset=base.data.name,
        facts={
            "protocol": base.evaluate.protocols[0],
            "text source": base.evaluate.default_text_source,
            **{f"{name} version": version_of(name) for name in ("tvilfm", "ray", "torch")},
        },
        config_yaml=to_yaml(base),
    )
    write_sweep_report(data, folder / "report")
    return data


def _prepare(folder: Path, config_path: Path, *, resume: bool) -> None:
    exists = Tuner.can_restore(str(folder / EXPERIMENT))
    if resume and not exists:
        raise ValueError(f"--resume: expected a sweep in {folder}, got none. Start it without --resume.")
    if exists and not resume:
        raise ValueError(f"--name: expected a new name, got an existing sweep, {folder}. Continue it with --resume.")
    if not resume:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(config_path, folder / "ray_config.yaml")


def _write_records(sweep: Sweep) -> list[str]:
    """Write `trials.jsonl` and return the names of the runs that ended."""
    path = sweep.folder / ENDED_FILE
    # A trial that ran again after --resume has two lines; the last one counts.
    ended = {end["name"]: end for end in map(json.loads, path.read_text().splitlines() if path.exists() else [])}
    records = [record for end in ended.values() for record in _records(sweep, **end)]
    records.sort(key=lambda record: record.name)
    lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    write_whole(sweep.folder / TRIALS_FILE, lines)
    return list(ended)


def _check_ended(sweep: Sweep, ended: Collection[str]) -> None:
    """Report runs that did not end because they were interrupted or lost: Tune reports neither."""
    # Empty for Optuna, whose names are not known before.
    missing = [name for name in sweep.runs if name not in ended]
    total = sweep.num_runs()
    if len(ended) >= total:
        return
    without = f", without {', '.join(missing[:3])}{', ...' if missing[3:] else ''}" if missing else ""
    summary = f"tune: expected {total} runs to end, got {len(ended)}{without}."
    limit_s = sweep.space.budget.time_limit_s
    if limit_s is None:
        raise ValueError(f"{summary} Continue with --resume; `tvilfm report {sweep.folder}` shows the ended ones.")
    Console(stderr=True).print(f"{summary} budget.time_limit_s was {limit_s:g}.", highlight=False, soft_wrap=True)


def _tuner(sweep: Sweep, base: Config, *, resume: bool) -> Tuner:
    space = sweep.space
    path = str(sweep.folder / EXPERIMENT)
    param_space: dict[str, Any]
    if space.searcher == "optuna":
        param_space = {key: _domain(parameter) for key, parameter in space.parameters.items()}
    else:
        # Seeds of one setting come first: parallel trials then train different base models and need not wait.
        param_space = {"trial": tune.grid_search(sorted(sweep.runs))}
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, sweep=sweep), PlacementGroupFactory([{"CPU": 0, "memory": TRIAL_MEMORY}])
    )
    if resume:
        # A failed trial keeps its id, by which Optuna knows it, and continues from its finished stages.
        return Tuner.restore(path, trainable, param_space=param_space, resume_errored=True)
    search = None
    if space.searcher == "optuna":
        search = OptunaSearch(metric=space.metric, mode=space.mode, seed=space.seeds[0])
    scheduler = None
    if space.scheduler.name == "asha":
        scheduler = ASHAScheduler(
            time_attr=WATCHED,
            metric=space.metric,
            mode=space.mode,
            max_t=space.scheduler.epochs(base),
            grace_period=space.scheduler.grace_epochs(base),
            reduction_factor=space.scheduler.reduction_factor,
            stop_last_trials=False,  # the test identities are evaluated after the last epoch
        )
    return Tuner(
        trainable,
        param_space=param_space,
        tune_config=TuneConfig(
            num_samples=(space.budget.num_samples or 1) if space.searcher == "optuna" else 1,
            max_concurrent_trials=space.budget.max_concurrent
            or largest_room(base.cluster) // base.cluster.train_workers,
            # Reusing processes saves imports of torch. But after an early stop, a process is still busy with the old
            # trial, and Tune would lose the next trial in it.
            reuse_actors=scheduler is None,
            time_budget_s=space.budget.time_limit_s,
            search_alg=search,
            scheduler=scheduler,
        ),
        run_config=RunConfig(
            name=EXPERIMENT,
            storage_path=str(sweep.folder),
            verbose=0,
            failure_config=FailureConfig(max_failures=base.cluster.max_failures),
            callbacks=[_Ends(sweep)],
        ),
    )


def _domain(parameter: Parameter) -> Any:
    if parameter.range is None:
        return tune.choice(list(parameter.options))
    kind, low, high = parameter.range
    if kind == "randint":
        return tune.randint(int(low), int(high) + 1)
    return {"uniform": tune.uniform, "loguniform": tune.loguniform}[kind](low, high)


def _records(sweep: Sweep, *, name: str, params: dict[str, Any], status: Status, reason: str) -> list[TrialRecord]:
    """Return one record for each trial that shares an ended run."""
    trials = sweep.trials_of(params, name)
    folder = sweep.folder / "trials" / name
    chosen: dict[str, float] = {}
    learning: list[Record] = []
    if (folder / "config.yaml").exists():  # otherwise the run failed before it read its data
        # The config that the trial ran, including the weights that it selected.
        config = load_config(folder / "config.yaml")
        learning = learning_of(config)
        if sweep.space.free_steps:
            ensemble = config.evaluate.ensemble.model_dump()
            chosen = {part: ensemble[part] for part in PARTS}
    return [
        TrialRecord(
            name=trial.name,
            setting=trial.setting,
            values=dict(trial.values),
            seed=trial.seed,
            query=trial.query,
            status=status,
            reason=reason,
            metrics=metrics_of(folder, trial.query) if status == "done" else {},
            chosen=chosen,
            learning=learning,
        )
        for trial in trials
    ]


class _Ends(Callback):
    """Prints one line per event of a run, with the time left and the best run so far; records how each run ended."""

    def __init__(self, sweep: Sweep) -> None:
        self._folder, self._total = sweep.folder, sweep.num_runs()
        self._metric, self._sign = sweep.space.metric, 1 if sweep.space.mode == "max" else -1
        self._started, self._ended = time.monotonic(), 0  # of this command, which may resume a sweep
        self._best: tuple[float, str] | None = None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if not self._error(trial):
            _say(trial, "started")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        where = "test" if DONE in result else f"{result['stage']}, epoch {result['step']} of both stages"
        numbers = [f"{name} {100 * value:.2f}" for name, value in result.items() if name in ALL_METRICS]
        _say(trial, f"{where}: {', '.join(numbers)}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trials, trial, "done" if trial.last_result.get(DONE) else "stopped")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._error(trial):
            trial.max_failures = 0  # one last start, which ends with that error
        else:
            _say(trial, "its process died; it resumes from its last epoch in a new process")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trials, trial, "failed", self._error(trial) or "its process died")

    def _error(self, trial: Any) -> str:
        """Return the last line of a trial's error; the lines before it are the traceback."""
        path = error_path(self._folder, _name(trial))
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()] if path.exists() else []
        return lines[-1] if lines else ""

    def _end(self, trials: list[Any], trial: Any, status: Status, reason: str = "") -> None:
        end = {"name": _name(trial), "params": trial.config, "status": status, "reason": reason}
        with (self._folder / ENDED_FILE).open("a") as file:
            file.write(json.dumps(end) + "\n")
        left = self._total - 1 - sum(other.is_finished() for other in trials if other is not trial)
        _say(trial, f"{status}{': ' + reason if reason else ''}; {left} left{self._summary(trial, left)}")

    def _summary(self, trial: Any, left: int) -> str:
        """Return the time until the last run ends at the pace so far, and the best run so far."""
        self._ended += 1
        minutes = (time.monotonic() - self._started) * left / self._ended / 60
        value = (trial.last_result or {}).get(self._metric)
        if value is not None:
            self._best = max(filter(None, (self._best, (self._sign * value, _name(trial)))))
        best = f"; best {self._metric} {100 * abs(self._best[0]):.2f} in {self._best[1]}" if self._best else ""
        return f", about {minutes:.0f} min{best}"


def _name(trial: Any) -> str:
    name: str = trial.config.get("trial", trial.trial_id)
    return name


def _say(trial: Any, text: str) -> None:
    Console(stderr=True).print(f"{_name(trial)}: {text}", highlight=False, soft_wrap=True)
