"""The text stage: train text tower and head with a frozen visual part (IFS)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray.train.torch

from cluster.places.depot import Depot
from cluster.stages.stage import Stage, StageJob, captions_input
from cluster.stages.trainer import Reporter, fit_network, last_checkpoint, read_job, read_pixels
from cluster.stages.views import Views
from tvilfm.config import Config
from tvilfm.data.tri_modal import RECIPES
from tvilfm.evaluation.features import IMAGES_FILE, FeatureTable
from tvilfm.models import TVILFM
from tvilfm.terms import Record
from tvilfm.training.stages import StageData, train_text


class Text(Stage):
    """Train the text tower and the head on the base stage's network."""

    name = "text"
    keys = (
        *("run.seed", "data.name", "data.pad", "train.p", "train.k", "train.autocast", "train.text"),
        *("loss", "optim", "model.text", "evaluate.witness_draw"),
    )
    unit = "steps"
    trains = True

    def applies(self, config: Config) -> bool:
        return config.model.trained is None

    def inputs(self, config: Config) -> tuple[str, ...]:
        views = ("views",) if Views().applies(config) else ()
        return ("pixels", "base", *views, captions_input(config))

    def make(self, folder: Path, job: StageJob) -> None:
        captions = folder.absolute() / "captions.parquet"
        pq.write_table(job.captions, captions)
        job.share(captions)
        names = [name for name in ("pixels", "base", "views") if job.has(name)]
        inputs = {name: str(job.input(name)) for name in names} | {"captions": str(captions)}
        fit_text(folder, job.config, inputs, job.depot)


def fit_text(folder: Path, config: Config, inputs: dict[str, str], depot: Depot | None = None) -> None:
    """Train the text stage on Ray Train; arguments as in `fit_network`.

    The inputs are `pixels`, `base`, `captions` (a caption table) and, if views are cached, `views`.
    """
    fit_network(_worker, folder, config, inputs, depot)


def _worker(job: dict[str, Any]) -> list[Record]:
    """Return the records of all epochs."""
    config, folder, inputs = read_job(job)
    manifest, pixels = read_pixels(inputs["pixels"])
    images = views = None
    if "views" in inputs:
        images = FeatureTable.read(inputs["views"] / IMAGES_FILE)
        views = {recipe: np.load(inputs["views"] / f"{recipe}.npy", mmap_mode="r") for recipe in RECIPES}
    data = StageData(manifest=manifest, pixels=pixels, captions=pq.read_table(inputs["captions"]), images=images)
    base = TVILFM.from_pretrained(inputs["base"] / "model")
    device = ray.train.torch.get_device()
    with last_checkpoint() as resume:
        reporter = Reporter(folder, config.train.text.epochs, resume)
        train_text(config, data, base=base, views=views, device=device, listener=reporter, resume=resume)
    return reporter.records
