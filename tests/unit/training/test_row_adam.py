"""RowAdam against torch's SparseAdam."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tvilfm.training.row_adam import RowAdam


@pytest.mark.parametrize("sparse", [True, False])
def test_rows_follow_torchs_sparse_adam(sparse: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Embedding(50, 6, sparse=True) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    ours.sparse = sparse
    optimizers = RowAdam(ours.weight, lr=0.1), torch.optim.SparseAdam(theirs.parameters(), lr=0.1)
    for _ in range(5):
        tokens = torch.randint(0, 9, (4, 6))  # rows occur several times
        target = torch.randn(4, 6, 6)
        for table, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (table(tokens) - target).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=1e-6)


def test_an_overflow_skips_the_step_and_its_count() -> None:
    table = nn.Embedding(5, 2)
    optimizer = RowAdam(table.weight, lr=0.1)
    before = table.weight.detach().clone()
    for found in (1.0, 0.0):
        table.weight.grad = torch.ones_like(table.weight)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
        assert torch.equal(table.weight, before) == bool(found)
    assert optimizer.state[table.weight]["steps"] == 1
