"""Modality ensemble retrieval: one summed query ranks as the summed similarities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tvilfm.models.ensemble import ensemble_query

NAMES = ("infrared", "text", "fusion")


def make_vectors(count: int, seed: int, dim: int = 6) -> Tensor:
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, dim)))
    return values / values.norm(dim=1, keepdim=True)


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.floats(0, 4), min_size=3, max_size=3).filter(lambda w: max(w) > 0.01),
    num_query=st.integers(1, 5),
    num_gallery=st.integers(1, 30),
    seed=st.integers(0, 10_000),
)
def test_one_summed_query_ranks_as_the_summed_similarities(
    weights: list[float], num_query: int, num_gallery: int, seed: int
) -> None:
    features = {name: make_vectors(num_query, seed + i) for i, name in enumerate(NAMES)}
    gallery = make_vectors(num_gallery, seed + 3)
    found = ensemble_query(features, dict(zip(NAMES, weights, strict=True))) @ gallery.T
    for q in range(num_query):
        expected = [
            sum(w * float(features[name][q] @ vector) for name, w in zip(NAMES, weights, strict=True))
            for vector in gallery
        ]
        np.testing.assert_allclose(found[q].numpy(), expected, atol=1e-12)
        assert found[q].argsort(descending=True).tolist() == sorted(range(num_gallery), key=lambda g: -expected[g])


def test_a_weight_of_zero_and_a_missing_modality_are_left_out() -> None:
    infrared, text = make_vectors(3, 0), make_vectors(3, 1)
    broken = torch.full_like(text, torch.nan)
    weights = {"infrared": 2.0, "text": 0.0, "fusion": 1.0}
    assert torch.equal(ensemble_query({"infrared": infrared, "text": broken}, weights), 2 * infrared)
    assert torch.equal(ensemble_query({"text": text, "infrared": infrared}, {"text": 1.0}), text)


@pytest.mark.parametrize("weights", [{}, {"fusion": 1.0}, {"infrared": 0.0, "text": 0.0, "fusion": 1.0}])
def test_an_ensemble_of_nothing_is_refused(weights: dict[str, float]) -> None:
    features = {"infrared": make_vectors(2, 0), "text": make_vectors(2, 1)}
    with pytest.raises(
        ValueError, match=r"weights: expected one above 0 for a modality of \['infrared', 'text'\], got"
    ):
        ensemble_query(features, weights)
