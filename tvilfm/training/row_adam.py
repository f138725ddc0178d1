"""Adam for a lookup table of which a step reads a few rows.

Shapes: V rows of the table, R rows of a gradient, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class RowAdam(torch.optim.Optimizer):
    """Adam that changes only rows with a gradient, as torch's SparseAdam, without reading a value on the host.

    Args:
        table: (V, D) parameter; its gradient is sparse or dense.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.

    Attributes:
        found_inf: 1 if the gradients of this step overflow, which skips it; None = not checked.
    """

    def __init__(
        self, table: nn.Parameter, *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__([table], {"lr": lr, "betas": betas, "eps": eps})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the rows of the table that have a gradient other than zero."""
        (group,) = self.param_groups
        (table,) = group["params"]
        if table.grad is None:
            return
        state = self.state[table]
        if not state:
            state["steps"] = torch.zeros((), device=table.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        rows, gradient_RD = _row_gradients(table.grad)
        changes_R1 = gradient_RD.any(dim=1, keepdim=True)
        if self.found_inf is not None:
            changes_R1 &= self.found_inf == 0
            state["steps"] += 1 - self.found_inf
        else:
            state["steps"] += 1
        beta1, beta2 = group["betas"]
        steps = state["steps"].double()
        size = group["lr"] * (1 - beta2**steps).sqrt() / (1 - beta1**steps)
        mean_RD = state["exp_avg"][rows].lerp(gradient_RD, 1 - beta1)
        square_RD = state["exp_avg_sq"][rows].lerp(gradient_RD.square(), 1 - beta2)
        moved_RD = table[rows] - (size * mean_RD / (square_RD.sqrt() + group["eps"])).to(table.dtype)
        for values_VD, new_RD in ((table, moved_RD), (state["exp_avg"], mean_RD), (state["exp_avg_sq"], square_RD)):
            values_VD[rows] = torch.where(changes_R1, new_RD, values_VD[rows])


def _row_gradients(gradient: Tensor) -> tuple[Tensor | slice, Tensor]:
    """Return rows (R,) and their gradients (R, D). A row may occur several times, each time with its whole gradient.

    The number of rows is that of a sparse gradient's entries, or V: to count different rows would need their values.
    """
    if not gradient.is_sparse:
        if gradient.device.type != "cpu":
            return slice(None), gradient
        rows = gradient.any(dim=1).nonzero()[:, 0]
        return rows, gradient[rows]
    rows, order = gradient._indices()[0].sort(stable=True)
    values_RD = gradient._values()[order]
    slots = torch.zeros_like(rows)
    slots[1:] = (rows[1:] != rows[:-1]).cumsum(dim=0)
    return rows, torch.zeros_like(values_RD).index_add_(0, slots, values_RD)[slots]
