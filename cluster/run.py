"""The main job: every stage from a dataset's folder to the report, each skipped when its result is there."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from cluster.caption import caption_images
from cluster.depot import below, runs_depot, stages_depot
from cluster.events import Events
from cluster.features import Images, write_features, write_views
from cluster.learning import METRICS_FILE, Learning, Record, follow, write_records
from cluster.pixels import decode_dataset
from cluster.progress import ProgressFile, watch
from cluster.rephrase import rephrase_table
from cluster.session import session
from cluster.stages import STAGES, StageStore, stage_fingerprints, stages_of
from cluster.trackers import check_trackers, log_record, log_results, trackers
from cluster.train import fit_stage
from tvilfm.captioning.scores import Marks
from tvilfm.config import Config, to_yaml
from tvilfm.datasets import read_dataset
from tvilfm.datasets.captions import read_captions
from tvilfm.datasets.manifest import MODALITIES, Modality, fingerprint, rows_of, select
from tvilfm.datasets.pixels import open_pixels
from tvilfm.datasets.splits import TEST_SPLITS
from tvilfm.datasets.synthetic import SIZES, Size, write_sysu_layout
from tvilfm.datasets.transforms import Recipe
from tvilfm.datasets.tri_modal import RECIPES, TrainingRows
from tvilfm.evaluation.evaluator import Evaluator, Split, all_texts
from tvilfm.evaluation.features import IMAGES_FILE, FeatureTable
from tvilfm.models import TVILFM
from tvilfm.report.build import RunFacts, build_report, build_results
from tvilfm.report.page import write_report
from tvilfm.report.tables import Results, write_text_atomic

UNITS = {
    "pixels": "images",
    "captioner_visible": "steps",
    "captioner_infrared": "steps",
    "captions": "images",
    "pretrain": "steps",
    "base": "steps",
    "views": "images",
    "text": "steps",
    "features": "rows",
}
RESULTS_FILES: dict[Split, str] = {"test": "results.json", "val": "validation.json"}
# What a reader wants of a run folder, the stages apart.
RUN_FILES = ("config.yaml", "run.json", "events.jsonl", METRICS_FILE, *RESULTS_FILES.values(), "report/index.html")
PACKAGES = ("ray", "torch", "torchvision", "open_clip_torch", "transformers", "pyarrow", "numpy", "scikit-learn")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did.

    Attributes:
        path: the run folder.
        made: stages made now, in order; the rest was there.
        stages: folders of the wanted stages.
        results: the table; None when the run ended before it.
    """

    path: Path
    made: tuple[str, ...]
    stages: Mapping[str, Path]
    results: Results | None


def run(
    config: Config,
    *,
    until: str = "report",
    without: str | None = None,
    console: Console | None = None,
    listener: Callable[[Record], None] | None = None,
    group: str | None = None,
) -> Outcome:
    """Bring a run up to a stage, making what is missing and nothing else.

    Args:
        config: the run.
        until: the last stage wanted, a key of `STAGES`.
        without: a stage before it that it does not need.
        console: told which stages are made and which were there; None = standard error.
        listener: told of every epoch of both training stages, also of those that were there.
        group: the sweep that the run is a trial of.

    Returns:
        What was made, and the results once they are there.

    Raises:
        ValueError: a dataset, caption file or weight file that is not what it should be.
        ray.train.TrainingFailedError: a training worker failed more often than `cluster.max_failures`.
    """
    check_trackers(config.run.trackers)
    return _Job(config, console or Console(stderr=True), listener, group).run(until, without)


def evaluator_of(config: Config, split: Split = "test") -> Evaluator:
    """The evaluator of a run whose features are made."""
    return _Job(config, Console(quiet=True)).evaluator(split)


def learning_of(config: Config) -> list[Record]:
    """The epochs of a run's training stages so far, wherever it stands."""
    job = _Job(config, Console(quiet=True))
    return Learning(job.store, config).records()


class _Job:
    """One run: its tables, its stage store, and how each stage is made."""

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
        self.dataset = {"dataset": fingerprint(self.manifest, root=config.data_root)}
        self.written = self._written_captions()
        if self.written is not None:
            self.dataset["captions"] = fingerprint(self.written)
        self.events = Events(config.run.path / "events.jsonl", run=config.run.name, sweep=group)
        self.depot = stages_depot(config, group)
        self.store = StageStore(config.stages_path, stage_fingerprints(config, self.dataset), self.depot)

    def _written_captions(self) -> pa.Table | None:
        """The captions of files: of every image, or of those that captioners learn from."""
        source = self.config.caption.source
        if source == "captioner":
            return None
        images = self.manifest
        if source == "finetuned":
            gray = self.config.caption.train.infrared_pairs == "gray"
            images = select(images, split=("train", "val"), modality="visible" if gray else None)
        return read_captions(images, self.config.data_root, self.config.data.captions)

    @cached_property
    def captions(self) -> pa.Table:
        """The captions that the run works with; generated ones are there after their stage."""
        if self.config.caption.source == "files":
            return self.written
        folder = self.store.path("captions")
        if self.config.caption.rephrase.engine != "none":
            folder = folder / "rephrased"
        return read_captions(self.manifest, self.config.data_root, folder / "captions.parquet")

    def run(self, until: str, without: str | None) -> Outcome:
        wanted = [name for name in self._wanted(until) if name != without]
        self._write_run_folder()
        made: list[str] = []
        learning = Learning(self.store, self.config)
        if self.listener or any(not self.store.has(name) for name in wanted):
            with session(self.config.cluster), trackers(self.config, group=self.group) as opened:

                def told(record: Record) -> None:
                    log_record(opened, record)
                    if self.listener:
                        self.listener(record)

                with follow(learning, told):
                    made = [name for name in wanted if self._ensure(name)]
                if "results" in wanted:
                    last = learning.records()[-1]
                    log_results(opened, self._results(), int(last["step"]))
        path = self.config.run.path
        results = None
        if "results" in wanted:
            results = self._results()
            for split in self._splits():
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
        return Outcome(
            path=path, made=tuple(made), stages={name: self.store.path(name) for name in wanted}, results=results
        )

    def _wanted(self, until: str) -> list[str]:
        """Stages up to `until`."""
        last = list(STAGES).index(until)
        return [name for name in stages_of(self.config) if list(STAGES).index(name) <= last]

    def _ensure(self, name: str) -> bool:
        make: Callable[[Path], None] = getattr(self, f"_make_{name}")

        def timed(folder: Path) -> None:
            started = time.monotonic()
            shown = watch(folder / "progress.json", name, UNITS[name]) if name in UNITS else nullcontext()
            with self.events.around("stage", stage=name), shown:
                make(folder)
            (folder / "seconds.json").write_text(json.dumps(round(time.monotonic() - started, 1)))

        made = self.store.ensure(name, timed)
        if not made:
            self.console.print(f"{name}: there already", style="dim", highlight=False)
        return made

    def _make_pixels(self, folder: Path) -> None:
        decode_dataset(folder, self.config.data_root, self.manifest, self.config.data)

    def _make_captioner_visible(self, folder: Path) -> None:
        self._fit_captioner(folder, "visible")

    def _make_captioner_infrared(self, folder: Path) -> None:
        self._fit_captioner(folder, "infrared")

    def _fit_captioner(self, folder: Path, modality: Modality) -> None:
        # Imported here: transformers takes seconds to import, and most runs train no captioner.
        from cluster.caption_train import fit_captioner

        pq.write_table(self.written, folder / "captions.parquet")
        inputs = {"pixels": self.store.path("pixels"), "captions": folder.absolute() / "captions.parquet"}
        if self.config.data.name == "synthetic":
            inputs["truth"] = self.config.data_root.absolute()
        self._share(folder / "captions.parquet")
        fit_captioner(folder, self.config, modality, {name: str(path) for name, path in inputs.items()}, self.depot)

    def _make_captions(self, folder: Path) -> None:
        section, progress = self.config.caption, ProgressFile(folder / "progress.json")
        if section.source == "finetuned":
            trained = {
                modality: getattr(section, modality).model_copy(
                    update={"model": str(self.store.path(f"captioner_{modality}") / "captioner"), "revision": None}
                )
                for modality in MODALITIES
            }
            section = section.model_copy(update=trained)
        rows, root = self.manifest.select(["image", "modality"]), str(self.config.data_root.absolute())
        # Workers write what they caption where the driver finds it.
        out = str(folder) if self.depot is None else self.depot.uri_of(folder)
        shared = {"cluster": self.config.cluster, "seed": section.seed, "progress": progress}
        summary = caption_images(rows, root, out, section, depot=self.depot, **shared)
        summary.check(section.max_bad_share)
        self._bring(folder / "captions.parquet", folder / "quarantine.parquet")
        if section.rephrase.engine != "none":
            table = read_captions(self.manifest, self.config.data_root, folder / "captions.parquet")
            rephrase_table(
                table,
                self.manifest["modality"].to_pylist(),
                below(out, "rephrased"),
                section.rephrase,
                dtype=section.dtype,
                **shared,
            )
            self._bring(folder / "rephrased" / "captions.parquet")

    def _make_pretrain(self, folder: Path) -> None:
        section = self.config.train.pretrain
        truth = self.store.root / f"pretrain-people-{section.identities}-{section.seed}"
        with self.store.lock(truth.name):
            if not truth.exists():
                size = Size(train=section.identities, val=1, test=1, images_per_camera=1)
                write_sysu_layout(truth, size, seed=section.seed, archetypes=False)
        manifest = select(read_dataset("synthetic", truth), split="train")
        decode_dataset(folder, truth, manifest, self.config.data)
        inputs = {"pixels": folder, "truth": truth}
        self._share(folder, truth / "attributes.json")
        fit_stage("pretrain", folder, self.config, {key: str(path) for key, path in inputs.items()}, self.depot)
        (folder / "pixels.npy").unlink()

    def _make_base(self, folder: Path) -> None:
        inputs = self._inputs("pixels", "pretrain", captions=folder)
        fit_stage("base", folder, self.config, inputs, self.depot)

    def _make_views(self, folder: Path) -> None:
        rows = TrainingRows.from_manifest(self.manifest, use_val=self.config.train.text.use_val)
        pixel_rows: dict[Recipe, list[int]] = {
            recipe: rows_of(self.manifest, rows.infrared if recipe == "infrared" else rows.visible).tolist()
            for recipe in RECIPES
        }
        write_views(
            folder, pixel_rows, self.config.train.text.cache_views, self._evaluated_images(), **self._pool("base")
        )

    def _make_text(self, folder: Path) -> None:
        inputs = self._inputs("pixels", "base", "views", captions=folder)
        fit_stage("text", folder, self.config, inputs, self.depot)

    def _make_features(self, folder: Path) -> None:
        images: Images = {}
        if "views" in stages_of(self.config):
            shutil.copy(self.store.path("views") / IMAGES_FILE, folder)
        else:
            images = self._evaluated_images()
        texts = {
            text
            for split in self._splits()
            for text in all_texts(
                self.manifest, self.captions, self.config.evaluate, seed=self.config.run.seed, split=split
            )
        }
        write_features(folder, images, sorted(texts), **self._pool("text"))

    def _evaluated_images(self) -> Images:
        images = {}
        for modality in MODALITIES:
            subset = select(self.manifest, split=("val", *TEST_SPLITS), modality=modality)
            images[modality] = (subset["image"].to_pylist(), rows_of(self.manifest, subset).tolist())
        return images

    def _make_results(self, folder: Path) -> None:
        for split in self._splits():
            build_results(self.evaluator(split), self.config).write(folder / RESULTS_FILES[split])

    def _make_report(self, folder: Path) -> None:
        facts = RunFacts(
            versions=self._versions(),
            dataset_fingerprint=self.dataset["dataset"],
            seconds=self._seconds(),
            learning=tuple(Learning(self.store, self.config).records()),
        )
        report = build_report(
            self._results(),
            self.evaluator(),
            self.config,
            manifest=self.manifest,
            captions=self.captions,
            pixels=open_pixels(self.store.path("pixels") / "pixels.npy"),
            marks=self._marks(),
            facts=facts,
        )
        write_report(report, folder / "index.html")

    def _results(self, split: Split = "test") -> Results:
        return Results.read(self.store.path("results") / RESULTS_FILES[split])

    def _marks(self) -> dict[str, Marks]:
        if self.config.caption.source != "finetuned":
            return {}
        return {name: Marks.read(self.store.path(f"captioner_{name}") / "marks.json") for name in MODALITIES}

    def evaluator(self, split: Split = "test") -> Evaluator:
        features = self.store.path("features")
        return Evaluator(
            TVILFM.from_pretrained(self.store.path("text") / "model").eval(),
            self.manifest,
            self.captions,
            FeatureTable.read(features / IMAGES_FILE),
            FeatureTable.read(features / "texts.parquet"),
            self.config.evaluate,
            filter_text=self.config.loss.filter_text,
            seed=self.config.run.seed,
            split=split,
        )

    def _splits(self) -> tuple[Split, ...]:
        """Identities that can be evaluated: validation ones only where there are some that nothing was trained on."""
        trained = self.config.train.base.use_val or self.config.train.text.use_val
        return ("test",) if trained or not select(self.manifest, split="val").num_rows else ("val", "test")

    def _inputs(self, *names: str, captions: Path) -> dict[str, str]:
        """Folders of finished stages that exist in this config, and the caption table written for the workers."""
        pq.write_table(self.captions, captions / "captions.parquet")
        self._share(captions / "captions.parquet")
        inputs = {name: str(self.store.path(name)) for name in names if name in self._wanted("text")}
        return inputs | {"captions": str(captions.absolute() / "captions.parquet")}

    def _pool(self, model: str) -> dict[str, object]:
        return {
            "model": self.store.path(model) / "model",
            "pixels": self.store.path("pixels") / "pixels.npy",
            "pad": self.config.data.pad,
            "seed": self.config.run.seed,
            "section": self.config.cluster,
            "depot": self.depot,
            "chunk_size": self.config.evaluate.batch,
        }

    def _share(self, *paths: Path) -> None:
        """Let workers on other machines find what the driver wrote."""
        if self.depot is not None:
            for path in paths:
                self.depot.push(path)

    def _bring(self, *paths: Path) -> None:
        """Fetch what workers wrote into the copy of a stage's folder."""
        if self.depot is not None:
            for path in paths:
                self.depot.pull(path)

    def _write_run_folder(self) -> None:
        path = self.config.run.path
        path.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path / "config.yaml", to_yaml(self.config))
        info = {
            "seed": self.config.run.seed,
            "versions": self._versions(),
            "fingerprints": self.dataset,
            "stages": {name: os.path.relpath(self.store.path(name), path) for name in self._wanted("report")},
        }
        write_text_atomic(path / "run.json", json.dumps(info, indent=2))

    def _versions(self) -> dict[str, str]:
        return {"python": platform.python_version()} | {
            name: importlib.metadata.version(name) for name in ("tvilfm", *PACKAGES)
        }

    def _seconds(self) -> dict[str, float]:
        paths = {name: self.store.path(name) / "seconds.json" for name in self._wanted("results")}
        return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def make_synthetic(config: Config, console: Console) -> None:
    """Render the synthetic benchmark into `data.root` when it is asked for and not there."""
    if config.data.name != "synthetic" or config.data_root.exists():
        return
    size = config.data.synthetic.size
    console.print(f"data: rendering the synthetic benchmark ({size}) into {config.data_root}", highlight=False)
    config.data_root.parent.mkdir(parents=True, exist_ok=True)
    write_sysu_layout(config.data_root, SIZES[size], seed=config.data.synthetic.seed)
