"""What a stage is: the config keys and inputs that decide its result, and how the result is made.

A stage sees nothing but what it declares. `make` receives a view of the config in which every other key raises
`UndeclaredKeyError`, and inputs by name, of which every other raises `UndeclaredInputError`. So a forgotten key is an
error in the first run, and not the reuse of an outdated result later.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from pydantic import BaseModel

from cluster.places.depot import Depot
from tvilfm.config import Config, set_value, value_at
from tvilfm.data.manifest import select
from tvilfm.terms import Split

DATASET, CAPTION_FILES, MODEL, CAPTIONS = "dataset", "caption_files", "model", "captions"
SOURCES = (DATASET, CAPTION_FILES, MODEL)  # inputs that no stage makes: what users bring

# Where a run works, what it reads, on which machines and how fast: any stage may read these keys, and none of them
# names a stage. What is in the files of `data.root`, `data.captions` and `model.trained` is an input.
# Results with other values are equal, or differ only in the rounding of batched arithmetic.
PLACEMENT = (
    *("run.dir", "run.stages_dir", "run.trackers", "run.mlflow_uri"),
    *("data.root", "data.captions", "data.decode_batch", "model.trained"),
    *("caption.workers", "caption.decoders", "caption.max_bad_share"),
    *("train.loader_workers", "evaluate.batch", "gallery", "serve", "cluster"),
)


class UndeclaredKeyError(RuntimeError):
    """A stage reads a config key that it does not declare."""


class UndeclaredInputError(RuntimeError):
    """A stage reads an input that it does not declare."""


def covers(keys: tuple[str, ...], key: str) -> bool:
    """Return whether a dotted key is one of `keys` or below one of them."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in keys)


class _SectionView:
    """A section of the config that shows the declared keys alone."""

    def __init__(self, section: BaseModel, prefix: str, stage: str, keys: tuple[str, ...]) -> None:
        self._view = section, prefix, stage, keys

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        section, prefix, stage, keys = self._view
        if name not in type(section).model_fields:
            derived = getattr(type(section), name)
            if not isinstance(derived, property) or derived.fget is None:
                raise UndeclaredKeyError(f"stage {stage}: expected config values to be read, got {prefix}{name}.")
            return derived.fget(self)  # reads its keys through this view
        value, key = getattr(section, name), f"{prefix}{name}"
        if covers((*keys, *PLACEMENT), key):
            return value
        if isinstance(value, BaseModel):
            return _SectionView(value, f"{key}.", stage, keys)
        raise UndeclaredKeyError(
            f"stage {stage}: expected a key that it declares, got {key}. Add it to the stage's `keys`."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _SectionView, self._view

    def model_copy(self, *, update: Mapping[str, Any]) -> _SectionView:
        section, prefix, stage, keys = self._view
        return _SectionView(section.model_copy(update=update), prefix, stage, keys)

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Return the declared values of the whole config, nested as there, without those of `PLACEMENT`."""
        section, prefix, _, keys = self._view
        assert not prefix, "only the whole config is shown"
        values = without_placement(section.model_dump(mode=mode))
        declared: dict[str, Any] = {}
        for key in keys:
            set_value(declared, key, value_at(values, key))
        return declared


def view_of(config: Config, stage: str, keys: tuple[str, ...]) -> Config:
    """Return a config that raises `UndeclaredKeyError` for every key but these and those of `PLACEMENT`.

    It can be pickled, so that workers get the same view. Sections that are declared whole are the sections themselves.
    """
    return cast(Config, _SectionView(config, "", stage, keys))


def without_placement(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of nested config values without the keys of `PLACEMENT`."""
    pruned = copy.deepcopy(dict(values))
    for key in PLACEMENT:
        section, _, name = key.rpartition(".")
        (value_at(pruned, section) if section else pruned).pop(name)
    return pruned


class Stage(ABC):
    """One stage of a run.

    Attributes:
        name: of the stage and its folder.
        keys: dotted config keys, or whole sections, that decide the result beside the inputs.
        unit: what the progress line counts; empty = no progress line.
    """

    name: str
    keys: tuple[str, ...]
    unit: str = ""

    def applies(self, config: Config) -> bool:
        """Return whether a run of this config has the stage."""
        return True

    @abstractmethod
    def inputs(self, config: Config) -> tuple[str, ...]:
        """Return the names of the stages whose results this one reads, and of `DATASET` and `CAPTION_FILES`."""

    @abstractmethod
    def make(self, folder: Path, job: StageJob) -> None:
        """Fill the stage's folder, which may hold what an interrupted attempt left."""


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """Everything that `Stage.make` may read.

    Attributes:
        config: view of the declared keys.
        data_root: the dataset's folder.
        stages_root: the folder of all stages, which workers find.
        depot: copies of the stages in an object store; None = machines share the folder.
        lock: `StageStore.lock`.
        folders: declared stage -> folder of its result.
        tables: declared table -> function that reads it.
        fingerprints: of what users bring, by `SOURCES`.
    """

    stage: str
    config: Config
    data_root: Path
    stages_root: Path
    depot: Depot | None
    lock: Callable[[str], Any]
    folders: Mapping[str, Path]
    tables: Mapping[str, Callable[[], pa.Table]]
    fingerprints: Mapping[str, str]

    def input(self, name: str) -> Path:
        """Return the folder of a finished stage."""
        folder: Path = self._declared(self.folders, name)
        return folder

    def has(self, name: str) -> bool:
        """Return whether a stage is an input in this config."""
        return name in self.folders

    @property
    def manifest(self) -> pa.Table:
        """The dataset's rows; needs the input `DATASET`."""
        return self._declared(self.tables, DATASET)()

    @property
    def caption_files(self) -> pa.Table:
        """The captions of files, which captioners learn from; needs the input `CAPTION_FILES`."""
        return self._declared(self.tables, CAPTION_FILES)()

    @property
    def captions(self) -> pa.Table:
        """The captions of the run: of files, or of the stage that writes them; needs `captions_input`."""
        return self._declared(self.tables, CAPTIONS)()

    def _declared(self, inputs: Mapping[str, Any], name: str) -> Any:
        if name not in inputs:
            raise UndeclaredInputError(
                f"stage {self.stage}: expected an input that it declares, got {name}. Add it to the stage's `inputs`."
            )
        return inputs[name]

    def share(self, *paths: Path) -> None:
        """Let workers on other machines find what the driver wrote."""
        if self.depot is not None:
            for path in paths:
                self.depot.push(path)

    def bring(self, *paths: Path) -> None:
        """Fetch what workers wrote into the copy of the stage's folder."""
        if self.depot is not None:
            for path in paths:
                self.depot.pull(path)


def captions_input(config: Config) -> str:
    """Return the input that holds the captions of every image."""
    return CAPTION_FILES if config.caption.source == "files" else CAPTIONS


def network_stage(config: Config) -> str:
    """Return the stage that ends with the network that is evaluated."""
    return "text" if config.model.trained is None else "trained"


def evaluated_splits(manifest: pa.Table, config: Config) -> tuple[Split, ...]:
    """Return the identities that can be evaluated: validation ones only where there are some that nothing learned."""
    if config.model.trained is not None:
        return ("test",)
    learned = config.train.base.use_val or config.train.text.use_val
    return ("test",) if learned or not select(manifest, split="val").num_rows else ("val", "test")
