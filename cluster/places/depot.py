"""Copies of a run's folders in an object store: what machines keep that share no file system.

A run works on local disks. With `cluster.storage` a URI, every finished stage is copied there, training writes its
checkpoints there, workers on other machines fetch what they read, and whoever runs the same description on any machine
goes on from what is there. Stages are named after fingerprints of all that decides them, so a copy never has to be
compared: it is the stage or it is not there. A store knows no locks: what is not finished yet lies in a place of each
run's own, so two runs that need the same stage at once make it twice and do each other no harm. Two runs of the same
name at once on two machines would; nothing here can see that.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from tvilfm.config import Config
from tvilfm.place import Place

COMPLETE = ".complete"  # folder of marks: a copy without one may lack something
UNFINISHED = ".partial"  # how the name of a folder ends that somebody still works in
WORKING = "working"  # where the copies of those lie, by owner


@dataclass(frozen=True)
class Depot:
    """Copies of what lies below a local folder.

    Attributes:
        uri: of the folder's copy.
        root: the folder, absolute; the same on every machine.
        owner: run or sweep whose unfinished folders these are.
    """

    uri: str
    root: Path
    owner: str = ""

    def uri_of(self, path: Path) -> str:
        """Where the copy of a path below the root lies."""
        relative = path.relative_to(self.root)
        if relative.parts[0].endswith(UNFINISHED):
            relative = Path(WORKING, self.owner, relative)
        return (Place(self.uri) / relative.as_posix()).uri

    def place(self, path: Path) -> Place:
        """Return the same as a `Place`."""
        return Place(self.uri_of(path))

    def has(self, path: Path) -> bool:
        """Whether a whole copy of a folder is there."""
        return self.place(self._mark(path)).is_file()

    def keep(self, path: Path) -> None:
        """Copy a finished folder, of which a whole copy is then there."""
        self.push(path)
        self.place(self._mark(path)).write(path.name.encode())

    def push(self, path: Path) -> None:
        """Copy a file or folder to the store, over what is there."""
        target = self.place(path)
        if target.is_local:  # file://, where folders have to be made
            Path(target.path if path.is_dir() else Path(target.path).parent).mkdir(parents=True, exist_ok=True)
        fs.copy_files(str(path), target.path, fs.LocalFileSystem(), target.filesystem)

    def pull(self, path: Path) -> None:
        """Copy a file or folder from the store, whole or not at all.

        Raises:
            FileNotFoundError: it is not there.
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
                if not path.is_dir():  # else another worker of this machine was faster
                    raise

    def drop(self, path: Path) -> None:
        """Remove what is there of a folder."""
        target = self.place(path)
        if target.filesystem.get_file_info(target.path).type == fs.FileType.Directory:
            target.filesystem.delete_dir(target.path)

    def _mark(self, path: Path) -> Path:
        return self.root / COMPLETE / path.relative_to(self.root)


def stages_depot(config: Config, group: str | None = None) -> Depot | None:
    """The copies of a run's stages where `cluster.storage` is a URI; None where machines share a folder.

    Args:
        config: the run.
        group: the sweep that it is a trial of, whose trials share unfinished stages.
    """
    return _depot(config, "stages", config.stages_path, group or config.run.name)


def runs_depot(config: Config, group: str | None = None) -> Depot | None:
    """The copies of run folders; arguments as of `stages_depot`."""
    return _depot(config, "runs" if group is None else f"runs/{group}", config.run.dir, "")


def _depot(config: Config, name: str, root: Path, owner: str) -> Depot | None:
    storage = config.cluster.storage
    if storage is None or not Place(storage).is_uri:
        return None
    return Depot((Place(storage) / name).uri, root.absolute(), owner)


def fetched(path: Path, depot: Depot | None) -> Path:
    """A path that a worker reads: as it lies on its machine, or else first copied there if it is the depot's.

    Of a finished stage the whole folder is copied, as a part of one must not pass for the stage.
    """
    if depot is not None and path.is_relative_to(depot.root) and not path.exists():
        unit = depot.root / path.relative_to(depot.root).parts[0]
        depot.pull(path if unit.name.endswith(UNFINISHED) else unit)
    return path
