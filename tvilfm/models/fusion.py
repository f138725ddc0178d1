"""Semantic filtered fusion (SFF)."""

from __future__ import annotations

from torch import Tensor


def semantic_filtered_fusion(infrared_BD: Tensor, text_BD: Tensor, filter_text_BD: Tensor | None) -> Tensor:
    """Add to an infrared feature what the visible caption says and the infrared caption does not.

    What both captions say (a coat, a bag) is in the infrared feature already; subtracting the infrared caption leaves
    the colour.

    Args:
        infrared_BD: raw infrared features, not normalised.
        text_BD: raw text features of the query text, same encoder for both texts.
        filter_text_BD: raw text features of the infrared captions; None fuses without the filter (the ablation).

    Returns:
        (B, D) raw fusion features. Gradients flow through all arguments.

    Source: TVI-LFM, semantic filtered fusion; METHOD 2. Differs: none known.
    """
    fusion_BD = infrared_BD + text_BD
    return fusion_BD if filter_text_BD is None else fusion_BD - filter_text_BD
