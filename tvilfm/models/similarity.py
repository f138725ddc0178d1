"""The similarity that ranks all results.

Shapes: Q queries, R rows of a gallery, D feature.
"""

from __future__ import annotations

from torch import Tensor


def similarity(query_QD: Tensor, gallery_RD: Tensor) -> Tensor:
    """Return (Q, R) float32 products of vectors, which do not depend on what else is in the batch.

    A product in single precision adds up in another order for a handful of rows than for many, and on another
    processor, which moves near ties and parts equal images. Summed in double precision and then rounded, it does not.

    Source: METHOD 8. Differs: the released code sums in single precision.
    """
    return (query_QD.double() @ gallery_RD.double().T).float()
