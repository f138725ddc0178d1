"""The base stage: train backbone, GeM and head on images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray.train.torch
from safetensors.torch import load_file

from cluster.places.depot import Depot
from cluster.stages.pretrain import FILE
from cluster.stages.stage import Stage, StageJob
from cluster.stages.trainer import Reporter, fit_network, last_checkpoint, read_job, read_pixels
from tvilfm.config import Config
from tvilfm.data.manifest import CAPTION_SCHEMA
from tvilfm.terms import Record
from tvilfm.training.stages import StageData, train_base


class Base(Stage):
    """Train backbone, GeM and head on images only."""

    name = "base"
    keys = (
        *("run.seed", "data.name", "data.pad", "train.p", "train.k", "train.autocast", "train.base"),
        *("loss.id_weight", "loss.wrt_weight", "loss.wrt_numerics", "loss.center_weight"),
        *("optim.lr", "optim.head_lr_factor", "optim.weight_decay", "model.backbone", "model.weights"),
    )
    unit = "steps"
    trains = True

    def applies(self, config: Config) -> bool:
        return config.model.trained is None

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("pixels", *(("pretrain",) if config.model.weights == "attributes" else ()))

    def make(self, folder: Path, job: StageJob) -> None:
        names = [name for name in ("pixels", "pretrain") if job.has(name)]
        fit_base(folder, job.config, {name: str(job.input(name)) for name in names}, job.depot)


def fit_base(folder: Path, config: Config, inputs: dict[str, str], depot: Depot | None = None) -> None:
    """Train the base stage on Ray Train; arguments as in `fit_network`, inputs `pixels` and optionally `pretrain`."""
    fit_network(_worker, folder, config, inputs, depot)


def _worker(job: dict[str, Any]) -> list[Record]:
    """Return the records of all epochs."""
    config, folder, inputs = read_job(job)
    manifest, pixels = read_pixels(inputs["pixels"])
    data = StageData(manifest=manifest, pixels=pixels, captions=CAPTION_SCHEMA.empty_table())
    backbone = load_file(inputs["pretrain"] / FILE) if "pretrain" in inputs else None
    device = ray.train.torch.get_device()
    with last_checkpoint() as resume:
        reporter = Reporter(folder, config.train.base.epochs, resume)
        train_base(config, data, backbone=backbone, device=device, listener=reporter, resume=resume)
    return reporter.records
