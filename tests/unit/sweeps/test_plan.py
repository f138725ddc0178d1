"""The plan of a sweep is computed once, and trials receive it."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from cluster.sweep import SPACES
from tests.paths import REPOSITORY
from tvilfm.sweeps import plan
from tvilfm.sweeps.plan import Sweep
from tvilfm.sweeps.space import load_space


def test_the_process_of_a_trial_does_not_compute_the_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(REPOSITORY / "ray_config.yaml", tmp_path)
    space = load_space(SPACES / "ablations.yaml")
    sweep = Sweep(folder=tmp_path, stages=tmp_path, space=space, overrides=(), size="tiny")
    loads = []
    load = plan.load_config
    monkeypatch.setattr(plan, "load_config", lambda *args, **more: loads.append(args) or load(*args, **more))
    name = next(iter(sweep.runs))
    assert len(loads) == len(space.trials())
    received = pickle.loads(pickle.dumps(sweep))
    assert name in {trial.name for trial in received.trials_of({"trial": name}, name)}
    assert sweep.num_runs() == len(sweep.runs)
    assert len(loads) == len(space.trials())
