"""The similarity that ranks all results.

Shapes: Q queries, R rows of a gallery, D feature.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 2**15  # of the gallery that are in double precision at a time: 512 MB of 2,048-dimensional features


def similarity(query_QD: Tensor, gallery_RD: Tensor) -> Tensor:
    """Return (Q, R) float32 dot products; each is independent of the other rows in the batch.

    In single precision, the order of summation depends on the number of rows and on the processor. The rounding
    differences reorder near ties and give equal images different similarities. Summing in double precision and then
    rounding avoids both.

    Source: METHOD 8. Differs: the released code sums in single precision.
    """
    query_QD = query_QD.double()
    return torch.cat([(query_QD @ part.double().T).float() for part in torch.split(gallery_RD, ROWS)], dim=1)
