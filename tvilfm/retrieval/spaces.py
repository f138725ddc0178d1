"""The two vector spaces of a model, their common name, and the maps into them.

The evaluation compares queries of infrared alone through the base stage's head and queries with text through the
current head. So each gallery image has one vector in each space. One space id, derived from the model, names both.

Shapes: N rows, D feature, E raw image feature (D or 2D, see `ModelSpec.image_dim`).
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tvilfm.models import TVILFM
from tvilfm.models.bn_neck import BNNeck
from tvilfm.models.tvilfm import parameter_digest

Vectors = npt.NDArray[np.float32]


def space_id(model: TVILFM, *, height: int, width: int) -> str:
    """Return the name of a model's spaces: a hash of all its weights and its input image size.

    Args:
        model: the hash covers both heads.
        height, width: input image size in pixels.
    """
    return f"{parameter_digest(model)}-{height}x{width}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Heads:
    """Both heads of a model without the model: they map raw image features to the gallery's vectors.

    Attributes:
        current_4D, base_4D: float32 mean, variance, weight and bias of each head's batch normalization.
        eps: its constant.
        width: E.
    """

    current_4D: Tensor
    base_4D: Tensor
    eps: float
    width: int

    @classmethod
    def of(cls, model: TVILFM) -> Heads:
        """Return the heads of a model."""
        base = model.head if model.base_head is None else model.base_head
        return cls(
            current_4D=_parameters(model.head),
            base_4D=_parameters(base),
            eps=model.head.bn.eps,
            width=model.spec.image_dim,
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Heads:
        """Return the heads that `to_bytes` wrote."""
        with np.load(BytesIO(content)) as parts:
            return cls(
                current_4D=torch.from_numpy(parts["current"]),
                base_4D=torch.from_numpy(parts["base"]),
                eps=float(parts["eps"]),
                width=int(parts["width"]),
            )

    def to_bytes(self) -> bytes:
        """Return the heads as an .npz file."""
        file = BytesIO()
        np.savez(file, current=self.current_4D.numpy(), base=self.base_4D.numpy(), eps=self.eps, width=self.width)
        return file.getvalue()

    @property
    def dim(self) -> int:
        return self.current_4D.shape[1]

    @torch.inference_mode()
    def vectors(self, raw_NE: Vectors) -> dict[str, Vectors]:
        """Return what `TVILFM.embed` and `embed_base` return, as columns `vector` and `vector_base`.

        Args:
            raw_NE: float32 raw features of visible images, as `encode_pixels` returns.

        Returns:
            Column name -> (N, D) float32 unit vectors.
        """
        raw = torch.tensor(raw_NE)
        current_ND = self._embed(raw[:, : self.dim], self.current_4D)
        base_ND = self._embed(raw[:, -self.dim :], self.base_4D)
        return {"vector": current_ND.numpy(), "vector_base": base_ND.numpy()}

    def _embed(self, raw_ND: Tensor, head_4D: Tensor) -> Tensor:
        mean, variance, weight, bias = head_4D
        return F.normalize(F.batch_norm(raw_ND, mean, variance, weight, bias, eps=self.eps), dim=1)


def _parameters(head: BNNeck) -> Tensor:
    bn = head.bn
    assert bn.running_mean is not None and bn.running_var is not None
    return torch.stack([bn.running_mean, bn.running_var, bn.weight, bn.bias]).detach().float().cpu()
