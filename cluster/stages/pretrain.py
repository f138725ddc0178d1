"""The stage that pre-trains a backbone on attributes of rendered people, the offline stand-in for ImageNet weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train.torch
import torch
from safetensors.torch import save

from cluster.places.depot import Depot
from cluster.progress import ProgressFile
from cluster.stages.pixels import decode_dataset
from cluster.stages.stage import Stage, StageJob
from cluster.stages.trainer import fit, read_job, read_pixels
from tvilfm.config import Config
from tvilfm.data.manifest import select
from tvilfm.datasets import read_dataset
from tvilfm.datasets.synthetic.layouts import Size, write_sysu_layout
from tvilfm.models.backbone import DualStemResNet
from tvilfm.training.pretrain import attribute_labels, pretrain

FILE = "backbone.safetensors"


class Pretrain(Stage):
    """Train the backbone to name the attributes of people whom no other split has."""

    name = "pretrain"
    # Not run.seed: it stands in for ImageNet's weights, which are the same file under every seed.
    keys = ("model.backbone", "data.height", "data.width", "data.pad", "train.pretrain")
    unit = "steps"

    def applies(self, config: Config) -> bool:
        return config.model.weights == "attributes" and config.model.trained is None

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ()

    def make(self, folder: Path, job: StageJob) -> None:
        section = job.config.train.pretrain
        truth = job.stages_root / f"pretrain-people-{section.identities}-{section.seed}"
        with job.lock(truth.name):
            if not truth.exists():
                size = Size(train=section.identities, val=1, test=1, images_per_camera=1)
                write_sysu_layout(truth, size, seed=section.seed, archetypes=False)
        manifest = select(read_dataset("synthetic", truth), split="train")
        decode_dataset(folder, truth, manifest, job.config.data)
        job.share(folder, truth / "attributes.json")
        fit_pretrain(folder, job.config, {"pixels": str(folder), "truth": str(truth)}, job.depot)
        (folder / "pixels.npy").unlink()


def fit_pretrain(folder: Path, config: Config, inputs: dict[str, str], depot: Depot | None = None) -> None:
    """Pre-train on Ray Train, with one worker, and leave `backbone.safetensors`.

    Args:
        folder: the stage's working folder; without a depot, on storage that every node sees.
        config: the run.
        inputs: `pixels` (folder of `pixels.npy` and `manifest.parquet`) and `truth` (folder of `attributes.json`).
        depot: where workers find the inputs that are not on their machine; None = in folders.
    """
    job = {"folder": str(folder), "config": config, "inputs": inputs, "depot": depot}
    backbone, _ = fit(_worker, job, folder, config.cluster, workers=1, depot=depot)
    (folder / FILE).write_bytes(backbone)


def _worker(job: dict[str, Any]) -> bytes:
    """Return the backbone's safetensors file."""
    config, folder, inputs = read_job(job)
    manifest, pixels = read_pixels(inputs["pixels"])
    section = config.train.pretrain
    torch.manual_seed(section.seed)
    backbone = DualStemResNet(config.model.backbone)
    progress = ProgressFile(folder / "progress.json")

    def on_step(record: Mapping[str, float | int]) -> None:
        progress.update(int(record["step"]), int(record["num_steps"]), f"loss {record['loss']:.3f}")

    pretrain(
        backbone,
        manifest,
        pixels,
        attribute_labels(inputs["truth"], manifest),
        section,
        pad=config.data.pad,
        seed=section.seed,
        device=ray.train.torch.get_device(),
        on_step=on_step,
    )
    return save({key: value.detach().cpu().contiguous() for key, value in backbone.state_dict().items()})
