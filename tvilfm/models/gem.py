"""Generalized-mean pooling (GeM)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GeMPool(nn.Module):
    """Pooling of a feature map by a power mean with a learned exponent p.

    p = 1 is average pooling; p -> infinity is max pooling.

    Source: Radenovic et al., "Fine-tuning CNN image retrieval with no human annotation", eq. 3; start value and clamp
        as in METHOD 2. Differs: none known.
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p]))
        self.eps = eps

    def forward(self, maps: Tensor) -> Tensor:
        """Pool (B, D, H, W) to (B, D), never in half precision, because cubes exceed its range."""
        with torch.autocast(maps.device.type, enabled=False):
            maps = maps if maps.dtype == torch.float64 else maps.float()
            return maps.clamp(min=self.eps).pow(self.p).mean(dim=(2, 3)).pow(1.0 / self.p)
