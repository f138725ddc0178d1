"""`text_stage`: a step of the text stage on cached views and captions of real length, against recomputing both.

Real sizes: ResNet-50 at 288 x 144, CLIP RN50's text tower, batches of 8 x (4 + 4), random weights (speed does not
depend on them). Captions are the synthetic benchmark's, whose length is that of the published RegDB captions within a
few tokens.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.claim import Claim
from tvilfm.config import LossSection, OptimSection
from tvilfm.data.tri_modal import RECIPES, Batch, TrainingRows, TriModalDataset
from tvilfm.datasets import read_dataset
from tvilfm.datasets.caption_files import read_published
from tvilfm.datasets.synthetic.layouts import Size, write_sysu_layout
from tvilfm.losses.objective import JointObjective
from tvilfm.models import TVILFM, ModelSpec
from tvilfm.training.optim import StageOptimizer
from tvilfm.training.step import StageStep

P, K, HEIGHT, WIDTH, STEPS = 8, 4, 288, 144, 3


def text_stage() -> Claim:
    """Seconds a step, both ways in turn."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        write_sysu_layout(root, Size(train=16, val=1, test=1, images_per_camera=1), seed=0)
        manifest = read_dataset("synthetic", root)
        captions = read_published(root, manifest)
    rows = TrainingRows.from_manifest(manifest, use_val=False)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (manifest.num_rows, HEIGHT, WIDTH, 3), dtype=np.uint8)
    spec = ModelSpec(backbone="resnet50", num_classes=rows.num_classes, text_width=512, text_layers=12, text_heads=8)
    model = TVILFM(spec)
    model.freeze_visual()
    model.train_text_stage(freeze_batch_norm=True)
    step = StageStep(model, JointObjective(LossSection()), pad=10)
    optimizer = StageOptimizer(model, OptimSection())
    counts = {recipe: (rows.infrared if recipe == "infrared" else rows.visible).num_rows for recipe in RECIPES}
    views = {recipe: rng.normal(size=(2, count, spec.dim)).astype(np.float32) for recipe, count in counts.items()}
    datasets = {
        "cached": TriModalDataset(rows, manifest, pixels, pad=10, seed=0, captions=captions, views=views),
        "recomputed": TriModalDataset(rows, manifest, pixels, pad=10, seed=0, captions=captions),
    }
    seconds: dict[str, list[float]] = {name: [] for name in datasets}
    batches = list(rows.sampler(P, K, seed=0))
    for index in range(STEPS + 1):
        for name, dataset in datasets.items():
            started = time.perf_counter()
            batch = dataset[batches[index % len(batches)]]
            _run(step, optimizer, batch if name == "cached" else _padded(batch))
            seconds[name].append(time.perf_counter() - started)
    cached, recomputed = (statistics.median(seconds[name][1:]) for name in ("cached", "recomputed"))
    return Claim(
        name="text_stage",
        ratio=recomputed / cached,
        goal=2.5,
        ours=f"{cached:.2f} s a step (cached views, real length)",
        baseline=f"{recomputed:.2f} s a step (backbone recomputed, padded to 77)",
    )


def _padded(batch: Batch) -> Batch:
    assert batch.tokens is not None and batch.filter_tokens is not None

    def pad(tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tokens, (0, 77 - tokens.shape[1]))

    return replace(batch, tokens=pad(batch.tokens), filter_tokens=pad(batch.filter_tokens))


def _run(step: StageStep, optimizer: StageOptimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    torch.stack(list(step(batch).values())).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step(torch.amp.GradScaler("cpu", enabled=False))


CLAIMS = {"text_stage": text_stage}
