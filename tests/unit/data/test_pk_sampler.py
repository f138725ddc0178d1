"""P x K batches: identities without, images with replacement, and nothing but (seed, epoch, index) decides them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvilfm.data.pk_sampler import PKBatch, PKSampler


def make_sampler(
    p: int = 4, k: int = 3, *, num_labels: int = 7, visible: int = 40, infrared: int = 30, seed: int = 0
) -> tuple[PKSampler, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    visible_labels, infrared_labels = (
        rng.permutation(np.concatenate([np.arange(num_labels), rng.integers(0, num_labels, count - num_labels)]))
        for count in (visible, infrared)
    )
    sampler = PKSampler(p, k, visible_labels=visible_labels, infrared_labels=infrared_labels, seed=seed)
    return sampler, visible_labels, infrared_labels


def check_batch(batch: PKBatch, p: int, k: int, visible_labels: np.ndarray, infrared_labels: np.ndarray) -> None:
    assert len(batch.labels) == len(batch.visible) == len(batch.infrared) == p * k
    np.testing.assert_array_equal(visible_labels[batch.visible], batch.labels)
    np.testing.assert_array_equal(infrared_labels[batch.infrared], batch.labels)
    blocks = batch.labels.reshape(p, k)
    assert (blocks == blocks[:, :1]).all()
    assert len(set(blocks[:, 0].tolist())) == p


@settings(max_examples=50, deadline=None)
@given(
    p=st.integers(2, 6),
    k=st.integers(1, 5),
    extra=st.integers(0, 10),
    visible=st.integers(20, 60),
    infrared=st.integers(20, 60),
    seed=st.integers(0, 1000),
)
def test_batches_hold_p_identities_and_k_aligned_images_of_each(
    p: int, k: int, extra: int, visible: int, infrared: int, seed: int
) -> None:
    sampler, visible_labels, infrared_labels = make_sampler(
        p, k, num_labels=p + extra, visible=visible, infrared=infrared, seed=seed
    )
    batches = list(sampler)
    assert len(batches) == len(sampler) == int(max(visible, infrared) / (p * k)) + 1
    assert [batch.index for batch in batches] == list(range(len(sampler)))
    for batch in batches:
        check_batch(batch, p, k, visible_labels, infrared_labels)


@pytest.mark.parametrize(
    ("visible", "infrared", "expected"), [(22_258, 11_909, 696), (64, 20, 3), (63, 20, 2), (31, 64, 3), (31, 30, 1)]
)
def test_an_epoch_has_the_published_number_of_batches(visible: int, infrared: int, expected: int) -> None:
    sampler, _, _ = make_sampler(8, 4, num_labels=10, visible=visible, infrared=infrared)
    assert len(sampler) == expected


def test_images_are_drawn_with_replacement() -> None:
    labels = np.arange(3)
    sampler = PKSampler(2, 4, visible_labels=labels, infrared_labels=labels, seed=0)
    for batch in sampler:
        np.testing.assert_array_equal(batch.visible, batch.labels)
    labels = np.repeat(np.arange(2), 4)
    sampler = PKSampler(2, 4, visible_labels=labels, infrared_labels=labels, seed=0)
    batches = []
    for epoch in range(50):
        sampler.set_epoch(epoch)
        batches += list(sampler)
    for rows in ([batch.visible for batch in batches], [batch.infrared for batch in batches]):
        assert any(len(set(picked[:4].tolist())) < 4 for picked in rows)


def test_every_identity_and_every_image_is_drawn_about_equally_often() -> None:
    labels = np.repeat(np.arange(5), 3)
    sampler = PKSampler(2, 2, visible_labels=labels, infrared_labels=labels, seed=0)
    counts, images = np.zeros(5), np.zeros((2, 15))
    for epoch in range(500):
        sampler.set_epoch(epoch)
        for batch in sampler:
            counts[batch.labels[::2]] += 1
            for number, rows in enumerate((batch.visible, batch.infrared)):
                np.add.at(images[number], rows, 1)
    trials = counts.sum() / 2
    assert np.abs(counts / trials - 2 / 5).max() < 5 * (0.24 / trials) ** 0.5
    assert np.abs(images / images[0].sum() - 1 / 15).max() < 5 * (2 / 15 / images[0].sum()) ** 0.5


def as_lists(sampler: PKSampler) -> list[tuple[list[int], list[int], list[int]]]:
    return [(batch.labels.tolist(), batch.visible.tolist(), batch.infrared.tolist()) for batch in sampler]


def test_batches_follow_from_seed_epoch_and_index_alone() -> None:
    sampler, *_ = make_sampler()
    sampler.set_epoch(3)
    third = as_lists(sampler)
    assert as_lists(sampler) == third  # a second pass
    np.random.seed(99)  # the global state has no say
    fresh, *_ = make_sampler()
    fresh.set_epoch(3)
    assert as_lists(fresh) == third
    assert next(iter(fresh)).epoch == 3
    larger, *_ = make_sampler(visible=60)
    assert len(larger) > len(sampler)


def test_the_draw_is_a_stream_of_its_own_over_rows_in_order() -> None:
    """Repeat the draw with plain lists: the same seed has to give the same batches with every release."""
    sampler, visible_labels, infrared_labels = make_sampler(3, 2, visible=200, infrared=150, seed=4)
    sampler.set_epoch(5)
    for index, batch in enumerate(sampler):
        rng = np.random.default_rng([4, 11, 5, index])
        labels = rng.choice(list(range(7)), 3, replace=False)
        drawn = []
        for of_rows in (visible_labels.tolist(), infrared_labels.tolist()):
            rows = {label: [row for row, of in enumerate(of_rows) if of == label] for label in range(7)}
            drawn.append([int(row) for label in labels for row in rng.choice(rows[label], 2)])
        assert [batch.visible.tolist(), batch.infrared.tolist()] == drawn
        assert batch.labels.tolist() == [label for label in labels for _ in range(2)]


def test_epoch_index_and_seed_each_change_the_batch() -> None:
    sampler, *_ = make_sampler()
    first = as_lists(sampler)
    sampler.set_epoch(1)
    second = as_lists(sampler)
    other, *_ = make_sampler(seed=1)
    everything = [str(batch) for batch in first + second + as_lists(other)]
    assert len(set(everything)) == len(everything)


def test_identities_of_one_modality_only_are_never_drawn() -> None:
    sampler = PKSampler(2, 1, visible_labels=np.array([0, 1, 2, 2]), infrared_labels=np.array([1, 3, 2, 1, 1]), seed=0)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        for batch in sampler:
            assert set(batch.labels.tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("p", "k", "message"),
    [
        (1, 2, r"train\.p: expected >= 2 identities per batch, got 1"),
        (2, 0, r"train\.k: expected >= 1 image per identity and modality, got 0"),
        (8, 2, r"train\.p: expected at most 7, .* got 8"),
    ],
)
def test_impossible_batches_are_refused(p: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(p, k)
