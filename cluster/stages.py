"""Stages of a run: what each depends on, where its result lies, and whether it is there.

A stage's folder carries a fingerprint of everything that can change its result: the config keys it reads, the dataset,
and the stages it builds on. A changed key so re-does exactly the stages that depend on it, and a sweep whose trials
share a stages folder shares every stage they have in common. A stage works in `<folder>.partial` and is renamed when
it is done: a folder without the suffix is complete, whatever was killed when. While it works it holds the stage's
lock, so that of several trials that need a stage one makes it and the others wait; a killed holder's lock is free.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.depot import UNFINISHED, Depot
from tvilfm.config import Config, value_at

FORMAT = 3  # raise when a stage's files or meaning change, so that older folders are not taken for new ones


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The config keys (dotted, whole sections allowed) and earlier stages that decide a stage's result."""

    keys: tuple[str, ...]
    needs: tuple[str, ...] = ()


_BATCHES = ("run.seed", "data.pad", "train.p", "train.k", "train.autocast")
_LOSSES = ("loss.id_weight", "loss.wrt_weight", "loss.wrt_numerics", "loss.center_weight")
_VISUAL_OPTIM = ("optim.lr", "optim.head_lr_factor", "optim.weight_decay")

_CAPTIONER = ("caption.train", "caption.dtype", "caption.seed")

STAGES: dict[str, Stage] = {
    "pixels": Stage(keys=("data.height", "data.width"), needs=("dataset",)),
    "captioner_visible": Stage(keys=(*_CAPTIONER, "caption.visible"), needs=("pixels", "captions")),
    "captioner_infrared": Stage(keys=(*_CAPTIONER, "caption.infrared"), needs=("pixels", "captions")),
    "captions": Stage(
        keys=(
            *("caption.source", "caption.visible", "caption.infrared", "caption.batch", "caption.dtype"),
            *("caption.filter_colors", "caption.rephrase", "caption.seed"),
        ),
        needs=("dataset", "captioner_visible", "captioner_infrared"),
    ),
    "pretrain": Stage(
        # Not run.seed: it stands in for ImageNet's weights, which are the same file under every seed.
        keys=("model.backbone", "data.height", "data.width", "data.pad", "train.pretrain"),
    ),
    "base": Stage(
        keys=(*_BATCHES, *_LOSSES, *_VISUAL_OPTIM, "model.backbone", "model.weights", "train.base"),
        needs=("pixels", "pretrain"),
    ),
    "views": Stage(keys=("run.seed", "data.pad", "train.text.cache_views", "train.text.use_val"), needs=("base",)),
    "text": Stage(keys=(*_BATCHES, "loss", "optim", "model.text", "train.text"), needs=("views", "captions")),
    "features": Stage(
        keys=("run.seed", "evaluate.protocols", "evaluate.text_sources", "evaluate.batch"), needs=("text", "captions")
    ),
    "results": Stage(keys=("evaluate", "run.seed", "loss.filter_text"), needs=("features",)),
    "report": Stage(keys=(), needs=("results",)),
}


def stages_of(config: Config) -> list[str]:
    """The stages that a run has, in order."""
    without = set()
    if config.caption.source != "finetuned":
        without |= {"captioner_visible", "captioner_infrared"}
    if config.caption.source == "files":
        without.add("captions")
    if config.model.weights != "attributes":
        without.add("pretrain")
    if not config.train.text.cache_views:
        without.add("views")
    return [name for name in STAGES if name not in without]


def stage_fingerprints(config: Config, dataset: Mapping[str, str]) -> dict[str, str]:
    """The fingerprint of every stage.

    Args:
        config: the run.
        dataset: fingerprints of what lies on disk: `dataset` (rows and files) and `captions` (of caption files, where
            they are read; a run that writes its own captions goes by those from then on).

    Returns:
        Stage name -> 12 hexadecimal digits, of the stages that the run has.
    """
    values = config.model_dump(mode="json")
    found = dict(dataset)
    names = stages_of(config)
    for name in names:
        stage = STAGES[name]
        inputs = {key: value_at(values, key) for key in stage.keys}
        needs = {need: found[need] for need in stage.needs if need in found}
        text = json.dumps({"format": FORMAT, "stage": name, "keys": inputs, "needs": needs}, sort_keys=True)
        found[name] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return {name: found[name] for name in names}


class StageStore:
    """Finished stages under one folder.

    Args:
        root: the folder.
        fingerprints: of `stage_fingerprints`.
        depot: copies of the stages; None = there are none.
    """

    def __init__(self, root: Path, fingerprints: Mapping[str, str], depot: Depot | None = None) -> None:
        self.root = root.absolute()  # workers run in other folders
        self._fingerprints, self._depot = dict(fingerprints), depot

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
        path = self.root / ".locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
