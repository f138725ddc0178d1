"""WRT against its plain loop, and the fault that tells the published numerics from the corrected ones."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import wrt_triplet_loop
from tvilfm.losses.wrt_triplet import wrt_triplet_loss

Numerics = Literal["published", "corrected"]
NUMERICS: tuple[Numerics, ...] = get_args(Numerics)


def make_features(labels: list[int], scale: float = 1.0, seed: int = 0, dim: int = 5) -> Tensor:
    return scale * torch.from_numpy(np.random.default_rng(seed).standard_normal((len(labels), dim)))


def check(features: Tensor, labels: list[int], numerics: Numerics) -> None:
    expected = wrt_triplet_loop(features.tolist(), labels, numerics)
    found = wrt_triplet_loss(features, torch.tensor(labels), numerics=numerics)
    assert found.dtype == features.dtype and found.shape == ()
    # Squared norms cancel in the vectorised distance: 1e-12 of a square is 1e-6 of a tiny root.
    assert found.item() == pytest.approx(expected, rel=1e-7, abs=1e-6)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0, 100.0])
@pytest.mark.parametrize(
    "labels", [[0], [4, 4, 4], [0, 1], [0, 0, 1, 1], [2, 0, 2, 1, 0, 2, 7], [0, 1, 2, 3], [1] * 6 + [0] * 2]
)
def test_the_loss_equals_a_plain_loop(labels: list[int], scale: float, numerics: Numerics) -> None:
    check(make_features(labels, scale), labels, numerics)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    seed=st.integers(0, 1000),
    scale=st.floats(0.01, 50),
    numerics=st.sampled_from(NUMERICS),
)
def test_the_loss_equals_a_plain_loop_for_any_labels(
    labels: list[int], seed: int, scale: float, numerics: Numerics
) -> None:
    check(make_features(labels, scale, seed), labels, numerics)


@pytest.mark.parametrize("numerics", NUMERICS)
def test_ties_and_coinciding_features_share_the_weight(numerics: Numerics) -> None:
    features = torch.tensor([[0.0, 0], [0, 0], [3, 0], [-3, 0], [0, 3], [0, 0]], dtype=torch.float64)
    labels = [0, 0, 1, 1, 2, 2]
    check(features, labels, numerics)


def test_both_numerics_agree_where_nothing_underflows() -> None:
    labels = [0, 0, 1, 1, 2, 2]
    features = make_features(labels, 0.5)
    published, corrected = (wrt_triplet_loss(features, torch.tensor(labels), numerics=n) for n in NUMERICS)
    assert published.item() == pytest.approx(corrected.item(), rel=1e-4)
    assert published.item() != corrected.item()  # the published 1e-6 is there


@pytest.mark.parametrize(("numerics", "pushes"), [("published", False), ("corrected", True)])
def test_far_negatives_are_pushed_by_the_corrected_numerics_only(numerics: Numerics, pushes: bool) -> None:
    # Two people far from each other and further apart within: each should leave the other. Differences stay below 88,
    # where the published soft margin becomes infinite.
    features = torch.tensor([[0.0, 0], [0, 86], [84, 0], [84, 86]], dtype=torch.float32, requires_grad=True)
    wrt_triplet_loss(features, torch.tensor([0, 0, 1, 1]), numerics=numerics).backward()  # type: ignore[no-untyped-call]
    assert features.grad is not None
    away = features.grad[:, 0]  # descent moves against the gradient
    if pushes:
        assert (away[:2] > 0.1).all() and (away[2:] < -0.1).all()
    else:
        assert (away.abs() < 1e-20).all()
    assert (features.grad[[0, 2], 1] < -0.1).all() and (features.grad[[1, 3], 1] > 0.1).all()  # both pull


def test_the_published_soft_margin_is_infinite_where_the_released_one_is() -> None:
    # pull - push: the negatives' weights have underflowed, so push is 0 in the published numerics.
    for pull, finite in ((87.0, True), (90.0, False)):
        features = torch.tensor([[0.0, 0], [0, pull], [200, 0], [200, pull]])
        loss = wrt_triplet_loss(features, torch.tensor([0, 0, 1, 1]), numerics="published")
        assert bool(loss.isfinite()) is finite
        assert wrt_triplet_loss(features, torch.tensor([0, 0, 1, 1]), numerics="corrected").isfinite()


def test_gradients_of_the_corrected_loss_are_right() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2])
    features = make_features([0] * 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: wrt_triplet_loss(x, labels, numerics="corrected"), (features,))


@pytest.mark.parametrize("numerics", NUMERICS)
def test_one_identity_and_equal_features_give_finite_gradients(numerics: Numerics) -> None:
    for labels in ([0, 0, 0], [0, 1, 2]):
        features = torch.zeros(3, 4, requires_grad=True)
        loss = wrt_triplet_loss(features, torch.tensor(labels), numerics=numerics)
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss.item() == pytest.approx(np.log(2), abs=1e-5)
        assert features.grad is not None and torch.isfinite(features.grad).all()


def test_the_loss_does_not_depend_on_row_order_or_label_names() -> None:
    labels = [0, 0, 1, 1, 2, 2]
    features = make_features(labels)
    order = torch.tensor([3, 5, 0, 2, 4, 1])
    loss = wrt_triplet_loss(features, torch.tensor(labels))
    assert wrt_triplet_loss(features[order], torch.tensor(labels)[order]).item() == pytest.approx(loss.item())
    renamed = torch.tensor([7, 7, 3, 3, 900, 900])
    assert wrt_triplet_loss(features, renamed).item() == pytest.approx(loss.item())


def test_equal_features_of_a_large_batch_have_no_distance() -> None:
    # Above 25 rows, torch.cdist would use a matrix product, which leaves noise of this size where rows are equal.
    labels = torch.arange(32).repeat_interleave(2)
    features = (100 + torch.from_numpy(np.random.default_rng(0).standard_normal((32, 5))).float()).repeat_interleave(
        2, 0
    )
    found = wrt_triplet_loss(features, labels)
    assert found.item() == pytest.approx(wrt_triplet_loop(features.tolist(), labels.tolist(), "corrected"), rel=1e-5)


def test_half_precision_features_are_compared_in_single_precision() -> None:
    features = make_features([0] * 6, 4.0).float()
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = wrt_triplet_loss(features.bfloat16(), labels)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wrt_triplet_loss(features.bfloat16().double(), labels).item(), rel=1e-5)
