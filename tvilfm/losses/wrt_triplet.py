"""Weighted regularised triplet loss (WRT).

Shapes: N rows, D feature.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def wrt_triplet_loss(
    feats_ND: Tensor, labels_N: Tensor, *, numerics: Literal["published", "corrected"] = "corrected"
) -> Tensor:
    """Pull every anchor towards its positives and push it away from its negatives, with higher weights for hard ones.

    For each anchor, compute a softmax-weighted mean of its positive distances (including itself; far positives have
    higher weights) and one of its negative distances (near negatives have higher weights). The loss is the soft margin
    of their difference.

    Args:
        feats_ND: float, raw (not normalised) features of all modalities.
        labels_N: int64 training labels.
        numerics: `published` or `corrected`. In each softmax, `published` subtracts the maximum of the *masked* matrix
            (zeros where masked) and adds 1e-6 to the sum. If negatives are further away than about 20-30, their weights
            underflow and no longer push. Its soft margin log(1 + exp(x)) is infinite for x above about 88. `corrected`
            uses a masked softmax and a stable soft margin; both are equal where `published` does not underflow or
            overflow.

    Returns:
        Scalar, mean over anchors.

    Source: Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook", eq. 6-7; METHOD 3.
    Differs: `corrected`, see above. For an anchor without negatives, the negative term is zero, as published.
    """
    with torch.autocast(feats_ND.device.type, enabled=False):
        feats_ND = feats_ND if feats_ND.dtype == torch.float64 else feats_ND.float()
        positive_NN = labels_N[:, None] == labels_N[None, :]
        if numerics == "published":
            distance_NN, soft = _published_distance(feats_ND), _published_softmax
        else:
            # Avoid a matrix product: its cancellation turns zero distances into noise, which affects the gradient.
            distance_NN = torch.cdist(feats_ND, feats_ND, compute_mode="donot_use_mm_for_euclid_dist")
            soft = _masked_softmax
        pull_N = (distance_NN * soft(distance_NN, positive_NN)).sum(dim=1)
        push_N = (distance_NN * soft(-distance_NN, ~positive_NN)).sum(dim=1)
        if numerics == "published":
            return (1 + (pull_N - push_N).exp()).log().mean()
        return F.softplus(pull_N - push_N).mean()


def _published_distance(feats_ND: Tensor) -> Tensor:
    """Return (N, N) Euclidean distances; the clamp keeps the square root's gradient finite on the diagonal."""
    square_N = feats_ND.pow(2).sum(dim=1)
    return (square_N[:, None] + square_N[None, :] - 2 * feats_ND @ feats_ND.T).clamp(min=1e-12).sqrt()


def _masked_softmax(scores_NN: Tensor, mask_NN: Tensor) -> Tensor:
    weights_NN = scores_NN.masked_fill(~mask_NN, -torch.inf).softmax(dim=1)
    return torch.where(mask_NN.any(dim=1, keepdim=True), weights_NN, torch.zeros_like(weights_NN))


def _published_softmax(scores_NN: Tensor, mask_NN: Tensor) -> Tensor:
    mask = mask_NN.to(scores_NN.dtype)
    masked_NN = scores_NN * mask
    exponent_NN = (masked_NN - masked_NN.max(dim=1, keepdim=True).values).exp() * mask
    return exponent_NN / (exponent_NN.sum(dim=1, keepdim=True) + 1e-6)
