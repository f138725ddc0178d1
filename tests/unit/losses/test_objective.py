"""Which rows the losses see in which stage, and what a weight of zero leaves out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracles import hetero_center_loop, wrt_triplet_loop
from tvilfm.config import LossSection
from tvilfm.losses.hetero_center import hetero_center_loss
from tvilfm.losses.objective import JointObjective, ModalityFeatures

B, D = 4, 3
NAMES = ("visible_BD", "visible_augmented_BD", "infrared_BD", "fusion_BD", "text_BD")


def make_features(*, text: bool) -> tuple[ModalityFeatures, dict[str, Tensor]]:
    parts = {name: torch.full((B, D), float(i)) + torch.rand(B, D) / 2 for i, name in enumerate(NAMES)}
    used = {name: part for name, part in parts.items() if text or name not in ("fusion_BD", "text_BD")}
    return ModalityFeatures(**used), parts


@pytest.mark.parametrize(
    ("text", "joint", "expected"),
    [
        (False, True, NAMES[:3]),
        (False, False, NAMES[:3]),
        (True, True, NAMES),
        (True, False, ("visible_BD", "visible_augmented_BD", "fusion_BD")),
    ],
)
def test_rows_are_those_of_the_stage_and_the_ablation(text: bool, joint: bool, expected: tuple[str, ...]) -> None:
    features, parts = make_features(text=text)
    rows = JointObjective(LossSection(joint=joint)).stack(features)
    assert torch.equal(rows, torch.cat([parts[name] for name in expected]))


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(0)
    labels = torch.arange(3).repeat_interleave(2).repeat(3)
    return torch.from_numpy(rng.standard_normal((18, D))), torch.from_numpy(rng.standard_normal((18, 5))), labels


def cross_entropy_loop(logits: Tensor, labels: Tensor) -> float:
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total += math.log(sum(math.exp(value) for value in row)) - row[label]
    return total / len(labels)


@pytest.mark.parametrize("numerics", ["published", "corrected"])
def test_terms_are_cross_entropy_and_wrt_by_their_weights(case: tuple[Tensor, Tensor, Tensor], numerics: str) -> None:
    raw, logits, labels = case
    section = LossSection.model_validate({"id_weight": 0.5, "wrt_weight": 3.0, "wrt_numerics": numerics})
    raw = 20 * raw  # far enough for the numerics to differ
    terms = JointObjective(section)(raw, logits, labels)
    assert list(terms) == ["id", "wrt"]
    assert terms["id"].item() == pytest.approx(0.5 * cross_entropy_loop(logits, labels), rel=1e-6)
    expected = wrt_triplet_loop(raw.tolist(), labels.tolist(), numerics)
    other = wrt_triplet_loop(raw.tolist(), labels.tolist(), {"published": "corrected"}.get(numerics, "published"))
    assert abs(expected - other) > 0.1
    assert terms["wrt"].item() == pytest.approx(3 * expected, rel=1e-6)


@pytest.mark.parametrize(("dropped", "kept"), [("id_weight", ["wrt"]), ("wrt_weight", ["id"])])
def test_a_weight_of_zero_drops_the_term(case: tuple[Tensor, Tensor, Tensor], dropped: str, kept: list[str]) -> None:
    raw, logits, labels = case
    # Not a number times zero is not a number: a dropped term must not be computed at all.
    broken = (raw.fill_(torch.nan), logits) if dropped == "wrt_weight" else (raw, logits.fill_(torch.nan))
    terms = JointObjective(LossSection.model_validate({dropped: 0.0}))(*broken, labels)
    assert list(terms) == kept
    assert all(torch.isfinite(term) for term in terms.values())


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        ([0, 0, 1, 1] * 3, [0] * 4 + [1] * 4 + [2] * 4),
        ([5, 5, 5, 5], [0, 0, 1, 1]),
        ([0, 0, 1, 2], [0, 1, 1, 0]),  # identity 1 has no visible row, identity 2 nothing else
        ([0, 1, 2], [0, 0, 0]),
    ],
)
def test_hetero_centre_is_the_distance_of_means(labels: list[int], groups: list[int]) -> None:
    features = np.random.default_rng(1).standard_normal((len(labels), D))
    loss = hetero_center_loss(torch.from_numpy(features), torch.tensor(labels), torch.tensor(groups))
    assert loss.item() == pytest.approx(hetero_center_loop(features, labels, groups), rel=1e-12)


def test_hetero_centre_pulls_a_modality_to_visible_and_leaves_its_spread(case: tuple[Tensor, Tensor, Tensor]) -> None:
    raw, logits, labels = case
    groups = torch.arange(3).repeat_interleave(6)
    terms = JointObjective(LossSection(center_weight=0.5))(raw.requires_grad_(), logits, labels, groups)
    assert list(terms) == ["id", "wrt", "center"]
    assert terms["center"].item() == pytest.approx(
        0.5 * hetero_center_loop(raw.detach().numpy(), labels.tolist(), groups.tolist()), rel=1e-12
    )
    (gradient,) = torch.autograd.grad(terms["center"], raw)
    # The two rows of an identity and group get the same push: their difference stays.
    assert torch.equal(gradient[0::2], gradient[1::2]) and gradient.abs().min() > 0


def test_hetero_centre_of_half_precision_features_is_in_single_precision(case: tuple[Tensor, Tensor, Tensor]) -> None:
    features, labels = 4 * case[0].bfloat16(), case[2]
    groups = torch.arange(3).repeat_interleave(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hetero_center_loss(features, labels, groups)
    expected = hetero_center_loop(features.double().numpy(), labels.tolist(), groups.tolist())
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=1e-5)


def test_without_a_weight_the_hetero_centre_asks_for_no_groups(case: tuple[Tensor, Tensor, Tensor]) -> None:
    assert list(JointObjective(LossSection())(*case)) == ["id", "wrt"]
