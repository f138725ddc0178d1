"""The two vector spaces of a model and their common name.

The evaluation compares queries of infrared alone through the base stage's head and queries with text through the
current head. So each gallery image has one vector in each space. One space id, derived from the model, names both.

Shapes: N rows, D feature.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tvilfm.models import TVILFM
from tvilfm.models.tvilfm import parameter_digest

Vectors = npt.NDArray[np.float32]


def space_id(model: TVILFM, *, height: int, width: int) -> str:
    """Return the name of a model's spaces: a hash of all its weights and its input image size.

    Args:
        model: the hash covers both heads.
        height, width: input image size in pixels.
    """
    return f"{parameter_digest(model)}-{height}x{width}"


@torch.inference_mode()
def gallery_vectors(model: TVILFM, raw_ND: Vectors) -> dict[str, Vectors]:
    """Return the gallery vectors of visible images: columns `vector` and `vector_base` of `rows.row_schema`.

    Args:
        model: in eval mode.
        raw_ND: float32 raw features, as `encode_pixels` returns.

    Returns:
        Column name -> (N, D) float32 unit vectors.
    """
    raw = torch.from_numpy(raw_ND).to(next(model.parameters()).device)
    return {"vector": model.embed(raw).cpu().numpy(), "vector_base": model.embed_base(raw).cpu().numpy()}
