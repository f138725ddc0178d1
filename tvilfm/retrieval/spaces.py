"""The two vector spaces of a model, their common name, and the maps into them.

The evaluation compares queries of infrared alone through the base stage's head and queries with text through the
current head. So each gallery image has one vector in each space. One space id, derived from the model, names both.

Shapes: N rows, D feature, E raw image feature (D or 2D, see `ModelSpec.image_dim`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from tvilfm.files import digest_of_arrays

if TYPE_CHECKING:  # commands that only open a gallery do not wait for torch
    from tvilfm.models import TVILFM

Vectors = npt.NDArray[np.float32]
EPS = 1e-5  # of torch.nn.BatchNorm1d


def space_id(model: TVILFM, *, height: int, width: int) -> str:
    """Return the name of a model's spaces: a hash of all its weights and its input image size.

    Args:
        model: the hash covers both heads.
        height, width: input image size in pixels.
    """
    from tvilfm.models.tvilfm import parameter_digest

    return f"{parameter_digest(model)}-{height}x{width}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelSpaces:
    """What a gallery has to know of a model, read from the model's folder without torch.

    Attributes:
        id: what `space_id` returns.
        encoder: hash of what computes raw image features: backbone, pooling and image size.
        heads: both heads.
        text: whether the model reads sentences.
    """

    id: str
    encoder: str
    heads: Heads
    text: bool

    @classmethod
    def read(cls, folder: Path, *, height: int, width: int) -> ModelSpaces:
        """Return the spaces of a model.

        Args:
            folder: written by `TVILFM.save_pretrained`.
            height, width: input image size in pixels.
        """
        spec = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        parts = {name: digest_of_arrays(_part(weights, name)) for name in ("backbone", "pool")}
        return cls(
            id=f"{digest_of_arrays(weights)}-{height}x{width}",
            encoder=f"{parts['backbone']}-{parts['pool']}-{height}x{width}",
            heads=Heads.of_weights(weights, trained_pool=spec["trained_pool"]),
            text=spec["with_text"],
        )


def _part(weights: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the weights of one module, with names as in that module."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


@dataclass(frozen=True, kw_only=True, eq=False)
class Heads:
    """Both heads of a model without the model: they map raw image features to the gallery's vectors.

    Attributes:
        current_4D, base_4D: float32 mean, variance, weight and bias of each head's batch normalization.
        eps: its constant.
        width: E.
    """

    current_4D: Vectors
    base_4D: Vectors
    eps: float
    width: int

    @classmethod
    def of(cls, model: TVILFM) -> Heads:
        """Return the heads of a model."""
        weights = {name: value.cpu().numpy() for name, value in model.state_dict().items() if "head.bn." in name}
        return cls.of_weights(weights, trained_pool=model.spec.trained_pool)

    @classmethod
    def of_weights(cls, weights: Mapping[str, npt.NDArray[Any]], *, trained_pool: bool) -> Heads:
        """Return the heads of a stored model.

        Args:
            weights: name -> array, as in `TVILFM.state_dict`.
            trained_pool: `ModelSpec.trained_pool`.
        """
        parameters = ("running_mean", "running_var", "weight", "bias")
        current_4D, base_4D = (
            np.stack([weights[f"{head}.bn.{name}"] for name in parameters]).astype(np.float32)
            for head in ("head", "base_head" if "base_head.bn.weight" in weights else "head")
        )
        return cls(current_4D=current_4D, base_4D=base_4D, eps=EPS, width=current_4D.shape[1] * (1 + trained_pool))

    @classmethod
    def from_bytes(cls, content: bytes) -> Heads:
        """Return the heads that `to_bytes` wrote."""
        with np.load(BytesIO(content)) as parts:
            return cls(
                current_4D=parts["current"],
                base_4D=parts["base"],
                eps=float(parts["eps"]),
                width=int(parts["width"]),
            )

    def to_bytes(self) -> bytes:
        """Return the heads as an .npz file."""
        file = BytesIO()
        np.savez(file, current=self.current_4D, base=self.base_4D, eps=self.eps, width=self.width)
        return file.getvalue()

    @property
    def dim(self) -> int:
        return int(self.current_4D.shape[1])

    def vectors(self, raw_NE: Vectors) -> dict[str, Vectors]:
        """Return what `TVILFM.embed` and `embed_base` return, as columns `vector` and `vector_base`.

        Args:
            raw_NE: float32 raw features of visible images, as `encode_pixels` returns.

        Returns:
            Column name -> (N, D) float32 unit vectors.
        """
        import torch
        import torch.nn.functional as F

        raw = torch.tensor(raw_NE)
        vectors = {}
        for name, part, head_4D in (
            ("vector", raw[:, : self.dim], self.current_4D),
            ("vector_base", raw[:, -self.dim :], self.base_4D),
        ):
            mean, variance, weight, bias = torch.tensor(head_4D)
            unit = F.normalize(F.batch_norm(part, mean, variance, weight, bias, eps=self.eps), dim=1)
            vectors[name] = unit.numpy()
        return vectors
