"""Finished stages: where the result of each is stored, and whether it exists.

The name of a stage's folder has a fingerprint of everything that can change its result: the config keys it declares,
the dataset, and the stages it reads. A changed key re-does exactly the stages that depend on it, and the trials of a
sweep share every stage that they have in common. A stage works in `<folder>.partial` and is renamed when it is
finished: a folder without the suffix is complete, whatever was killed when. While it works it holds the stage's lock.
If several trials need a stage, one makes it and the others wait; the lock of a killed process is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cluster.places.depot import UNFINISHED, Depot
from tvilfm.place import lock


class StageStore:
    """Finished stages under one folder.

    Args:
        root: the folder.
        fingerprints: stage name -> fingerprint, as `stage_fingerprints` returns.
        depot: copies of the stages; None = there are none.
    """

    def __init__(self, root: Path, fingerprints: Mapping[str, str], depot: Depot | None = None) -> None:
        self.root = root.absolute()  # workers run in other folders
        self._fingerprints, self._depot = dict(fingerprints), depot

    def __contains__(self, name: str) -> bool:
        """Return whether the run has a stage of that name."""
        return name in self._fingerprints

    def path(self, name: str) -> Path:
        return self.root / f"{name}-{self._fingerprints[name]}"

    def partial(self, name: str) -> Path:
        """Where the stage works until it is done."""
        return self.path(name).with_name(self.path(name).name + UNFINISHED)

    def has(self, name: str) -> bool:
        """Whether nothing is to be done: the stage is there, and where copies are kept, its copy."""
        path = self.path(name)
        return path.is_dir() and (self._depot is None or self._depot.has(path))

    def ensure(self, name: str, make: Callable[[Path], None]) -> bool:
        """Make the stage unless it is there, or fetch its copy.

        Args:
            name: of the stage.
            make: fills a folder, which may hold what an interrupted attempt left for it to go on from.

        Returns:
            True when it was made now.
        """
        target = self.path(name)
        if self.has(name):
            return False
        with self.lock(target.name):
            made = not self._there(target)
            if made:
                partial = self.partial(name)
                partial.mkdir(parents=True, exist_ok=True)
                make(partial)
                partial.rename(target)
            if self._depot is not None and not self.has(name):
                self._depot.keep(target)
                self._depot.drop(self.partial(name))
        return made

    def _there(self, target: Path) -> bool:
        """Whether the stage is there: made by another run while this one waited, or now fetched."""
        if not target.is_dir() and self._depot is not None and self._depot.has(target):
            self._depot.pull(target)
        return target.is_dir()

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Have the folder of that name under the store to oneself, among all runs that share the store."""
        with lock(self.root / ".locks" / name):
            yield
