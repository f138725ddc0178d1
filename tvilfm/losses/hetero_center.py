"""Hetero-centre loss: an optional term that pulls the per-modality means of an identity together.

Shapes: N rows, D feature, I identities, M groups of rows (the first is visible).
"""

from __future__ import annotations

import torch
from torch import Tensor


def hetero_center_loss(feats_ND: Tensor, labels_N: Tensor, groups_N: Tensor) -> Tensor:
    """Return the mean squared distance between an identity's mean in each group and its mean in the visible group.

    The identity loss and WRT compare single images. This term compares the mean features of an identity per modality,
    and does not affect the spread within a modality.

    Args:
        feats_ND: float, raw (not normalised) features.
        labels_N: int64 training labels.
        groups_N: int64 group of each row, 0 for visible.

    Returns:
        Scalar, mean over the pairs of an identity and a group that have rows in both the group and the visible group;
        0 without such pairs.

    Source: Zhu et al., "Hetero-Center Loss for Cross-Modality Person Re-Identification", Neurocomputing 2020, eq. 4.
    Differs: a mean instead of the sum; every group is compared with the visible one (the paper has two modalities).
    """
    with torch.autocast(feats_ND.device.type, enabled=False):
        feats_ND = feats_ND if feats_ND.dtype == torch.float64 else feats_ND.float()
        pids_I = labels_N.unique()  # type: ignore[no-untyped-call]
        member_IN = pids_I[:, None] == labels_N
        member_MN = torch.arange(int(groups_N.max()) + 1, device=groups_N.device)[:, None] == groups_N
        # Multiply by a matrix of ones and zeros: the order of a scattered sum would depend on the device.
        member_IMN = (member_IN[:, None] & member_MN).to(feats_ND.dtype)
        count_IM = member_IMN.sum(dim=2)
        center_IMD = member_IMN @ feats_ND / count_IM.clamp(min=1)[:, :, None]
        square_IM = (center_IMD[:, 1:] - center_IMD[:, :1]).pow(2).sum(dim=2)
        both_IM = (count_IM[:, 1:] > 0) & (count_IM[:, :1] > 0)
        loss: Tensor = (square_IM * both_IM).sum() / both_IM.sum().clamp(min=1)
        return loss
