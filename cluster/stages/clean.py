"""Find what a run's folder of stages holds without need: results of earlier settings, and states of trainings."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from cluster.places.depot import UNFINISHED
from cluster.stages.store import STATE
from tvilfm.config import load_run


@dataclass(frozen=True)
class Leftover:
    """A folder that nothing refers to.

    Attributes:
        path: the folder.
        bytes: size of its files.
        reason: why it is not needed.
    """

    path: Path
    bytes: int
    reason: str

    def delete(self) -> None:
        shutil.rmtree(self.path)


def leftovers(run: Path) -> list[Leftover]:
    """Return the folders of a run that its description no longer uses, and states of trainings that are finished.

    Runs beside it, and trials of sweeps beside it, may use its stages too (`tvilfm tune --from`). A stage that is
    unfinished under such a description is needed: its run continues from it.

    Args:
        run: folder of the run.

    Raises:
        ValueError: it is no run's folder, or the run shares its stages with other runs.
    """
    config = load_run(run)
    stages = run / "stages"
    if config.run.stages_dir is not None:
        raise ValueError(
            f"{run}: expected a run with stages of its own, got one that shares {config.run.stages_dir}. Delete that "
            "folder when no run needs it."
        )
    beside = run.absolute().parent
    needed = set()
    for file in (*beside.glob("*/run.json"), *beside.glob("*/trials/*/run.json")):
        paths = json.loads(file.read_text())["stages"].values()
        needed |= {path.name for path in ((file.parent / path).resolve() for path in paths) if _is_in(path, stages)}
    found: list[Leftover] = []
    for folder in sorted(path for path in stages.glob("[!.]*") if path.is_dir()):
        if folder.name.removesuffix(UNFINISHED) not in needed:
            found.append(_leftover(folder, "the run's settings no longer use it"))
        elif folder.name in needed and (folder / STATE).is_dir():
            found.append(_leftover(folder / STATE, "its stage is finished"))
    return found


def _is_in(path: Path, folder: Path) -> bool:
    return path.parent == folder.resolve()


def _leftover(path: Path, reason: str) -> Leftover:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Leftover(path, size, reason)
