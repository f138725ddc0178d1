"""Vectorised metrics against a plain loop, over the sizes and ties that break counting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import ranking_metrics_loop
from tvilfm.evaluation import counting
from tvilfm.evaluation import metrics as metrics_module
from tvilfm.evaluation.metrics import MetricRule, RankingMetrics, ranking_metrics

RULES: tuple[MetricRule, ...] = ("sysu_mm01", "regdb", "llcm", "market1501")
Case = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def make_case(
    seed: int, num_query: int, num_gallery: int, num_pids: int, *, levels: int | None = None, by_pid: bool = False
) -> Case:
    """Random labels and similarities; with `levels`, only that many distinct similarities, so ties abound."""
    rng = np.random.default_rng(seed)
    similarity = rng.standard_normal((num_query, num_gallery))
    if levels is not None:
        similarity = rng.integers(0, levels, (num_query, num_gallery)).astype(np.float64) - levels // 2
    query_pids, gallery_pids = rng.integers(0, num_pids, num_query), rng.integers(0, num_pids, num_gallery)
    if by_pid:
        gallery_pids = np.sort(gallery_pids)
    query_camids, gallery_camids = rng.integers(1, 4, num_query), rng.integers(1, 4, num_gallery)
    query_pids[0], gallery_pids[0], query_camids[0], gallery_camids[0] = gallery_pids[0], gallery_pids[0], 1, 2
    return similarity, query_pids, gallery_pids, query_camids, gallery_camids


def check(case: Case, rule: MetricRule, *, max_rank: int = 20, **options: Any) -> RankingMetrics:
    found = ranking_metrics(*case, protocol=rule, max_rank=max_rank, **options)
    cmc, mean_ap, mean_inp, valid = ranking_metrics_loop(*case, rule, max_rank)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.cmc, cmc, rtol=0, atol=1e-12)
    assert found.cmc.shape == (max_rank,) and found.cmc.dtype == np.float64
    assert found.rank1 == found.cmc[0]
    assert found.mAP == pytest.approx(mean_ap, abs=1e-12)
    assert found.mINP == pytest.approx(mean_inp, abs=1e-12)
    assert found.num_valid_queries == valid
    return found


@pytest.mark.parametrize("rule", RULES)
def test_a_matrix_that_is_computed_in_blocks_gives_the_metrics_of_the_whole(
    rule: MetricRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    similarity, *labels = make_case(3, 31, 40, 6, levels=5)
    whole = ranking_metrics(similarity, *labels, protocol=rule)
    monkeypatch.setattr(metrics_module, "BLOCK_ELEMENTS", 4 * 40)
    sizes = []

    def rows(queries: slice) -> np.ndarray:
        sizes.append(queries.stop - queries.start)
        return similarity[queries]

    blocks = ranking_metrics(rows, *labels, protocol=rule)
    assert sizes == [4] * 7 + [3]
    assert blocks.cmc.tolist() == whole.cmc.tolist() and blocks.num_valid_queries == whole.num_valid_queries
    assert (blocks.mAP, blocks.mINP) == pytest.approx((whole.mAP, whole.mINP), abs=1e-12)
    with pytest.raises(ValueError, match=r"similarity_QG: expected .* got shape \(31, 40\)"):
        ranking_metrics(lambda queries: similarity, *labels, protocol=rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("by_pid", [False, True])
@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize(
    ("num_query", "num_gallery", "num_pids"), [(1, 1, 1), (7, 12, 1), (30, 41, 6), (25, 9, 40), (3, 300, 4)]
)
def test_metrics_equal_a_plain_loop(
    rule: MetricRule, by_pid: bool, levels: int | None, num_query: int, num_gallery: int, num_pids: int
) -> None:
    case = make_case(num_query, num_query, num_gallery, num_pids, levels=levels, by_pid=by_pid)
    check(case, rule)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_query=st.integers(1, 12),
    num_gallery=st.integers(1, 24),
    num_pids=st.integers(1, 8),
    levels=st.sampled_from([None, 1, 2, 5]),
    rule=st.sampled_from(RULES),
    max_rank=st.integers(1, 30),
    chunk_elements=st.integers(1, 300),
)
def test_metrics_equal_a_plain_loop_anywhere(
    seed: int,
    num_query: int,
    num_gallery: int,
    num_pids: int,
    levels: int | None,
    rule: MetricRule,
    max_rank: int,
    chunk_elements: int,
) -> None:
    case = make_case(seed, num_query, num_gallery, num_pids, levels=levels)
    check(case, rule, max_rank=max_rank, chunk_elements=chunk_elements)


@pytest.mark.parametrize("rule", RULES)
def test_byte_counts_do_not_overflow_in_a_long_gallery(rule: MetricRule) -> None:
    case = make_case(3, 4, 2 * 8 * 255 + 17, 3)
    similarity, query_pids, gallery_pids, *_ = case
    similarity[gallery_pids[None] == query_pids[:, None]] -= 100.0  # every other image is ahead of every match
    check(case, rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_gallery", [8 * 255, 8 * 255 + 1, 8 * 256, 8 * 510, 8 * 512])
def test_a_match_behind_a_whole_gallery_has_its_length_as_rank(rule: MetricRule, num_gallery: int) -> None:
    similarity, pids = np.zeros((1, num_gallery)), np.arange(num_gallery)
    similarity[0, -1] = -1.0  # one in every byte but its own: the sum of 256 words would be 0
    found = ranking_metrics(similarity, pids[-1:], pids, [6], np.ones_like(pids), protocol=rule)
    assert found.mAP == found.mINP == 1 / num_gallery


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chunk_elements", [1, 97, 98, 1000, 10**6])
@pytest.mark.parametrize("cache_bytes", [1, 1000])
def test_chunks_never_change_a_number(
    rule: MetricRule, chunk_elements: int, cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(5, 33, 97, 4, levels=8, by_pid=True)
    whole = ranking_metrics(*case, protocol=rule)
    monkeypatch.setattr(counting, "_CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(metrics_module, "_WORTH_THREADS", 1)
    parts = ranking_metrics(*case, protocol=rule, chunk_elements=chunk_elements)
    np.testing.assert_array_equal(parts.cmc, whole.cmc)
    assert (parts.mAP, parts.mINP) == (whole.mAP, whole.mINP)


@pytest.mark.parametrize("rule", RULES)
def test_gallery_order_matters_only_for_ties(rule: MetricRule) -> None:
    similarity, query_pids, gallery_pids, query_camids, gallery_camids = make_case(7, 40, 60, 7)
    whole = ranking_metrics(similarity, query_pids, gallery_pids, query_camids, gallery_camids, protocol=rule)
    order = np.random.default_rng(0).permutation(60)
    moved = ranking_metrics(
        similarity[:, order], query_pids, gallery_pids[order], query_camids, gallery_camids[order], protocol=rule
    )
    np.testing.assert_array_equal(moved.cmc, whole.cmc)
    assert (moved.mAP, moved.mINP) == pytest.approx((whole.mAP, whole.mINP), abs=1e-15)


def test_ties_rank_by_gallery_index() -> None:
    pids, camids = np.array([0, 1]), np.array([1, 1])
    found = ranking_metrics(np.zeros((2, 2)), pids, pids, np.array([2, 2]), camids, protocol="regdb", max_rank=2)
    assert found.cmc.tolist() == [0.5, 1.0]


def test_negative_zero_ties_with_zero() -> None:
    similarity = np.array([[-0.0, 0.0]], dtype=np.float32)
    found = ranking_metrics(similarity, [5], [4, 5], [2], [1, 1], protocol="regdb")
    assert found.rank1 == 0.0


@pytest.mark.parametrize("protocol", ["regdb", "sysu_mm01", "llcm", "market1501"])
def test_infinite_similarities_rank_at_the_ends(protocol: MetricRule) -> None:
    similarity = np.array([[np.inf, -np.inf, 0.0, -np.inf], [-np.inf, np.inf, np.inf, 1.0]])
    case = (similarity, np.array([1, 2]), np.array([2, 1, 1, 2]), np.array([3, 3]), np.array([1, 1, 2, 2]))
    check(case, protocol)


def test_cmc_skips_queries_without_gallery_match() -> None:
    similarity = np.array([[0.9, 0.1], [0.9, 0.1]])
    found = ranking_metrics(similarity, [1, 7], [1, 2], [2, 2], [1, 1], protocol="regdb")
    assert found.num_valid_queries == 1
    assert (found.rank1, found.mAP, found.mINP) == (1.0, 1.0, 1.0)


def test_same_identity_and_camera_leaves_a_query_without_match() -> None:
    similarity = np.array([[0.9, 0.1], [0.2, 0.8]])
    found = ranking_metrics(similarity, [1, 2], [1, 2], [1, 2], [1, 1], protocol="llcm")
    assert found.num_valid_queries == 1 and found.rank1 == 1.0


def test_camera_three_ignores_camera_two_of_every_identity() -> None:
    similarity = np.array([[0.9, 0.8, 0.1], [0.9, 0.8, 0.1]])
    args = (similarity, [1, 1], [2, 1, 1], [3, 6], [2, 2, 1])
    found = ranking_metrics(*args, protocol="sysu_mm01")
    # Camera 3 keeps only the last image; camera 6 finds identity 2 first, then both of its own.
    assert found.rank1 == 0.5
    assert found.mAP == pytest.approx((1.0 + (1 / 2 + 2 / 3) / 2) / 2)


def test_deduplicated_cmc_counts_an_identity_once() -> None:
    similarity = np.array([[0.9, 0.8, 0.7, 0.1]])
    args = (similarity, [1], [2, 2, 2, 1], [6], [1, 2, 4, 5])
    assert ranking_metrics(*args, protocol="sysu_mm01", max_rank=2).cmc.tolist() == [0.0, 1.0]
    assert ranking_metrics(*args, protocol="regdb", max_rank=4).cmc.tolist() == [0.0, 0.0, 0.0, 1.0]


def test_cmc_past_the_gallery_repeats_the_last_value() -> None:
    found = ranking_metrics(np.array([[0.1, 0.9]]), [1], [1, 2], [6], [1, 1], protocol="regdb", max_rank=5)
    assert found.cmc.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_and_torch_agree_in_every_dtype(rule: MetricRule, dtype: type) -> None:
    similarity, *labels = make_case(11, 30, 50, 6)
    narrow = similarity.astype(dtype)
    loop = check((narrow.astype(np.float64), *labels), rule)  # type: ignore[arg-type]
    for matrix in (narrow, np.asfortranarray(narrow), torch.from_numpy(narrow)):
        found = ranking_metrics(matrix, *map(torch.from_numpy, labels), protocol=rule)
        np.testing.assert_array_equal(found.cmc, loop.cmc)
        assert (found.mAP, found.mINP) == (loop.mAP, loop.mINP)


def test_bfloat16_ranks_by_its_own_rounded_values() -> None:
    similarity, *labels = make_case(12, 30, 50, 6)
    rounded = torch.from_numpy(similarity).to(torch.bfloat16).requires_grad_()
    found = ranking_metrics(rounded, *labels, protocol="llcm")
    loop = check((rounded.detach().double().numpy(), *labels), "llcm")  # type: ignore[arg-type]
    assert found.mAP == loop.mAP


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("levels", [None, 3])
def test_device_counts_equal_processor_counts(
    rule: MetricRule, levels: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(13, 40, 70, 8, levels=levels)
    expected = ranking_metrics(*case, protocol=rule)
    calls = []

    def block_stays_torch(matrix: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        calls.append(rows)
        return matrix[torch.from_numpy(rows)]

    monkeypatch.setattr(metrics_module, "take_rows", block_stays_torch)
    monkeypatch.setattr(counting, "_DEVICE_BYTES", 2000)
    found = ranking_metrics(torch.from_numpy(case[0]), *case[1:], protocol=rule, chunk_elements=700)
    assert calls
    np.testing.assert_array_equal(found.cmc, expected.cmc)
    assert (found.mAP, found.mINP) == pytest.approx((expected.mAP, expected.mINP), abs=1e-15)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_gpu_gives_the_same_numbers(rule: MetricRule, dtype: torch.dtype) -> None:
    similarity, *labels = make_case(14, 50, 400, 9)
    matrix = torch.from_numpy(similarity).to(dtype)
    found = ranking_metrics(matrix.cuda(), *labels, protocol=rule, chunk_elements=3000)
    expected = ranking_metrics(matrix, *labels, protocol=rule)
    np.testing.assert_array_equal(found.cmc, expected.cmc)
    assert (found.mAP, found.mINP) == (expected.mAP, expected.mINP)


def test_numpy_buffer_size_is_left_as_found() -> None:
    before = np.getbufsize()
    check(make_case(15, 5, 9, 2), "regdb")
    assert np.getbufsize() == before


GOOD: dict[str, Any] = {
    "similarity_QG": np.zeros((2, 3)),
    "query_pids": [1, 2],
    "gallery_pids": [1, 2, 3],
    "query_camids": [1, 1],
    "gallery_camids": [2, 2, 2],
    "protocol": "regdb",
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"similarity_QG": np.array([[0.0, np.nan, 0.0], [0.0, 0.0, 0.0]])}, "similarity_QG: expected no NaN"),
        ({"similarity_QG": torch.full((2, 3), float("nan"))}, "similarity_QG: expected no NaN"),
        ({"similarity_QG": np.zeros(3)}, "similarity_QG: expected a matrix"),
        ({"similarity_QG": np.zeros((2, 0)), "gallery_pids": [], "gallery_camids": []}, "similarity_QG: expected"),
        ({"similarity_QG": np.zeros((2, 3), dtype=int)}, "similarity_QG: expected a matrix"),
        ({"query_pids": [1]}, "query_pids: expected 2 integers"),
        ({"gallery_pids": [1, 2]}, "gallery_pids: expected 3 integers"),
        ({"query_camids": [[1, 1]]}, "query_camids: expected 2 integers"),
        ({"gallery_camids": [1.0, 2.0, 3.0]}, "gallery_camids: expected 3 integers"),
        ({"protocol": "cuhk03"}, "protocol: expected one of sysu_mm01"),
        ({"max_rank": 0}, "max_rank: expected >= 1"),
        ({"chunk_elements": 0}, "chunk_elements: expected >= 1"),
        ({"query_pids": [8, 9]}, "query_pids: expected at least one query whose identity"),
    ],
)
def test_wrong_input_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ranking_metrics(**{**GOOD, **change})
