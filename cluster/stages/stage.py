"""Base class of stages: a stage declares the config keys and inputs that decide its result, and computes the result.

A stage can only read what it declares. `make` receives a view of the config in which undeclared keys raise
`UndeclaredKeyError`, and named inputs, of which undeclared ones raise `UndeclaredInputError`. So a forgotten key is an
error in the first run instead of an outdated result that is reused later.
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
HUMAN_TEXTS, ATTRIBUTES = "human_texts", "attributes"
SOURCES = (DATASET, CAPTION_FILES, HUMAN_TEXTS, ATTRIBUTES, MODEL)  # inputs that users provide; no stage computes them

# Keys for folders, machines and speed. Every stage may read them, and they are not part of its fingerprint: with other
# values, results are equal or differ only in the rounding of batched arithmetic. The contents of the files at
# `data.root` (with the rows that `data.distractors` adds), `data.captions`, `data.human_texts` and `model.trained` are
# inputs.
PLACEMENT = (
    *("run.dir", "run.stages_dir", "run.trackers", "run.mlflow_uri"),
    *("data.root", "data.captions", "data.human_texts", "data.distractors", "data.decode_batch", "model.trained"),
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
    """View of a config section that contains only the declared keys."""

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
        """Return the declared values of the whole config as nested dictionaries, without the keys of `PLACEMENT`."""
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
        name: name of the stage and of its folder.
        keys: dotted config keys or whole sections that decide the result, in addition to the inputs.
        unit: unit of the progress line, in plural; empty = no progress line.
        trains: whether it needs `cluster.train_workers` at the same time.
    """

    name: str
    keys: tuple[str, ...]
    unit: str = ""
    trains: bool = False

    def applies(self, config: Config) -> bool:
        """Return whether a run of this config has the stage."""
        return True

    @abstractmethod
    def inputs(self, config: Config) -> tuple[str, ...]:
        """Return the inputs: names of stages whose results this stage reads, and names of `SOURCES`."""

    @abstractmethod
    def make(self, folder: Path, job: StageJob) -> None:
        """Write the result to the folder, which may hold files of an interrupted attempt."""


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """Everything that `Stage.make` may read.

    Attributes:
        config: view of the declared keys.
        data_root: folder of the dataset.
        stages_root: folder of all stages, which workers can read.
        depot: copies of the stages in an object store; None = machines share the folder.
        lock: `StageStore.lock`.
        folders: declared stage -> folder of its result.
        tables: declared table -> function that reads it.
        fingerprints: name of `SOURCES` -> fingerprint of the input.
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
        """Return the rows of the dataset; requires the input `DATASET`."""
        return self._declared(self.tables, DATASET)()

    @property
    def caption_files(self) -> pa.Table:
        """Return the captions from files, on which captioners are trained; requires the input `CAPTION_FILES`."""
        return self._declared(self.tables, CAPTION_FILES)()

    @property
    def captions(self) -> pa.Table:
        """Return the captions of the run, from files or the stage `captions`; requires the input `captions_input`."""
        return self._declared(self.tables, CAPTIONS)()

    @property
    def human_texts(self) -> pa.Table:
        """Return people's own sentences, `pid` and `text`; requires the input `HUMAN_TEXTS`."""
        return self._declared(self.tables, HUMAN_TEXTS)()

    @property
    def attributes(self) -> pa.Table:
        """Return the true attributes of people, `pid` and one column each; requires the input `ATTRIBUTES`."""
        return self._declared(self.tables, ATTRIBUTES)()

    def _declared(self, inputs: Mapping[str, Any], name: str) -> Any:
        if name not in inputs:
            raise UndeclaredInputError(
                f"stage {self.stage}: expected an input that it declares, got {name}. Add it to the stage's `inputs`."
            )
        return inputs[name]

    def share(self, *paths: Path) -> None:
        """Copy files of the driver to the depot, so that workers on other machines can read them."""
        if self.depot is not None:
            for path in paths:
                self.depot.push(path)

    def bring(self, *paths: Path) -> None:
        """Fetch files that workers wrote to the depot into the stage's folder."""
        if self.depot is not None:
            for path in paths:
                self.depot.pull(path)


def captions_input(config: Config) -> str:
    """Return the name of the input with the captions of all images."""
    return CAPTION_FILES if config.caption.source == "files" else CAPTIONS


def network_stage(config: Config) -> str:
    """Return the name of the stage whose result is the network to evaluate."""
    return "text" if config.model.trained is None else "trained"


def evaluated_splits(manifest: pa.Table, config: Config) -> tuple[Split, ...]:
    """Return the splits to evaluate: `test`, and `val` if it has identities that were not trained on."""
    if config.model.trained is not None:
        return ("test",)
    learned = config.train.base.use_val or config.train.text.use_val
    return ("test",) if learned or not select(manifest, split="val").num_rows else ("val", "test")
