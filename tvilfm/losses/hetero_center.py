"""Hetero-centre loss: an optional term that draws the modalities' means of one identity together.

Shapes: N rows, D feature, I identities, M groups of rows (the first is visible).
"""

from __future__ import annotations

import torch
from torch import Tensor


def hetero_center_loss(feats_ND: Tensor, labels_N: Tensor, groups_N: Tensor) -> Tensor:
    """Return the squared distance between an identity's mean in each group and in the visible group.

    The identity loss and WRT compare single images; this compares what a modality says of an identity on average, and
    leaves the spread within a modality alone.

    Args:
        feats_ND: float, raw (not normalised) features.
        labels_N: int64 training labels.
        groups_N: int64 group of each row, 0 for visible.

    Returns:
        Scalar, mean over the identities and groups that both the batch and the identity's visible rows show; 0 where
        there are none.

    Source: Zhu et al., "Hetero-Center Loss for Cross-Modality Person Re-Identification", Neurocomputing 2020, eq. 4.
    Differs: a mean in place of the sum, and every group meets the visible one where the paper has two modalities.
    """
    with torch.autocast(feats_ND.device.type, enabled=False):
        feats_ND = feats_ND if feats_ND.dtype == torch.float64 else feats_ND.float()
        pids_I = labels_N.unique()  # type: ignore[no-untyped-call]
        member_IN = pids_I[:, None] == labels_N
        member_MN = torch.arange(int(groups_N.max()) + 1, device=groups_N.device)[:, None] == groups_N
        # A product with ones and zeros, not a scattered sum, whose order is left to the device.
        member_IMN = (member_IN[:, None] & member_MN).to(feats_ND.dtype)
        count_IM = member_IMN.sum(dim=2)
        center_IMD = member_IMN @ feats_ND / count_IM.clamp(min=1)[:, :, None]
        square_IM = (center_IMD[:, 1:] - center_IMD[:, :1]).pow(2).sum(dim=2)
        both_IM = (count_IM[:, 1:] > 0) & (count_IM[:, :1] > 0)
        loss: Tensor = (square_IM * both_IM).sum() / both_IM.sum().clamp(min=1)
        return loss
