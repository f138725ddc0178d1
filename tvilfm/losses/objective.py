"""The training objective of both stages, as named terms that the caller sums.

Shapes: B rows per modality, N all rows, D feature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvilfm.config import LossSection
from tvilfm.losses.hetero_center import hetero_center_loss
from tvilfm.losses.wrt_triplet import wrt_triplet_loss


@dataclass(frozen=True, kw_only=True)
class ModalityFeatures:
    """Raw features of one batch by modality; row i of each is the same identity."""

    visible_BD: Tensor
    visible_augmented_BD: Tensor
    infrared_BD: Tensor
    fusion_BD: Tensor | None = None
    text_BD: Tensor | None = None


class JointObjective(nn.Module):
    """Identity cross-entropy and WRT over one identity space for all modalities (MJL), through one shared head.

    The hetero-centre loss is experimental and off by default.

    Base stage: [visible, visible-augmented, infrared]. Text stage with MJL: [visible, visible-augmented, infrared,
    fusion, text]; without MJL: [visible, visible-augmented, fusion].

    Source: METHOD 3. Differs: none known beyond `loss.wrt_numerics` and `loss.center_weight`.
    """

    def __init__(self, section: LossSection) -> None:
        super().__init__()
        self.section = section

    def stack(self, features: ModalityFeatures) -> Tensor:
        """Return the input rows (N, D) of the losses, modality by modality."""
        rows = [features.visible_BD, features.visible_augmented_BD]
        if features.fusion_BD is None:
            rows.append(features.infrared_BD)
        elif self.section.joint:
            assert features.text_BD is not None
            rows += [features.infrared_BD, features.fusion_BD, features.text_BD]
        else:
            rows.append(features.fusion_BD)
        return torch.cat(rows)

    def forward(
        self, raw_ND: Tensor, logits_NC: Tensor, labels_N: Tensor, groups_N: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the weighted terms of the loss; their sum is minimized.

        Args:
            raw_ND: raw features, rows of the global batch.
            logits_NC: the head's logits of the same rows.
            labels_N: int64 training labels.
            groups_N: int64 index of each row's modality in the stack; only needed with a `center_weight`.

        Returns:
            Weighted scalars `id`, `wrt` and `center`; a term of weight 0 is omitted.
        """
        terms: dict[str, Tensor] = {}
        if self.section.id_weight:
            terms["id"] = self.section.id_weight * F.cross_entropy(logits_NC.float(), labels_N)
        if self.section.wrt_weight:
            terms["wrt"] = self.section.wrt_weight * wrt_triplet_loss(
                raw_ND, labels_N, numerics=self.section.wrt_numerics
            )
        if self.section.center_weight:
            assert groups_N is not None
            terms["center"] = self.section.center_weight * hetero_center_loss(raw_ND, labels_N, groups_N)
        return terms
