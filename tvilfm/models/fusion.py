"""Semantic filtered fusion (SFF)."""

from __future__ import annotations

from torch import Tensor


def semantic_filtered_fusion(infrared_BD: Tensor, text_BD: Tensor, filter_text_BD: Tensor | None) -> Tensor:
    """Add the query text to infrared features, without the content that the infrared caption also has.

    The infrared feature already contains what both texts describe (a coat, a bag). Subtracting the infrared caption
    leaves the colour.

    Args:
        infrared_BD: raw infrared features, not normalised.
        text_BD: raw text features of the query text.
        filter_text_BD: raw text features of the infrared captions, from the same encoder; None fuses without the
            filter (the ablation).

    Returns:
        (B, D) raw fusion features. Gradients flow through all arguments.

    Source: TVI-LFM, semantic filtered fusion; METHOD 2. Differs: none known.
    """
    fusion_BD = infrared_BD + text_BD
    return fusion_BD if filter_text_BD is None else fusion_BD - filter_text_BD
