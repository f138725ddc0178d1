"""One training step of either stage, as a module, so that DDP can wrap it.

Shapes: B rows per modality on this worker, N rows of the global batch, D feature.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvilfm.data.transforms import Recipe, augment
from tvilfm.data.tri_modal import RECIPES, Batch
from tvilfm.losses.objective import JointObjective, ModalityFeatures
from tvilfm.models import TVILFM
from tvilfm.models.backbone import image_format
from tvilfm.models.fusion import semantic_filtered_fusion
from tvilfm.training.distributed import gather_rows


class StageStep(nn.Module):
    """Map a batch to the named loss terms of the global batch.

    Batches have tokens in the text stage and none in the base stage.

    Args:
        model: the network, already in the stage's train mode.
        objective: the losses.
        pad: augmentation border, pixels.
    """

    def __init__(self, model: TVILFM, objective: JointObjective, *, pad: int) -> None:
        super().__init__()
        self.model, self.objective, self.pad = model, objective, pad

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        raw_BD = self._features(batch)
        raw_ND = gather_rows(raw_BD)
        num_groups = len(raw_BD) // len(batch.labels)
        labels_B = batch.labels.repeat(num_groups)
        groups_N = None
        if self.objective.section.center_weight:
            groups_B = torch.arange(num_groups, device=labels_B.device).repeat_interleave(len(batch.labels))
            groups_N = gather_rows(groups_B)
        # BN neck and classifier run on the gathered rows, so every worker computes the same global loss.
        terms: dict[str, Tensor] = self.objective(raw_ND, self.model.head(raw_ND), gather_rows(labels_B), groups_N)
        return terms

    def _features(self, batch: Batch) -> Tensor:
        if batch.features:
            visual, fusion_infrared_BD = batch.features, batch.features["infrared"]
        else:
            visual, fusion_infrared_BD = self._encode_pixels(batch)
        features = ModalityFeatures(
            visible_BD=visual["visible"],
            visible_augmented_BD=visual["visible_augmented"],
            infrared_BD=visual["infrared"],
        )
        if batch.tokens is None or batch.filter_tokens is None:
            return self.objective.stack(features)
        text_BD, filter_BD = self._encode_texts(batch.tokens, batch.filter_tokens)
        return self.objective.stack(
            ModalityFeatures(
                visible_BD=features.visible_BD,
                visible_augmented_BD=features.visible_augmented_BD,
                infrared_BD=features.infrared_BD,
                fusion_BD=semantic_filtered_fusion(fusion_infrared_BD, text_BD, filter_BD),
                text_BD=text_BD,
            )
        )

    def _encode_texts(self, tokens_BL: Tensor, filter_tokens_BL: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return raw features of the captions and, if the loss uses them, of the infrared captions, in one pass."""
        if not self.objective.section.filter_text:
            return self.model.encode_text(tokens_BL), None
        both = (tokens_BL, filter_tokens_BL)
        longest = max(tokens.shape[1] for tokens in both)
        padded = torch.cat([F.pad(tokens, (0, longest - tokens.shape[1])) for tokens in both])
        text_BD, filter_BD = self.model.encode_text(padded).chunk(2)
        return text_BD, filter_BD

    def _encode_pixels(self, batch: Batch) -> tuple[dict[Recipe, Tensor], Tensor]:
        """Return raw features by recipe, and the infrared features for fusion."""
        layout = image_format(next(self.model.parameters()).device)
        images = {
            recipe: augment(pixels, batch.draws[recipe], pad=self.pad).contiguous(memory_format=layout)
            for recipe, pixels in batch.pixels.items()
        }
        frozen = not next(self.model.backbone.parameters()).requires_grad
        with torch.set_grad_enabled(not frozen):
            visible = torch.cat([images["visible"], images["visible_augmented"]])
            maps = self.model.backbone(visible, images["infrared"])
            raw = self.model.pool(maps)
        features = dict(zip(RECIPES, raw.chunk(3), strict=True))
        if frozen and self.model.spec.trained_pool:
            # Only fusion trains p, as in the released code: the other features are pooled without a gradient.
            return features, self.model.pool(maps.chunk(3)[2])
        return features, features["infrared"]
