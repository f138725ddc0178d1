"""The similarity that ranks all results.

Shapes: Q queries, R rows of a gallery, D feature.
"""

from __future__ import annotations

from torch import Tensor


def similarity(query_QD: Tensor, gallery_RD: Tensor) -> Tensor:
    """Return (Q, R) float32 dot products; each is independent of the other rows in the batch.

    In single precision, the order of summation depends on the number of rows and on the processor. The rounding
    differences reorder near ties and give equal images different similarities. Summing in double precision and then
    rounding avoids both.

    Source: METHOD 8. Differs: the released code sums in single precision.
    """
    return (query_QD.double() @ gallery_RD.double().T).float()
