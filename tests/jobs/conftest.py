"""The runs that several files compare with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.sweep import sweep_space
from tests.quick import QUICK, ROWS, space_of
from tvilfm.place import lock
from tvilfm.sweeps.space import Space


@pytest.fixture(scope="session")
def undisturbed(tiny_benchmark: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a sweep of the quick runs that nobody disturbed; its stages are in `stages`."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    with lock(folder / "undisturbed.lock"):
        sweep = folder / "undisturbed" / "rows"
        if not (sweep / "trials.jsonl").exists():
            overrides = [*QUICK, f"data.root={tiny_benchmark}", f"run.dir={sweep.parent}"]
            space = Space.model_validate(space_of(*ROWS))
            sweep_space(space, name="rows", config_path=Path("ray_config.yaml"), overrides=overrides, size="tiny")
    return sweep
