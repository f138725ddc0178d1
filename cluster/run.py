"""The main job: all stages from a dataset's folder to the report. Finished stages are skipped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
from rich.console import Console

from cluster.events import Events
from cluster.machines.room import require_room
from cluster.places.depot import runs_depot, stages_depot
from cluster.progress import watch
from cluster.session import session
from cluster.stages.captions import captions_path
from cluster.stages.learning import METRICS_FILE, Learning, follow, write_records
from cluster.stages.memory import require_memory
from cluster.stages.registry import STAGES, stage_fingerprints, stages_of
from cluster.stages.report import versions
from cluster.stages.results import read_evaluator
from cluster.stages.stage import (
    ATTRIBUTES,
    CAPTION_FILES,
    CAPTIONS,
    DATASET,
    HUMAN_TEXTS,
    MODEL,
    SOURCES,
    StageJob,
    captions_input,
    evaluated_splits,
    network_stage,
    view_of,
)
from cluster.stages.store import StageStore
from cluster.trackers import check_trackers, log_record, log_results, trackers
from tvilfm.config import Config, to_yaml
from tvilfm.data.manifest import fingerprint, select
from tvilfm.data.splits import TEST_SPLITS
from tvilfm.datasets import read_dataset
from tvilfm.datasets.caption_files import read_captions
from tvilfm.datasets.human_texts import read_human_texts
from tvilfm.datasets.synthetic.layouts import SIZES, read_truth, write_sysu_layout
from tvilfm.evaluation.evaluator import Evaluator
from tvilfm.evaluation.feasibility import require_feasible
from tvilfm.evaluation.provenance import Provenance
from tvilfm.evaluation.results import RESULTS_FILES, Results
from tvilfm.models.opening import model_fingerprint
from tvilfm.place import full_disk_named, write_whole
from tvilfm.terms import Record, Split

# Files of a run folder that are copied to an object store; stages have their own copies.
RUN_FILES = ("config.yaml", "run.json", "events.jsonl", METRICS_FILE, *RESULTS_FILES.values(), "report/index.html")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a run.

    Attributes:
        path: the run folder.
        made: stages that were computed now, in order; the others were finished before.
        stages: folders of the requested stages.
        results: the table; None when the run ended before it.
        notes: what is known of a model that was not trained in this run.
    """

    path: Path
    made: tuple[str, ...]
    stages: Mapping[str, Path]
    results: Results | None
    notes: Sequence[str] = ()


def run(
    config: Config,
    *,
    until: str = "report",
    without: str | None = None,
    console: Console | None = None,
    listener: Callable[[Record], None] | None = None,
    group: str | None = None,
) -> Outcome:
    """Run up to a stage. Finished stages are skipped.

    Args:
        config: the run.
        until: the last stage, a key of `STAGES`.
        without: an earlier stage that is not needed.
        console: where finished stages are reported; None = standard error.
        listener: called with every epoch of both training stages, those of earlier attempts included.
        group: the sweep that the run is a trial of.

    Returns:
        The stages that were computed, and the results if they exist.

    Raises:
        ValueError: a dataset, caption file or weight file that is not what it should be.
        ray.train.TrainingFailedError: a training worker failed more often than `cluster.max_failures`.
    """
    check_trackers(config.run.trackers)
    with full_disk_named(config.run.path, "the run"):
        return _Job(config, console or Console(stderr=True), listener, group).run(until, without)


def evaluator_of(config: Config, split: Split = "test") -> Evaluator:
    """Return the evaluator of a run whose features are finished."""
    return _Job(config, Console(quiet=True)).evaluator(split)


def learning_of(config: Config) -> list[Record]:
    """Return the epochs of a run's training stages so far; the run may be unfinished."""
    job = _Job(config, Console(quiet=True))
    return Learning(job.store, config).records()


class _Job:
    """One run: its tables, its stage store, and how each stage is computed."""

    def __init__(
        self,
        config: Config,
        console: Console,
        listener: Callable[[Record], None] | None = None,
        group: str | None = None,
    ) -> None:
        self.config, self.console, self.listener, self.group = config, console, listener, group
        make_synthetic(config, console)
        self.manifest = read_dataset(config.data.name, config.data_root, **config.data.reader_options)
        self.sources = {DATASET: fingerprint(self.manifest, root=config.data_root)}
        self.caption_files = self._read_caption_files()
        if self.caption_files is not None:
            self.sources[CAPTION_FILES] = fingerprint(self.caption_files)
        self.human_texts = None
        if "human" in config.evaluate.text_sources and config.data.human_texts is not None:
            self.human_texts = read_human_texts(config.data.human_texts, self.manifest)
            self.sources[HUMAN_TEXTS] = fingerprint(self.human_texts)
        self.attributes = None
        if config.evaluate.reads_attributes:
            truth = read_truth(config.data_root)
            self.attributes = pa.Table.from_pylist([{"pid": pid, **of_pid} for pid, of_pid in truth.items()])
            self.sources[ATTRIBUTES] = fingerprint(self.attributes)
        if config.model.trained is not None:
            self.sources[MODEL] = model_fingerprint(config.model.trained)
        self.events = Events(config.run.path / "events.jsonl", run=config.run.name, sweep=group)
        self.depot = stages_depot(config, group)
        self.store = StageStore(config.stages_path, stage_fingerprints(config, self.sources), self.depot)

    def _read_caption_files(self) -> pa.Table | None:
        """Read captions from files: of all images, or of those that captioners are trained on."""
        source = self.config.caption.source
        if source == "captioner":
            return None
        images = self.manifest
        if self.config.model.trained is not None:
            images = select(images, split=TEST_SPLITS)
        if source == "finetuned":
            gray = self.config.caption.train.infrared_pairs == "gray"
            images = select(images, split=("train", "val"), modality="visible" if gray else None)
        return read_captions(images, self.config.data_root, self.config.data.captions)

    @cached_property
    def captions(self) -> pa.Table:
        """The captions that the run uses. Generated captions exist after their stage."""
        if self.config.caption.source == "files":
            return self.caption_files
        path = captions_path(self.store.path("captions"), self.config)
        return read_captions(self.manifest, self.config.data_root, path)

    def run(self, until: str, without: str | None) -> Outcome:
        wanted = [name for name in self._wanted(until) if name != without]
        self._write_run_folder()
        made: list[str] = []
        learning = Learning(self.store, self.config)
        if any(not self.store.has(name) for name in wanted):
            require_feasible(self.config, self.manifest, self.caption_files)
        if self.listener or any(not self.store.has(name) for name in wanted):
            with session(self.config.cluster), trackers(self.config, group=self.group) as opened:
                if any(not self.store.has(name) and STAGES[name].trains for name in wanted):
                    require_room(self.config.cluster)
                require_memory(self.config, self.manifest, [name for name in wanted if not self.store.has(name)])

                def told(record: Record) -> None:
                    log_record(opened, record)
                    if self.listener:
                        self.listener(record)

                with follow(learning, told):
                    made = [name for name in wanted if self._ensure(name)]
                if "results" in wanted:
                    steps = [int(record["step"]) for record in learning.records()]
                    log_results(opened, self._results(), max(steps, default=0))
        path = self.config.run.path
        results = None
        if "results" in wanted:
            results = self._results()
            for split in evaluated_splits(self.manifest, self.config):
                self._results(split).write(path / RESULTS_FILES[split])
        if "report" in wanted:
            (path / "report").mkdir(exist_ok=True)
            page = (self.store.path("report") / "index.html").read_bytes()
            (path / "report" / "index.html").write_bytes(page)
        write_records(path / METRICS_FILE, learning.records())
        if (depot := runs_depot(self.config, self.group)) is not None:
            for file in (path.absolute() / name for name in RUN_FILES):
                if file.exists():
                    depot.push(file)
        stages = {name: self.store.path(name) for name in wanted}
        notes: Sequence[str] = ()
        if "trained" in stages:
            notes = Provenance.read(stages["trained"]).notes(self.config.data, self.manifest)
        return Outcome(path=path, made=tuple(made), stages=stages, results=results, notes=notes)

    def _wanted(self, until: str) -> list[str]:
        """Return the names of the stages up to `until`."""
        last = list(STAGES).index(until)
        return [name for name in stages_of(self.config) if list(STAGES).index(name) <= last]

    def _ensure(self, name: str) -> bool:
        stage = STAGES[name]

        def make(folder: Path) -> None:
            started = time.monotonic()
            shown = watch(folder / "progress.json", name, stage.unit) if stage.unit else nullcontext()
            with self.events.around("stage", stage=name), shown, full_disk_named(folder, f"the stage {name}"):
                stage.make(folder, self._stage_job(name))
            (folder / "seconds.json").write_text(json.dumps(round(time.monotonic() - started, 1)))

        made = self.store.ensure(name, make)
        if not made:
            self.console.print(f"{name}: finished already", style="dim", highlight=False)
        return made

    def _stage_job(self, name: str) -> StageJob:
        """Return what a stage may read: the keys and inputs that it declares."""
        stage = STAGES[name]
        inputs = stage.inputs(self.config)
        tables: dict[str, Callable[[], pa.Table]] = {
            DATASET: lambda: self.manifest,
            CAPTION_FILES: lambda: self.caption_files,
            HUMAN_TEXTS: lambda: self.human_texts,
            ATTRIBUTES: lambda: self.attributes,
        }
        tables = {table: read for table, read in tables.items() if table in inputs}
        if captions_input(self.config) in inputs:
            tables[CAPTIONS] = lambda: self.captions
        return StageJob(
            stage=name,
            config=view_of(self.config, name, stage.keys),
            data_root=self.config.data_root,
            stages_root=self.store.root,
            depot=self.depot,
            lock=self.store.lock,
            folders={one: self.store.path(one) for one in inputs if one not in SOURCES},
            tables=tables,
            fingerprints=self.sources,
        )

    def _results(self, split: Split = "test") -> Results:
        return Results.read(self.store.path("results") / RESULTS_FILES[split])

    def evaluator(self, split: Split = "test") -> Evaluator:
        network, features = self.store.path(network_stage(self.config)), self.store.path("features")
        return read_evaluator(self.config, self.manifest, network=network, features=features, split=split)

    def _write_run_folder(self) -> None:
        path = self.config.run.path
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / "config.yaml", to_yaml(self.config))
        info = {
            "seed": self.config.run.seed,
            "versions": versions(),
            "fingerprints": self.sources,
            "stages": {name: os.path.relpath(self.store.path(name), path) for name in self._wanted("report")},
        }
        write_whole(path / "run.json", json.dumps(info, indent=2))


def make_synthetic(config: Config, console: Console) -> None:
    """Render the synthetic benchmark into `data.root` if the run uses it and the folder does not exist."""
    if config.data.name != "synthetic" or config.data_root.exists():
        return
    size = config.data.synthetic.size
    console.print(f"data: rendering the synthetic benchmark ({size}) into {config.data_root}", highlight=False)
    config.data_root.parent.mkdir(parents=True, exist_ok=True)
    write_sysu_layout(config.data_root, SIZES[size], seed=config.data.synthetic.seed)
