"""How much memory a training step needs, measured on a small batch."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from tvilfm.config import Config
from tvilfm.data.transforms import Draws, Recipe, draw
from tvilfm.data.tri_modal import RECIPES, Batch
from tvilfm.losses.objective import JointObjective
from tvilfm.models import TVILFM, spec_from_config
from tvilfm.training.step import StageStep

ROWS = 2  # of the batch that is measured
TOKENS = 32  # of a usual caption


def step_bytes(config: Config, stage: Literal["base", "text"], num_classes: int, *, workers: int = 1) -> int:
    """Return a lower bound of the bytes that a worker needs for one training step in float32.

    It counts the weights, their gradients and Adam's two moments, and the tensors that the forward pass keeps for the
    backward pass, as measured with a batch of two rows on the CPU. The interpreter, buffers of kernels and
    memory-mapped files are not counted.

    Args:
        config: the run.
        stage: base or text.
        num_classes: number of training identities.
        workers: number of training workers, which share the images of a batch.
    """
    with torch.random.fork_rng(devices=[]):
        model = TVILFM(spec_from_config(config.model, num_classes, with_text=False))
        if stage == "text":
            model.start_text_stage(config.model.text, train_pool=config.trains_gem)
            model.freeze_visual()
            model.train_text_stage(freeze_batch_norm=config.train.text.freeze_batch_norm)
        step = StageStep(model, JointObjective(config.loss), pad=config.data.pad)
        saved = _saved_bytes(step, _batch(config, stage, model.spec.dim))
    rows = max(1, config.train.p * config.train.k // workers)
    return _state_bytes(model) + saved * rows // ROWS


def _batch(config: Config, stage: str, dim: int) -> Batch:
    """Return a batch of the stage."""
    pixels: dict[Recipe, Tensor] = {}
    draws: dict[Recipe, Draws] = {}
    features: dict[Recipe, Tensor] = {}
    for recipe in RECIPES:
        if stage == "text" and config.train.text.cache_views:
            features[recipe] = torch.zeros(ROWS, dim)
            continue
        pixels[recipe] = torch.zeros(ROWS, config.data.height, config.data.width, 3, dtype=torch.uint8)
        size = {"height": config.data.height, "width": config.data.width}
        draws[recipe] = draw(recipe, ROWS, np.random.default_rng(0), **size, pad=config.data.pad)
    tokens = torch.ones(ROWS, TOKENS, dtype=torch.int64) if stage == "text" else None
    labels = torch.zeros(ROWS, dtype=torch.int64)
    return Batch(labels=labels, pixels=pixels, draws=draws, features=features, tokens=tokens, filter_tokens=tokens)


def _state_bytes(model: nn.Module) -> int:
    """Return the bytes of weights and buffers, and of gradients and Adam's moments of the trained weights."""
    weights = sum(int(tensor.nbytes) for tensor in model.state_dict().values())
    trained = sum(int(parameter.nbytes) for parameter in model.parameters() if parameter.requires_grad)
    return weights + 3 * trained


def _saved_bytes(step: StageStep, batch: Batch) -> int:
    """Return the bytes of the storages that the forward pass keeps, without those of the weights."""
    kept = {parameter.untyped_storage()._cdata: 0 for parameter in step.parameters()}
    held: list[Tensor] = []  # so that no storage gets the identity of a freed one

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        storage = tensor.untyped_storage()
        kept.setdefault(storage._cdata, int(storage.nbytes()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = step(batch)
        assert terms is not None  # keeps the graph until here
    return sum(kept.values())
