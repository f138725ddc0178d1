"""Store of finished stages: it computes missing ones and skips existing ones.

The name of a stage's folder contains a fingerprint of everything that can change its result: the config keys that it
declares, the dataset, and the stages that it reads. So a changed key repeats exactly the stages that depend on it, and
the trials of a sweep share all stages that they have in common. A stage works in `<folder>.partial`, which is renamed
at its end, so a folder without this suffix is complete even after a kill. A working stage holds a lock. If several
trials need the same stage, one computes it and the others wait. The lock of a killed process is free.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cluster.places.depot import UNFINISHED, Depot
from tvilfm.place import lock

STATE = "train"  # folder of a stage with the checkpoints that an interrupted training continues from


class StageStore:
    """The finished stages in one folder.

    Args:
        root: the folder.
        fingerprints: stage name -> fingerprint, see `stage_fingerprints`.
        depot: copies of the stages; None = no copies are kept.
    """

    def __init__(self, root: Path, fingerprints: Mapping[str, str], depot: Depot | None = None) -> None:
        self.root = root.absolute()  # workers do not run in the current folder
        self._fingerprints, self._depot = dict(fingerprints), depot

    def __contains__(self, name: str) -> bool:
        """Return whether the run has a stage of that name."""
        return name in self._fingerprints

    def path(self, name: str) -> Path:
        """Return the folder of the finished stage."""
        return self.root / f"{name}-{self._fingerprints[name]}"

    def partial(self, name: str) -> Path:
        """Return the folder in which the stage works until it is finished."""
        return self.path(name).with_name(self.path(name).name + UNFINISHED)

    def has(self, name: str) -> bool:
        """Return whether the stage is finished and, if copies are kept, has been copied."""
        path = self.path(name)
        return path.is_dir() and (self._depot is None or self._depot.has(path))

    def ensure(self, name: str, make: Callable[[Path], None]) -> bool:
        """Fetch or compute a stage unless it exists.

        Args:
            name: name of the stage.
            make: function that writes the result to a folder, in which an interrupted attempt may have left files to
                resume from.

        Returns:
            True if the stage was computed by this call.
        """
        target = self.path(name)
        if self.has(name):
            return False
        with self.lock(target.name):
            missing = not self._exists(target)
            if missing:
                partial = self.partial(name)
                partial.mkdir(parents=True, exist_ok=True)
                make(partial)
                partial.rename(target)
                shutil.rmtree(target / STATE, ignore_errors=True)  # only an unfinished stage resumes from it
            if self._depot is not None and not self.has(name):
                self._depot.keep(target)
                self._depot.drop(self.partial(name))
        return missing

    def _exists(self, target: Path) -> bool:
        """Return whether the stage exists, after fetching its copy if there is one."""
        if not target.is_dir() and self._depot is not None and self._depot.has(target):
            self._depot.pull(target)
        return target.is_dir()

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Lock a name among all runs that share the store."""
        with lock(self.root / ".locks" / name):
            yield
