"""Re-ranking and query expansion against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.oracles import expand_queries_loop, k_reciprocal_rerank_loop
from tvilfm.evaluation.rerank import expand_queries, k_reciprocal_rerank


def clusters(seed: int, num_query: int, num_gallery: int, *, num_pids: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    centre = torch.randn(num_pids, 6, generator=draw, dtype=torch.float64)
    pid = torch.randint(num_pids, (num_query + num_gallery,), generator=draw)
    noise = torch.randn(num_query + num_gallery, 6, generator=draw, dtype=torch.float64)
    feature = F.normalize(centre[pid] + 0.7 * noise, dim=1)
    return feature[:num_query], feature[num_query:]


@pytest.mark.parametrize(("num_query", "num_gallery"), [(1, 1), (1, 9), (6, 17), (12, 3)])
@pytest.mark.parametrize(("k1", "k2", "lambda_value"), [(20, 6, 0.3), (5, 1, 0.0), (7, 3, 0.5), (1, 2, 1.0)])
def test_rerank_equals_a_plain_loop(num_query: int, num_gallery: int, k1: int, k2: int, lambda_value: float) -> None:
    query, gallery = clusters(num_query + k1, num_query, num_gallery)
    found = k_reciprocal_rerank(query, gallery, k1=k1, k2=k2, lambda_value=lambda_value)
    loop = k_reciprocal_rerank_loop(query.numpy(), gallery.numpy(), k1, k2, lambda_value)
    np.testing.assert_allclose(found.numpy(), loop, rtol=0, atol=1e-7)  # 2 - 2 cos loses half the digits near 0


@pytest.mark.parametrize("chunk", [1, 5, 8, 23, 1000])
def test_rerank_does_not_depend_on_the_chunk(chunk: int) -> None:
    query, gallery = clusters(3, 7, 16)
    whole = k_reciprocal_rerank(query, gallery, k1=6, k2=3)
    parts = k_reciprocal_rerank(query, gallery, k1=6, k2=3, chunk=chunk)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_rerank_with_only_the_original_distance_keeps_the_order() -> None:
    query, gallery = clusters(4, 5, 20)
    found = k_reciprocal_rerank(query.float(), gallery.float(), lambda_value=1.0)
    assert found.dtype == torch.float32
    assert torch.equal(found.argsort(dim=1), (query @ gallery.T).argsort(dim=1))


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, 4, 50])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_expansion_equals_a_plain_loop(alpha: float, k: int, chunk: int) -> None:
    query, gallery = clusters(5, 9, 14)
    found = expand_queries(query, gallery, k=k, alpha=alpha, chunk=chunk)
    loop = expand_queries_loop(query.numpy(), gallery.numpy(), k, alpha)
    np.testing.assert_allclose(found.numpy(), loop, rtol=0, atol=1e-12)


def test_expansion_pulls_a_query_towards_its_neighbours() -> None:
    query, gallery = clusters(6, 8, 30)
    near = (query @ gallery.T).max(dim=1).values
    assert (((expand_queries(query, gallery, k=1) @ gallery.T).max(dim=1).values) > near).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k1": 0}, "rerank.k1: expected >= 1"),
        ({"k2": 0}, "rerank.k2: expected >= 1"),
        ({"chunk": 0}, "rerank.chunk: expected >= 1"),
        ({"lambda_value": 1.5}, "rerank.lambda_value: expected 0 to 1"),
        ({"gallery_GD": torch.ones(3, 5) / 5**0.5}, "query_QD, gallery_GD: expected"),
        ({"gallery_GD": torch.empty(0, 6)}, "query_QD, gallery_GD: expected at least one"),
        ({"gallery_GD": torch.ones(3, 6)}, "gallery_GD: expected unit vectors"),
        ({"query_QD": torch.full((3, 6), float("nan"))}, "query_QD: expected unit vectors"),
    ],
)
def test_wrong_rerank_input_is_named(change: dict[str, Any], named: str) -> None:
    query, gallery = clusters(7, 3, 4)
    with pytest.raises(ValueError, match=named):
        k_reciprocal_rerank(**{"query_QD": query, "gallery_GD": gallery, **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": 0}, "expand.k: expected >= 1"),
        ({"alpha": -1.0}, "expand.alpha: expected >= 0"),
        ({"chunk": 0}, "expand.chunk: expected >= 1"),
    ],
)
def test_wrong_expansion_input_is_named(change: dict[str, Any], named: str) -> None:
    query, gallery = clusters(8, 3, 4)
    with pytest.raises(ValueError, match=named):
        expand_queries(query, gallery, **change)
