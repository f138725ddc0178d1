"""Optimizer and learning-rate schedule of both stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tvilfm.config import OptimSection
from tvilfm.models import TVILFM
from tvilfm.training.distributed import world_size

TOKEN_EMBEDDING = "text.tower.token_embedding.weight"


def lr_factor(
    epoch: int,
    *,
    warmup_epochs: int = 10,
    warmup_factor: float = 0.01,
    milestones: Iterable[int] = (40, 60, 100),
    gamma: float = 0.1,
) -> float:
    """Return the factor of all learning rates in an epoch: linear warm-up, then steps.

    Args:
        epoch: counted from 0.
        warmup_epochs: epochs of the ramp from `warmup_factor` to 1; 0 = none.
        warmup_factor: factor of epoch 0.
        milestones: epochs from which the rate is multiplied by `gamma` once more.
        gamma: factor of one step.

    Source: METHOD 4. Differs: none known.
    """
    warmup = 1.0
    if epoch < warmup_epochs:
        share = epoch / warmup_epochs
        warmup = warmup_factor * (1 - share) + share
    return warmup * gamma ** sum(epoch >= milestone for milestone in milestones)


def parameter_groups(model: TVILFM, section: OptimSection) -> list[dict[str, Any]]:
    """Group trainable parameters by learning rate and decay, without a token embedding that is kept sparse.

    Backbone and GeM: lr. Text transformer: text_lr; its biases: text_lr x factor, with a decay of
    their own. Head: lr x factor.
    Token and position embeddings, ln_final, text_projection: lr. Decay: weight_decay, or text_weight_decay for the
    text tower where that is set.

    Returns:
        Adam's groups, each with `names` beside its `params`.

    Source: METHOD 4, the released solver. Differs: with fidelity corrected the text tower's decay is its own key.
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
    """Adam, with a sparse Adam for the token embedding that changes only rows with a gradient.

    Adam's coupled decay pulls every token row to zero that the training captions do not use; a caption at query time
    then meets erased words. SparseAdam leaves such rows bit-identical.
    """

    def __init__(self, model: TVILFM, section: OptimSection) -> None:
        fused = next(model.parameters()).device.type in ("cpu", "cuda")
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(parameter_groups(model, section), betas=(0.9, 0.999), fused=fused)
        ]
        self._tokens: nn.Parameter | None = None
        if model.text is not None and section.keep_unused_tokens:
            self._tokens = model.text.tower.token_embedding.weight
            # A dense gradient would be as large as the vocabulary; DDP's all-reduce, however, wants one.
            model.text.tower.token_embedding.sparse = world_size() == 1
            self._optimizers.append(torch.optim.SparseAdam([self._tokens], lr=section.lr, betas=(0.9, 0.999)))
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
        """Update the parameters; `scaler` undoes loss scaling, and a step with an overflow is skipped."""
        if self._tokens is not None and self._tokens.grad is not None:
            self._tokens.grad = _touched_rows(self._tokens.grad)
        if not scaler.is_enabled():
            for optimizer in self._optimizers:
                optimizer.step()
            return
        for optimizer in self._optimizers:
            scaler.unscale_(optimizer)
        # Both are skipped or neither: `step` alone would look at each one's own gradients.
        overflows = (scaler._found_inf_per_device(optimizer).values() for optimizer in self._optimizers)
        if not any(float(overflow) for of_optimizer in overflows for overflow in of_optimizer):
            for optimizer in self._optimizers:
                scaler.step(optimizer)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def _touched_rows(gradient: Tensor) -> Tensor:
    """Return the gradient as a sparse tensor of its non-zero rows."""
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
    else:
        rows, values = torch.arange(len(gradient), device=gradient.device), gradient
    touched = values.any(dim=1)
    return torch.sparse_coo_tensor(
        rows[touched][None], values[touched], gradient.shape, is_coalesced=True, check_invariants=False
    )
