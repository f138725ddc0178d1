"""The head that all modalities share: batch normalization followed by an identity classifier."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BNNeck(nn.Module):
    """BatchNorm1d (weight and bias trained) followed by a linear classifier without bias.

    Training uses the raw feature for the triplet loss and the logits of the batch-normalised feature for the
    cross-entropy. Retrieval uses the L2-normalised BN output.

    Source: Luo et al., "Bag of Tricks", with a trained shift as in METHOD 2. Differs: none known.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)
        self.classifier = nn.Linear(dim, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=1e-3)

    def forward(self, raw_BD: Tensor) -> Tensor:
        """Map raw features (B, D) to logits (B, C)."""
        logits: Tensor = self.classifier(self.bn(raw_BD))
        return logits

    def embed(self, raw_BD: Tensor) -> Tensor:
        """Map raw features (B, D) to unit vectors (B, D)."""
        return F.normalize(self.bn(raw_BD), dim=1)
