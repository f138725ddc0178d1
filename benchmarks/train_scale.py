"""`train_scale`: bytes that a step of the text stage sends between workers, and what a second worker gains.

Real sizes: cached features of ResNet-50, CLIP RN50's text tower, batches of 8 x (4 + 4), random weights. All runs train
on the same global batches. The baseline leaves all gradients to DDP, which sends the whole token embedding. Bytes are
those of the gradients as a worker hands them over for averaging. With one GPU per worker, workers use GPUs and NCCL;
otherwise each has one core of this machine, for which two workers compete with every other program.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.claim import Claim
from tvilfm.config import LossSection, load_config
from tvilfm.data.tri_modal import RECIPES, TrainingRows
from tvilfm.datasets import read_dataset
from tvilfm.datasets.caption_files import read_published
from tvilfm.datasets.synthetic.layouts import Size, write_sysu_layout
from tvilfm.models import TVILFM, spec_from_config
from tvilfm.training import loop
from tvilfm.training.stages import StageData, train_text
from tvilfm.training.step import StageStep

WORKERS = (1, 2, 4, 8)  # as many as there are GPUs; 1 and 2 without
GOAL = 0.8
SCHEDULE = "train.text={epochs: 2, select: last, cache_views: 1}"
SETTINGS = ("data.name=synthetic", "train.autocast=off", SCHEDULE, "model.weights=random", "model.text.weights=random")


class _Rate:
    """Listener that keeps the steps per second of the last epoch."""

    def __init__(self) -> None:
        self.steps_per_s, self.steps = 0.0, 0

    def on_step(self, record: Mapping[str, float | int]) -> None:
        self.steps_per_s, self.steps = float(record["steps_per_s"]), self.steps + 1

    def on_epoch(self, record: Mapping[str, float | int], write: Callable[[Path], None] | None) -> None:
        pass


def train_scale() -> Claim:
    """Bytes and steps per second with one and several workers, and with all gradients left to DDP."""
    counts = [count for count in WORKERS if count <= max(2, torch.cuda.device_count())]
    most = counts[-1]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "data"
        write_sysu_layout(root, Size(train=16, val=1, test=1, images_per_camera=1), seed=0)
        found = {count: _measure(root, count, plain=False) for count in counts}
        plain = _measure(root, most, plain=True)
    one = found[1]["steps_per_s"]
    rates = "; ".join(
        f"{count} worker{'s' * (count > 1)} {of['steps_per_s']:.2f} steps/s ({of['steps_per_s'] / one / count:.0%})"
        for count, of in found.items()
    )
    return Claim(
        name="train_scale",
        ratio=found[most]["bytes"] / plain["bytes"],
        goal=GOAL,
        higher_is_better=False,
        ours=f"{found[most]['bytes'] / 1e6:.1f} MB per step; {rates}, on {_device(most)}",
        baseline=f"{plain['bytes'] / 1e6:.1f} MB per step, {plain['steps_per_s']:.2f} steps/s; DDP, {most} workers",
    )


def _device(workers: int) -> str:
    if torch.cuda.device_count() >= workers:
        return torch.cuda.get_device_name()
    return f"one core per worker of {os.cpu_count()}"


def _measure(root: Path, workers: int, *, plain: bool) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    target = root.parent / "found.json"
    spawn(_train, args=(workers, port, root, plain, target), nprocs=workers)  # type: ignore[no-untyped-call]
    found: dict[str, float] = json.loads(target.read_text())
    return found


def _train(rank: int, workers: int, port: int, root: Path, plain: bool, target: Path) -> None:
    """Train the text stage in one of the workers; the first one writes the bytes and steps per second."""
    torch.set_num_threads(1)
    on_gpu = torch.cuda.device_count() >= workers
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=workers)
    config = load_config(None, [*SETTINGS, f"data.root={root}"])
    manifest = read_dataset("synthetic", root)
    rows = TrainingRows.from_manifest(manifest, use_val=False)
    model = TVILFM(spec_from_config(config.model, rows.num_classes, with_text=False))
    rng = np.random.default_rng(0)
    counts = {recipe: (rows.infrared if recipe == "infrared" else rows.visible).num_rows for recipe in RECIPES}
    views = {recipe: rng.normal(size=(1, count, model.spec.dim)).astype(np.float32) for recipe, count in counts.items()}
    pixels = np.zeros((manifest.num_rows, 1, 1, 3), dtype=np.uint8)  # views stand for them
    data = StageData(manifest=manifest, pixels=pixels, captions=read_published(root, manifest))
    sent: list[int] = []
    loop.distributed = partial(_counted, sent=sent, average=_all if plain else loop.distributed)
    rate = _Rate()
    train_text(config, data, base=model, views=views, device=device, listener=rate)
    if rank == 0:
        target.write_text(json.dumps({"bytes": sum(sent) / rate.steps, "steps_per_s": rate.steps_per_s}))
    dist.destroy_process_group()


def _all(step: StageStep, loss: LossSection, device: torch.device, token_ids: Tensor) -> nn.Module:
    """Leave all gradients to DDP."""
    assert step.model.text is not None
    step.model.text.tower.token_embedding.sparse = False
    return DistributedDataParallel(
        step, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
    )


def _counted(
    step: StageStep,
    loss: LossSection,
    device: torch.device,
    token_ids: Tensor,
    *,
    sent: list[int],
    average: Callable[[StageStep, LossSection, torch.device, Tensor], nn.Module],
) -> nn.Module:
    """Return the step of `average`; the bytes of all gradients that it sends are added to `sent`."""
    wrapped = average(step, loss, device, token_ids)

    def counted_bucket(state: object, bucket: Any) -> Any:
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]

    counted_bucket.__annotations__ = {}  # DDP compares types, which are texts here
    assert isinstance(wrapped, DistributedDataParallel)
    wrapped.register_comm_hook(None, counted_bucket)
    assert step.model.text is not None
    width, reduce = step.model.text.tower.token_embedding.embedding_dim, dist.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        if tensor.ndim == 2 and tensor.shape[1] == width:  # rows of the token embedding
            sent.append(tensor.nbytes)
        return reduce(tensor, *arguments, **options)

    dist.all_reduce = counted
    return wrapped


CLAIMS = {"train_scale": train_scale}
