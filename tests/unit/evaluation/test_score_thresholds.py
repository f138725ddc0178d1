"""Score thresholds for people who may not be in the gallery, against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.untrained_run import UntrainedRun
from tvilfm.data.manifest import build_manifest
from tvilfm.evaluation.open_set import OpenSet
from tvilfm.evaluation.protocols import get_protocol
from tvilfm.evaluation.score_thresholds import BestScores, best_scores
from tvilfm.terms import VOTES


def scores(count: int = 200, seed: int = 0) -> BestScores:
    rng = np.random.default_rng(seed)
    present_N, absent_N = (np.round(rng.normal(mean, 1.0, count), 1).astype(np.float32) for mean in (1.0, 0.0))  # ties
    return BestScores(present_N=present_N, absent_N=absent_N, gallery_people=9.0)


@pytest.mark.parametrize("block", [1, 7, 10**9])
def test_the_best_score_of_the_person_and_of_others_follow_the_rule_of_the_protocol(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvilfm.evaluation.score_thresholds.BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(1)
    rows = [
        {"image": f"{n}.jpg", "pid": int(rng.integers(14)), "camid": int(rng.integers(1, 7)), "modality": "visible"}
        for n in range(30)
    ]
    table = build_manifest([row | {"split": "test"} for row in rows])
    query, gallery = table.slice(0, 12), table.slice(12)
    similarity_QG = rng.normal(size=(12, 18)).astype(np.float32)
    similarity_QG[:, [row["camid"] == 2 for row in rows[12:]]] += 3  # queries of camera 3 ignore these
    assert any(row["camid"] == 3 for row in rows[:12])
    found = best_scores(lambda part: similarity_QG[part], query, gallery, get_protocol("sysu_mm01/all/single"))
    present, absent = [], []
    for q, asked in enumerate(rows[:12]):
        kept = [
            (similarity_QG[q, g], row["pid"] == asked["pid"])
            for g, row in enumerate(rows[12:])
            if not (asked["camid"] == 3 and row["camid"] == 2)
        ]
        present += [max(score for score, own in kept if own)] if any(own for _, own in kept) else []
        absent.append(max(score for score, own in kept if not own))
    assert 0 < len(present) < 12
    assert found.present_N.tolist() == present and found.absent_N.tolist() == absent
    assert found.gallery_people == len({row["pid"] for row in rows[12:]})


@pytest.mark.parametrize("most", [0.0, 0.05, 0.1, 0.333, 1.0])
def test_the_fitted_threshold_is_the_lowest_that_keeps_the_limit(most: float) -> None:
    one = scores()
    fitted = one.fit(most)
    assert one.false_accepts(fitted) <= most
    lower = [score for score in one.absent_N.tolist() if score < fitted]
    assert (max(lower, default=-math.inf) == -math.inf) == (most == 1)
    if lower:
        assert one.false_accepts(max(lower)) > most


def test_the_curves_are_the_errors_counted_one_by_one() -> None:
    one = scores()
    table = one.open_set(0.75)
    assert list(table.thresholds) == sorted(set(table.thresholds)) and len(table.thresholds) > 20
    rows = [*zip(table.thresholds, table.false_accepts, table.false_rejects, strict=True)]
    rows.append((0.75, table.fitted_false_accepts, table.fitted_false_rejects))
    for threshold, accepts, rejects in rows:
        assert accepts == sum(score >= threshold for score in one.absent_N.tolist()) / 200
        assert rejects == sum(score < threshold for score in one.present_N.tolist()) / 200
    assert OpenSet.from_dict(table.to_dict()) == table
    with pytest.raises(ValueError, match="open_set: expected other keys"):
        OpenSet.from_dict({"threshold": 1.0})
    with pytest.raises(ValueError, match="errors from 0 to 1, got"):
        OpenSet.from_dict({**table.to_dict(), "fitted_false_accepts": 1.5})
    with pytest.raises(ValueError, match="curves of one length"):
        OpenSet.from_dict({**table.to_dict(), "thresholds": (1.0,)})


def test_each_set_of_votes_has_the_scores_by_which_the_evaluation_ranks(untrained_run: UntrainedRun) -> None:
    evaluator = untrained_run.evaluator
    protocol = get_protocol(untrained_run.config.evaluate.protocols[0])
    query = evaluator.query(protocol)
    texts = evaluator.texts(protocol, "witness")
    assert texts is not None and len(texts.kept) == query.num_rows
    found = evaluator.open_set()
    assert tuple(found) == VOTES
    best: dict[str, list[float]] = {name: [] for name in VOTES}
    for trial in range(protocol.num_trials):
        gallery = evaluator.gallery(protocol, trial)
        parts = evaluator.part_vectors(query, texts)
        alone = evaluator.image_vectors(query, base=True)
        rankings = {
            "infrared": evaluator.similarity(alone, gallery, base=True),
            "text": evaluator.similarity(parts["text"], gallery, base=False),
            "ensemble": evaluator.ensemble_similarity(parts, gallery),
            "ensemble-unfiltered": evaluator.ensemble_similarity(
                evaluator.part_vectors(query, texts, filter_text=False), gallery
            ),
        }
        for name, rows in rankings.items():
            same = query["pid"].to_numpy()[:, None] == gallery["pid"].to_numpy()[None]
            hidden = (query["camid"].to_numpy()[:, None] == 3) & (gallery["camid"].to_numpy()[None] == 2)
            best[name] += np.where(same & ~hidden, rows(slice(None)), -np.inf).max(axis=1).tolist()
    for name in VOTES:
        assert found[name].present_N.tolist() == best[name]
    assert found["ensemble"].present_N.tolist() != found["ensemble-unfiltered"].present_N.tolist()
