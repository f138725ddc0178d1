"""Optimizer and learning-rate schedule of both stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tvilfm.config import OptimSection
from tvilfm.models import TVILFM
from tvilfm.training.row_adam import RowAdam

TOKEN_EMBEDDING = "text.tower.token_embedding.weight"


def lr_factor(
    epoch: int,
    *,
    warmup_epochs: int = 10,
    warmup_factor: float = 0.01,
    milestones: Iterable[int] = (40, 60, 100),
    gamma: float = 0.1,
) -> float:
    """Return the learning-rate factor of an epoch: a linear warm-up, then steps.

    Args:
        epoch: counted from 0.
        warmup_epochs: length of the ramp from `warmup_factor` to 1, epochs; 0 = no warm-up.
        warmup_factor: factor of epoch 0.
        milestones: epochs at which the rate is multiplied by `gamma` again.
        gamma: factor of one step.

    Source: METHOD 4. Differs: none known.
    """
    warmup = 1.0
    if epoch < warmup_epochs:
        share = epoch / warmup_epochs
        warmup = warmup_factor * (1 - share) + share
    return warmup * gamma ** sum(epoch >= milestone for milestone in milestones)


def parameter_groups(model: TVILFM, section: OptimSection) -> list[dict[str, Any]]:
    """Group trainable parameters by learning rate and weight decay.

    With `optim.keep_unused_tokens`, the token embedding is omitted; `StageOptimizer` trains it with `RowAdam`.

    Learning rates:
        Backbone and GeM: lr. Head: lr x head_lr_factor.
        Text transformer: text_lr; its biases: text_lr x text_bias_lr_factor.
        Token and position embeddings, ln_final, text_projection: lr.

    Weight decay: weight_decay; for the text tower, text_weight_decay if set; for the biases of the text transformer,
    text_bias_weight_decay.

    Returns:
        Parameter groups for Adam, each with the parameters' `names` besides `params`.

    Source: METHOD 4, the released solver. Differs: with fidelity corrected, the text tower's decay has its own key.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or (name == TOKEN_EMBEDDING and section.keep_unused_tokens):
            continue
        lr, decay = section.lr, section.weight_decay
        if name.startswith("text."):
            decay = section.weight_decay if section.text_weight_decay is None else section.text_weight_decay
            if ".transformer." in name:
                lr = section.text_lr
                if name.endswith("bias"):
                    lr, decay = section.text_lr * section.text_bias_lr_factor, section.text_bias_weight_decay
        elif name.startswith("head."):
            lr = section.lr * section.head_lr_factor
        group = groups.setdefault((lr, decay), {"params": [], "names": [], "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


class StageOptimizer:
    """Adam for all parameters, except that `optim.keep_unused_tokens` trains the token embedding with RowAdam.

    RowAdam changes only rows with a gradient. With Adam, the coupled weight decay pulls the rows of all tokens that
    the training captions do not use to zero, which erases words that queries may use.
    """

    def __init__(self, model: TVILFM, section: OptimSection) -> None:
        device = next(model.parameters()).device
        fused = device.type in ("cpu", "cuda")
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(parameter_groups(model, section), betas=(0.9, 0.999), fused=fused)
        ]
        if model.text is not None and section.keep_unused_tokens:
            embedding = model.text.tower.token_embedding
            # A dense gradient is as large as the vocabulary, but CUDA graphs require it.
            embedding.sparse = device.type == "cpu"
            self._optimizers.append(RowAdam(embedding.weight, lr=section.lr))
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]

    def set_lr_factor(self, factor: float) -> None:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Update the parameters; `scaler` undoes the loss scaling and skips a step with an overflow.

        All optimizers skip a step or none. The decision stays on the device: `scaler.step` would read it on the host,
        and it looks at the gradients of one optimizer only.
        """
        overflow = None
        if scaler.is_enabled():
            for optimizer in self._optimizers:
                scaler.unscale_(optimizer)
            found = [
                value for optimizer in self._optimizers for value in scaler._found_inf_per_device(optimizer).values()
            ]
            overflow = torch.stack(found).amax(dim=0)
        for optimizer in self._optimizers:
            optimizer.found_inf = overflow  # type: ignore[attr-defined]  # both optimizers read it in `step`
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)
