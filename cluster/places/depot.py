"""Copies of a run's folders in an object store, for machines that share no file system.

A run works on local disks. If `cluster.storage` is a URI, every finished stage is copied there, training writes its
checkpoints there, and workers on other machines fetch the files that they read. Anyone who runs the same description on
another machine resumes from these copies. The name of a stage contains a fingerprint of everything that decides its
result, so copies never have to be compared. An object store has no locks. Unfinished folders are therefore stored
separately for each run: if two runs need the same stage at the same time, both execute it and neither disturbs the
other. Two runs with the same name on two machines at the same time would overwrite each other; this is not detected.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from tvilfm.config import Config
from tvilfm.place import Place, lock

COMPLETE = ".complete"  # folder of markers: a copy without a marker may be incomplete
UNFINISHED = ".partial"  # suffix of the name of an unfinished folder
WORKING = "working"  # folder of the copies of unfinished folders, one subfolder per owner


@dataclass(frozen=True)
class Depot:
    """Copies of a local folder's contents in an object store.

    Attributes:
        uri: URI of the folder's copy.
        root: absolute path of the folder, the same on every machine.
        owner: run or sweep that owns the unfinished folders.
    """

    uri: str
    root: Path
    owner: str = ""

    def uri_of(self, path: Path) -> str:
        """Return the URI of the copy of a path below the root."""
        relative = path.relative_to(self.root)
        if relative.parts[0].endswith(UNFINISHED):
            relative = Path(WORKING, self.owner, relative)
        return (Place(self.uri) / relative.as_posix()).uri

    def place(self, path: Path) -> Place:
        """Return the copy of a path below the root as a `Place`."""
        return Place(self.uri_of(path))

    def has(self, path: Path) -> bool:
        """Return whether a complete copy of a folder exists."""
        return self.place(self._mark(path)).is_file()

    def keep(self, path: Path) -> None:
        """Copy a finished folder and mark the copy as complete."""
        self.push(path)
        self.place(self._mark(path)).write(path.name.encode())

    def push(self, path: Path) -> None:
        """Copy a file or folder to the store, replacing existing files."""
        target = self.place(path)
        if target.is_local:  # file://, where folders must be created
            Path(target.path if path.is_dir() else Path(target.path).parent).mkdir(parents=True, exist_ok=True)
        fs.copy_files(str(path), target.path, fs.LocalFileSystem(), target.filesystem)

    def pull(self, path: Path) -> None:
        """Copy a file or folder from the store atomically.

        Raises:
            FileNotFoundError: the store has no such copy.
        """
        source = self.place(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".pull-") as folder:
            partial = Path(folder) / path.name
            if source.filesystem.get_file_info(source.path).type == fs.FileType.Directory:
                partial.mkdir()
            fs.copy_files(source.path, str(partial), source.filesystem, fs.LocalFileSystem())
            try:
                os.replace(partial, path)
            except OSError:
                if not path.is_dir():  # otherwise another worker on this machine was faster
                    raise

    def drop(self, path: Path) -> None:
        """Delete the copy of a folder, if it exists."""
        target = self.place(path)
        if target.filesystem.get_file_info(target.path).type == fs.FileType.Directory:
            target.filesystem.delete_dir(target.path)

    def _mark(self, path: Path) -> Path:
        return self.root / COMPLETE / path.relative_to(self.root)


def stages_depot(config: Config, group: str | None = None) -> Depot | None:
    """Return the depot of a run's stages if `cluster.storage` is a URI; None if machines share a folder.

    Args:
        config: the run.
        group: name of the sweep that the run is a trial of; its trials share unfinished stages.
    """
    return _depot(config, "stages", config.stages_path, group or config.run.name)


def runs_depot(config: Config, group: str | None = None) -> Depot | None:
    """Return the depot of run folders; arguments as in `stages_depot`."""
    return _depot(config, "runs" if group is None else f"runs/{group}", config.run.dir, "")


def _depot(config: Config, name: str, root: Path, owner: str) -> Depot | None:
    storage = config.cluster.storage
    if storage is None or not Place(storage).is_uri:
        return None
    return Depot((Place(storage) / name).uri, root.absolute(), owner)


def fetched(path: Path, depot: Depot | None) -> Path:
    """Return a path that a worker reads, after copying it from the depot if it is missing on the worker's machine.

    A finished stage is copied as a whole, because a part of its folder would be taken for the finished stage. The
    workers of a machine wait for the copy of the first one.
    """
    if depot is not None and path.is_relative_to(depot.root) and not path.exists():
        unit = depot.root / path.relative_to(depot.root).parts[0]
        wanted = path if unit.name.endswith(UNFINISHED) else unit
        with lock(depot.root / ".locks" / f"pull-{wanted.name}"):
            if not path.exists():
                depot.pull(wanted)
    return path
