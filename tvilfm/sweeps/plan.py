"""The plan of a sweep: the run description of every trial, and which trials share one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tvilfm.config import Config, load_config
from tvilfm.sweeps.space import Space, Trial, written


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Everything that the process of a trial needs to know about the sweep.

    Attributes:
        folder: folder of the sweep, on storage that all nodes share.
        stages: folder of the stages that trials share.
        space: search space.
        overrides: overrides given by the user.
        size: recipe of the run description.
    """

    folder: Path
    stages: Path
    space: Space
    overrides: tuple[str, ...]
    size: str | None

    def config(self, trial: Trial) -> Config:
        """Return the config of a trial: a run in the sweep's folder that shares the stages of all trials."""
        own = {
            "run.dir": str(self.folder / "trials"),
            "run.name": trial.name,  # quoted by `written`: an Optuna trial's hexadecimal id may look like a number
            "run.stages_dir": str(self.stages),
        }
        return load_config(self.folder / "ray_config.yaml", [*trial.overrides, *written(own)], size=self.size)

    @cached_property
    def runs(self) -> dict[str, list[Trial]]:
        """The trials that share one run (they differ only in which query they read), by the first's name.

        Computed once per sweep: the processes of trials receive it with the sweep.
        """
        runs: dict[str, list[Trial]] = {}
        for trial in self.space.trials(self.overrides):
            config = self.config(replace(trial, name="same"))
            runs.setdefault(config.model_dump_json(), []).append(trial)
        return {trials[0].name: trials for trials in runs.values()}

    def num_runs(self) -> int:
        """Return the number of planned runs."""
        return (self.space.budget.num_samples or 0) if self.space.searcher == "optuna" else len(self.runs)

    def trials_of(self, params: Mapping[str, Any], name: str) -> list[Trial]:
        """Return the trials of a run.

        Args:
            params: what Tune passed to it: `trial`, the name of a planned run, or parameters that Optuna chose.
            name: name of the trial of these parameters.
        """
        if "trial" in params:
            return self.runs[params["trial"]]
        return [replace(self.space.trial(0, params, self.space.seeds[0], self.overrides), name=name)]
