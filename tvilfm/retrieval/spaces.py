"""The two spaces that a model's vectors live in, and their common name.

The evaluation compares an infrared image alone through the base stage's head, and everything that a text takes part in
through the current one. So whoever is searched has a vector in both, and both are named by the model that made them.

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
    """The name of a model's spaces: a hash of all its weights, and the size that it sees pictures at.

    Args:
        model: both heads take part in the hash.
        height, width: pixels.
    """
    return f"{parameter_digest(model)}-{height}x{width}"


@torch.inference_mode()
def gallery_vectors(model: TVILFM, raw_ND: Vectors) -> dict[str, Vectors]:
    """What a gallery keeps of visible images: `vector` and `vector_base` of `gallery.row_schema`.

    Args:
        model: in eval mode.
        raw_ND: float32 raw features, as `encode_pixels` returns.

    Returns:
        Column name -> (N, D) float32 unit vectors.
    """
    raw = torch.from_numpy(raw_ND).to(next(model.parameters()).device)
    return {"vector": model.embed(raw).cpu().numpy(), "vector_base": model.embed_base(raw).cpu().numpy()}
