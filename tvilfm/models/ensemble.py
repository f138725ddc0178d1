"""Modality ensemble retrieval (MER) as one search.

Shapes: Q queries, D feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor


def ensemble_query(features: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the weighted sum of a query's unit vectors.

    All modalities are compared with the same gallery vector g, so
    w_f f.g + w_i i.g + w_t t.g = (w_f f + w_i i + w_t t).g, and the three votes need only one search.

    Args:
        features: modality -> (Q, D) float, L2-normalised, all through the current head.
        weights: modality -> weight; modalities without features are skipped.

    Returns:
        (Q, D) sum, not normalised; its similarities are the weighted sums of the modalities' similarities.

    Raises:
        ValueError: when no modality has both features and a weight above 0.

    Source: TVI-LFM, modality ensemble retrieval; METHOD 7. Differs: weights are free (published: all 1).
    """
    parts = [weights[name] * vectors for name, vectors in features.items() if weights.get(name, 0.0) > 0]
    if not parts:
        raise ValueError(
            f"weights: expected one above 0 for a modality of {sorted(features)}, got {dict(weights)}. Raise a weight."
        )
    return cast(Tensor, sum(parts))
