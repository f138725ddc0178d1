"""Which rows the losses see in which stage, and what a weight of zero leaves out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracles import wrt_triplet_loop
from tvilfm.config import LossSection
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
