"""The stage that writes the HTML report of a run."""

from __future__ import annotations

import json
import platform
from pathlib import Path

from cluster.stages.learning import METRICS_FILE, TRAINED, numbered, read_records
from cluster.stages.results import job_evaluator
from cluster.stages.stage import DATASET, Stage, StageJob, captions_input, network_stage
from tvilfm.captioning.scores import Marks
from tvilfm.config import Config
from tvilfm.data.pixels import open_pixels
from tvilfm.evaluation.provenance import Provenance
from tvilfm.evaluation.results import RESULTS_FILES, Results
from tvilfm.report.build import RunFacts, build_report
from tvilfm.report.page import write_report
from tvilfm.terms import MODALITIES
from tvilfm.versions import version_of

PACKAGES = ("ray", "torch", "torchvision", "open_clip_torch", "transformers", "pyarrow", "numpy", "scikit-learn")


class Report(Stage):
    """Write the page of a run, which shows all keys except those of `PLACEMENT`."""

    name = "report"
    keys = ("fidelity", "run", "data", "caption", "model", "loss", "optim", "train", "evaluate")

    def inputs(self, config: Config) -> tuple[str, ...]:
        captioners = tuple(f"captioner_{name}" for name in MODALITIES if config.caption.source == "finetuned")
        networks = TRAINED if config.model.trained is None else (network_stage(config),)
        return (DATASET, captions_input(config), *captioners, "pixels", *networks, "features", "results")

    def make(self, folder: Path, job: StageJob) -> None:
        learning = {name: read_records(job.input(name) / METRICS_FILE) for name in TRAINED if job.has(name)}
        facts = RunFacts(
            versions=versions(),
            dataset_fingerprint=job.fingerprints[DATASET],
            seconds=_seconds(job),
            learning=numbered(learning, base_epochs=job.config.train.base.epochs),
            provenance=_provenance(job),
        )
        report = build_report(
            Results.read(job.input("results") / RESULTS_FILES["test"]),
            job_evaluator(job),
            job.config,
            manifest=job.manifest,
            captions=job.captions,
            pixels=open_pixels(job.input("pixels") / "pixels.npy"),
            marks=_marks(job),
            facts=facts,
        )
        write_report(report, folder / "index.html")


def _provenance(job: StageJob) -> list[str]:
    if not job.has("trained"):
        return []
    return Provenance.read(job.input("trained")).notes(job.config.data, job.manifest)


def _marks(job: StageJob) -> dict[str, Marks]:
    folders = {name: f"captioner_{name}" for name in MODALITIES if job.has(f"captioner_{name}")}
    return {name: Marks.read(job.input(folder) / "marks.json") for name, folder in folders.items()}


def _seconds(job: StageJob) -> dict[str, float]:
    paths = {name: path / "seconds.json" for name, path in job.folders.items()}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package, and of packages that affect results."""
    return {"python": platform.python_version()} | {name: version_of(name) for name in ("tvilfm", *PACKAGES)}
