"""Pre-training on attributes of a disjoint synthetic split, as an offline replacement for ImageNet weights.

Both stems learn to classify the attributes of the person in an image (garments, pattern, bag; in visible images also
colours). No other stage uses these people. Pre-training is not part of the method; it does not run with real ImageNet
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from tvilfm.config import PretrainSection
from tvilfm.data.manifest import column, rows_of, select
from tvilfm.data.transforms import Recipe, augment, draw
from tvilfm.datasets.synthetic.layouts import read_truth
from tvilfm.datasets.synthetic.people import ATTRIBUTES, COLOUR_ATTRIBUTES
from tvilfm.models.backbone import DualStemResNet, image_format
from tvilfm.training.readings import LossReadings


def attribute_labels(root: Path, manifest: pa.Table) -> npt.NDArray[np.int64]:
    """Return indices (N, A) of the attribute values of every manifest row, from `attributes.json`."""
    truth = read_truth(root)
    by_pid = {pid: [values.index(truth[pid][name]) for name, values in ATTRIBUTES.items()] for pid in truth}
    return np.array([by_pid[pid] for pid in column(manifest, "pid")], dtype=np.int64)


def pretrain(
    backbone: DualStemResNet,
    manifest: pa.Table,
    pixels: npt.NDArray[np.uint8],
    labels_NA: npt.NDArray[np.int64],
    section: PretrainSection,
    *,
    pad: int,
    seed: int,
    device: torch.device,
    on_step: Callable[[Mapping[str, float | int]], None],
) -> None:
    """Train the backbone in place to classify attributes; half of each batch is visible, half infrared.

    Args:
        backbone: network to train in place.
        manifest: rows of the disjoint split, in the order of `pixels` and `labels_NA`.
        pixels: uint8 (N, H, W, 3).
        labels_NA: int64; see `attribute_labels`.
        section: steps, batch size and learning rate.
        pad: augmentation border, pixels.
        seed: seed of the run.
        device: device to train on.
        on_step: function that receives epoch, step, num_steps and loss of each step, once they are read.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    parts: dict[Recipe, npt.NDArray[np.int64]] = {
        "visible": rows_of(manifest, select(manifest, modality="visible")),
        "infrared": rows_of(manifest, select(manifest, modality="infrared")),
    }
    backbone.to(device).to(memory_format=image_format(device)).train()
    heads = nn.ModuleList(nn.Linear(backbone.dim, len(values)) for values in ATTRIBUTES.values()).to(device)
    parameters = [*backbone.parameters(), *heads.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=section.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=section.lr, total_steps=section.steps)
    readings = LossReadings(0, section.steps, on_step)
    half = section.batch // 2
    _, height, width, _ = pixels.shape
    for index in range(section.steps):
        rng = np.random.default_rng([seed, 21, index])
        images, labels = {}, {}
        for recipe, rows in parts.items():
            chosen = rng.choice(rows, half)
            draws = draw(recipe, half, rng, height=height, width=width, pad=pad)
            images[recipe] = augment(torch.from_numpy(pixels[chosen]).to(device), draws.to(device), pad=pad)
            labels[recipe] = torch.from_numpy(labels_NA[chosen]).to(device)
        maps = backbone(images["visible"], images["infrared"])
        features = dict(zip(parts, maps.mean(dim=(2, 3)).chunk(2), strict=True))
        loss = readings.add({"loss": _attribute_loss(heads, features, labels)})
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    readings.read()
    backbone.eval()


def _attribute_loss(
    heads: nn.ModuleList, features: Mapping[Recipe, torch.Tensor], labels: Mapping[Recipe, torch.Tensor]
) -> torch.Tensor:
    """Return the mean cross entropy of all attributes that a modality shows."""
    losses = [
        F.cross_entropy(head(features[recipe]), labels[recipe][:, number])
        for number, (name, head) in enumerate(zip(ATTRIBUTES, heads, strict=True))
        for recipe in features
        if recipe == "visible" or name not in COLOUR_ATTRIBUTES
    ]
    return torch.stack(losses).mean()
