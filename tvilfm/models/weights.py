"""Copies of weights and states in the host's memory, which later training steps do not change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

OUTDATED = (
    "checkpoint: expected one of this version, got one of another version. Delete the folder of the unfinished stage "
    "and run again."
)
S = TypeVar("S")


def on_host(state: S) -> S:
    """Copy a nested state, such as an optimizer's, with all its tensors in the host's memory.

    Tensors keep their memory format: fused optimizers on CUDA require that of the parameters.
    """
    copied: S = tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)
    return copied


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy what training changes: parameters that require a gradient, each once, and all buffers.

    Frozen parameters are not included, because the network is built again with them.
    """
    state = model.state_dict()
    names = sorted(_trained_names(model))
    # safetensors writes contiguous tensors only
    return {name: state[name].detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name in names}


def load_trained(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load `trained_weights` into a network whose frozen parameters are in place already.

    Raises:
        ValueError: the weights are those of a network of which other parts are trained.
    """
    differing = sorted(_trained_names(model) ^ weights.keys())
    if differing:
        raise ValueError(
            f"checkpoint: expected the trained weights of this network, got others: {', '.join(differing[:3])}. "
            "Delete the folder of the unfinished stage and run again."
        )
    model.load_state_dict(weights, strict=False)


def _trained_names(model: nn.Module) -> set[str]:
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | (model.state_dict().keys() - every)
