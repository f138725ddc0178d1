"""Training stages on Ray Train: workers, checkpoints, restarts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file, save_file

from cluster.progress import ProgressFile
from tvilfm.config import ClusterSection, Config
from tvilfm.datasets.pixels import open_pixels
from tvilfm.datasets.tri_modal import RECIPES
from tvilfm.models import TVILFM
from tvilfm.models.backbone import DualStemResNet
from tvilfm.training import stages
from tvilfm.training.pretrain import attribute_labels, pretrain


def fit_stage(name: str, folder: Path, config: Config, inputs: dict[str, str]) -> None:
    """Run a training stage on Ray Train and leave its network in `folder/model` (pretrain: `backbone.safetensors`).

    The run lives in `folder/train`; if an interrupted attempt left one there, it goes on from its last checkpoint.

    Args:
        name: pretrain, base or text.
        folder: the stage's working folder, on storage that every node sees.
        config: the run.
        inputs: name -> folder of what the stage reads (pixels, captions, pretrain, base, views).

    Raises:
        ray.train.TrainingFailedError: a worker failed more often than `cluster.max_failures`.
    """
    job = {
        "stage": name,
        "folder": str(folder),
        "config": config.model_dump(mode="json"),
        "inputs": inputs,
    }
    workers = 1 if name == "pretrain" else config.cluster.train_workers
    result = trainer_of(_worker, job, folder, config.cluster, workers=workers).fit()
    if name == "pretrain":
        return
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as checkpoint:
        model = TVILFM.from_pretrained(Path(checkpoint) / "best")
        progress = json.loads((Path(checkpoint) / "progress.json").read_text())
    model.save_pretrained(folder / "model")
    (folder / "selection.json").write_text(json.dumps(progress))


def trainer_of(
    worker: Callable[[dict[str, Any]], None],
    job: dict[str, Any],
    folder: Path,
    section: ClusterSection,
    *,
    workers: int,
) -> TorchTrainer:
    """A trainer whose run lives in `folder/train`, keeps its last checkpoint and restarts from it.

    Args:
        worker: what every worker runs.
        job: what it is told.
        folder: on storage that every node sees.
        section: CPUs and GPUs of a worker, and how often it may fail.
        workers: how many.
    """
    resources: dict[str, float] = {"CPU": section.cpus_per_train_worker}
    if section.gpus_per_worker:
        resources["GPU"] = section.gpus_per_worker
    return TorchTrainer(
        worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=section.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(folder),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=section.max_failures),
        ),
    )


@contextmanager
def last_checkpoint() -> Iterator[tuple[Path | None, int]]:
    """A worker's checkpoint to go on from, None at the start, and how many epochs it holds."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None, 0
        return
    with tempfile.TemporaryDirectory(prefix="tvilfm-resume-") as folder:
        resume = Path(checkpoint.to_directory(folder))
        yield resume, json.loads((resume / "progress.json").read_text())["epochs_done"]


class Reporter:
    """A worker's listener: tells Ray Train of epochs, and rank 0 writes metrics and progress beside the run."""

    def __init__(self, folder: Path, epochs: int, epochs_done: int) -> None:
        self._rank = ray.train.get_context().get_world_rank()
        self._metrics = folder / "metrics.jsonl"
        self._progress = ProgressFile(folder / "progress.json")
        self._epochs = epochs
        if self._rank == 0:
            # A killed attempt may have written epochs that its last checkpoint does not hold.
            kept = [line for line in self._lines() if json.loads(line)["epoch"] < epochs_done]
            self._metrics.write_text("".join(kept))

    def _lines(self) -> list[str]:
        return self._metrics.read_text().splitlines(keepends=True) if self._metrics.exists() else []

    def on_step(self, record: dict[str, float | int]) -> None:
        if self._rank == 0:
            steps = int(record["num_steps"])
            done = int(record["epoch"]) * steps + int(record["step"])
            terms = {key: value for key, value in record.items() if key in ("id", "wrt", "loss")}
            note = "  ".join(f"{key} {value:.3f}" for key, value in terms.items())
            self._progress.update(done, self._epochs * steps, note)

    def on_epoch(self, record: dict[str, float | int], checkpoint: Path | None) -> None:
        if checkpoint is None:
            ray.train.report(record)
            return
        with self._metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")
        ray.train.report(record, checkpoint=Checkpoint.from_directory(str(checkpoint)))


def _worker(job: dict[str, Any]) -> None:
    config = Config.model_validate(job["config"])
    folder, inputs = Path(job["folder"]), {name: Path(path) for name, path in job["inputs"].items()}
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_train_worker)))
    device = ray.train.torch.get_device()
    manifest = pq.read_table(inputs["pixels"] / "manifest.parquet")
    pixels = open_pixels(inputs["pixels"] / "pixels.npy")
    if job["stage"] == "pretrain":
        _pretrain(config, folder, inputs, manifest, pixels, device)
        return
    data = stages.StageData(manifest=manifest, pixels=pixels, captions=pq.read_table(inputs["captions"]))
    schedule = config.train.base if job["stage"] == "base" else config.train.text
    with last_checkpoint() as (resume, epochs_done):
        reporter = Reporter(folder, schedule.epochs, epochs_done)
        if job["stage"] == "base":
            backbone = None
            if "pretrain" in inputs:
                backbone = load_file(inputs["pretrain"] / "backbone.safetensors")
            stages.train_base(config, data, backbone=backbone, device=device, listener=reporter, resume=resume)
        else:
            views = None
            if "views" in inputs:
                views = {recipe: np.load(inputs["views"] / f"{recipe}.npy", mmap_mode="r") for recipe in RECIPES}
            base = TVILFM.from_pretrained(inputs["base"] / "model")
            stages.train_text(config, data, base=base, views=views, device=device, listener=reporter, resume=resume)


def _pretrain(
    config: Config, folder: Path, inputs: dict[str, Path], manifest: Any, pixels: Any, device: torch.device
) -> None:
    torch.manual_seed(config.run.seed)
    backbone = DualStemResNet(config.model.backbone)
    progress = ProgressFile(folder / "progress.json")

    def on_step(record: dict[str, float | int]) -> None:
        progress.update(int(record["step"]), int(record["num_steps"]), f"loss {record['loss']:.3f}")

    pretrain(
        backbone,
        manifest,
        pixels,
        attribute_labels(inputs["truth"], manifest),
        config.train.pretrain,
        pad=config.data.pad,
        seed=config.run.seed,
        device=device,
        on_step=on_step,
    )
    state = {key: value.detach().cpu().contiguous() for key, value in backbone.state_dict().items()}
    save_file(state, folder / "backbone.safetensors")
