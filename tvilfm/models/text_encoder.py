"""The text tower: CLIP RN50's text transformer, with its projection stretched to the visual width.

Shapes: B sentences, L tokens, D feature.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvilfm.data.open_clip import open_clip_module

CONTEXT_LENGTH = 77
VOCABULARY = 49408


class TextEncoder(nn.Module):
    """open_clip's text transformer with a (width, dim) projection.

    Source: CLIP; METHOD 2. Differs: batches are as long as their longest caption, not 77.
    """

    def __init__(self, *, dim: int, width: int, layers: int, heads: int) -> None:
        # Not every process uses text.
        transformer = open_clip_module("transformer")
        super().__init__()
        self.tower = transformer.TextTransformer(
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCABULARY,
            width=width,
            heads=heads,
            layers=layers,
            output_dim=dim,
            act_layer=transformer.QuickGELU,
        )

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Map token ids (B, L <= 77) to raw text features (B, D) in float32."""
        tower = self.tower
        length = tokens_BL.shape[1]
        x = tower.token_embedding(tokens_BL) + tower.positional_embedding[:length]
        x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        # Only the end-of-text row is used; normalising it alone gives the same result.
        x = x[torch.arange(x.shape[0], device=x.device), tokens_BL.argmax(dim=1)]
        features: Tensor = tower.ln_final(x) @ tower.text_projection
        return features.float()


def stretch_projection(projection: Tensor, dim: int) -> Tensor:
    """Stretch CLIP's (512, 1024) text projection to (512, dim), as the released code does.

    Interpolate bilinearly without aligned corners, and round to half precision, the precision of CLIP's weights.

    Source: METHOD 2. Differs: none known.
    """
    stretched = F.interpolate(
        projection.float()[None, None], size=(projection.shape[0], dim), mode="bilinear", align_corners=False
    )[0, 0]
    return stretched.half().float()


def load_clip_text(encoder: TextEncoder, dim: int, source: str = "openai") -> None:
    """Load the text tower of CLIP RN50 into the encoder.

    Args:
        encoder: tower of CLIP RN50's size, filled in place.
        dim: width of the stretched projection.
        source: `openai` (open_clip downloads it once) or a local state dict with CLIP's text keys.

    Raises:
        ValueError: when the weights cannot be downloaded or read, or do not fit.
    """
    if source == "openai":
        import open_clip

        try:
            state: dict[str, Any] = open_clip.create_model("RN50", pretrained="openai").state_dict()
        except Exception as error:  # open_clip raises OSError, RuntimeError and hub errors alike
            raise ValueError(
                f"model.text.weights: expected to download CLIP RN50 through open_clip, got {error}. On a machine "
                "with internet access, save open_clip.create_model('RN50', pretrained='openai').state_dict() with "
                "torch.save, and set model.text.weights to that file."
            ) from None
    else:
        from tvilfm.models.backbone import read_state_dict

        state = read_state_dict(source, "model.text.weights")
    tower = {key: value.float() for key, value in state.items() if _is_text_key(key)}
    if "text_projection" in tower:
        tower["text_projection"] = stretch_projection(tower["text_projection"], dim)
    try:
        encoder.tower.load_state_dict(tower, strict=True)
    except RuntimeError as error:
        raise ValueError(f"model.text.weights: expected CLIP RN50's text tower, got {source}: {error}") from None


def _is_text_key(key: str) -> bool:
    return key.startswith(("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection"))
