"""The stage that evaluates all protocols and computes the metrics."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.stages.stage import DATASET, Stage, StageJob, evaluated_splits, network_stage
from tvilfm.config import Config
from tvilfm.evaluation.evaluator import Evaluator
from tvilfm.evaluation.features import IMAGES_FILE, FeatureTable
from tvilfm.evaluation.query_texts import QUERY_TEXTS_FILE
from tvilfm.evaluation.results import RESULTS_FILES
from tvilfm.models import TVILFM
from tvilfm.report.build import build_results
from tvilfm.terms import Split


class EvaluateResults(Stage):
    """Evaluate every protocol, query and text source on test and validation identities."""

    name = "results"
    keys = ("data.name", "evaluate", "loss.filter_text", "train.base.use_val", "train.text.use_val")

    def inputs(self, config: Config) -> tuple[str, ...]:
        return (DATASET, network_stage(config), "features")

    def make(self, folder: Path, job: StageJob) -> None:
        validation = None
        for split in sorted(evaluated_splits(job.manifest, job.config), key=("val", "test").index):
            results = build_results(job_evaluator(job, split), job.config, validation=validation)
            results.write(folder / RESULTS_FILES[split])
            validation = results


def job_evaluator(job: StageJob, split: Split = "test") -> Evaluator:
    """Return the evaluator of a stage that has the inputs of `results`."""
    network = job.input(network_stage(job.config))
    return read_evaluator(job.config, job.manifest, network=network, features=job.input("features"), split=split)


def read_evaluator(
    config: Config, manifest: pa.Table, *, network: Path, features: Path, split: Split = "test"
) -> Evaluator:
    """Return the evaluator of a run from the folders of its finished stages `network_stage` and `features`."""
    sentences = features / "texts.parquet"
    return Evaluator(
        TVILFM.from_pretrained(network / "model").eval(),
        manifest,
        pq.read_table(features / QUERY_TEXTS_FILE),
        FeatureTable.read(features / IMAGES_FILE),
        FeatureTable.read(sentences) if sentences.exists() else None,
        config.evaluate,
        filter_text=config.loss.filter_text,
        split=split,
    )
