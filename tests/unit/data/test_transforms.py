"""Augmentation: batched tensors against PIL image by image, and chance within its binomial bounds."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import augment_loop, erasing_area_share_loop
from tvilfm.data.transforms import GRAY, KEEP, Draws, Recipe, augment, draw, normalise

RECIPES: tuple[Recipe, ...] = ("visible", "visible_augmented", "infrared")
NUM_DRAWS = 20_000
HEIGHT, WIDTH, PAD = 288, 144, 10


def make_pixels(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def check_against_loop(pixels: np.ndarray, draws: Draws, pad: int) -> None:
    found = augment(torch.from_numpy(pixels), draws, pad=pad)
    assert found.dtype == torch.float32
    assert found.shape == (len(pixels), 3, *pixels.shape[1:3])
    for i, image in enumerate(pixels):
        expected = augment_loop(
            image,
            pad,
            top=int(draws.top_B[i]),
            left=int(draws.left_B[i]),
            flip=bool(draws.flip_B[i]),
            gray=bool(draws.gray_B[i]),
            erase=draws.erase_B4[i].tolist(),
            channel=int(draws.channel_B[i]),
        )
        np.testing.assert_allclose(found[i].numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("pad", [0, 3])
def test_augmentation_equals_pil_image_by_image(recipe: Recipe, pad: int) -> None:
    pixels = make_pixels(40, 14, 9)
    draws = draw(recipe, 40, np.random.default_rng(pad), height=14, width=9, pad=pad)
    # Which branches a seed reaches is luck; the comparison is worth nothing without them.
    assert draws.flip_B.any() and not draws.flip_B.all()
    assert (draws.erase_B4[:, 2] > 0).any() and (draws.erase_B4[:, 2] == 0).any()
    assert bool(draws.gray_B.any()) == (recipe == "visible")
    expected = {"visible": {KEEP}, "visible_augmented": {KEEP, 0, 1, 2}, "infrared": {KEEP, 0, 1, 2, GRAY}}
    assert set(draws.channel_B.tolist()) == expected[recipe]
    check_against_loop(pixels, draws, pad)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    height=st.integers(2, 12),
    width=st.integers(2, 12),
    pad=st.integers(0, 4),
    recipe=st.sampled_from(RECIPES),
)
def test_augmentation_equals_pil_for_any_size(seed: int, height: int, width: int, pad: int, recipe: Recipe) -> None:
    draws = draw(recipe, 3, np.random.default_rng(seed), height=height, width=width, pad=pad)
    check_against_loop(make_pixels(3, height, width, seed), draws, pad)


@pytest.mark.parametrize("channel", [KEEP, 0, 1, 2, GRAY])
@pytest.mark.parametrize("gray", [False, True])
def test_every_combination_of_branches_equals_pil(channel: int, gray: bool) -> None:
    corners = torch.tensor([0, 4, 2])
    draws = Draws(
        top_B=corners,
        left_B=corners.flip(0),
        flip_B=torch.tensor([True, False, True]),
        gray_B=torch.full((3,), gray),
        erase_B4=torch.tensor([[0, 0, 0, 0], [3, 2, 4, 3], [0, 0, 10, 7]]),
        channel_B=torch.full((3,), channel),
    )
    check_against_loop(make_pixels(3, 10, 7), draws, pad=2)


def test_the_crop_reaches_every_border_of_the_padding() -> None:
    pixels = np.full((4, 4, 4, 3), 255, dtype=np.uint8)
    draws = Draws(
        top_B=torch.tensor([0, 0, 4, 4]),
        left_B=torch.tensor([0, 4, 0, 4]),
        flip_B=torch.zeros(4, dtype=torch.bool),
        gray_B=torch.zeros(4, dtype=torch.bool),
        erase_B4=torch.zeros(4, 4, dtype=torch.int64),
        channel_B=torch.full((4,), KEEP),
    )
    white = augment(torch.from_numpy(pixels), draws, pad=2)[:, 0] > 0
    for image, (rows, columns) in zip(
        white, [((2, 4), (2, 4)), ((2, 4), (0, 2)), ((0, 2), (2, 4)), ((0, 2), (0, 2))], strict=True
    ):
        expected = torch.zeros(4, 4, dtype=torch.bool)
        expected[slice(*rows), slice(*columns)] = True
        assert torch.equal(image, expected)


def test_slicing_draws_slices_every_field() -> None:
    draws = draw("infrared", 12, np.random.default_rng(0), height=20, width=10, pad=2)
    part = draws[4:8]
    for field in fields(Draws):
        assert torch.equal(getattr(part, field.name), getattr(draws, field.name)[4:8])
    pixels = torch.from_numpy(make_pixels(12, 20, 10))
    assert torch.equal(augment(pixels[4:8], part, pad=2), augment(pixels, draws, pad=2)[4:8])


def test_normalisation_is_imagenets() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    found = normalise(images)
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        expected = (images[:, c].double() / 255 - mean) / std
        torch.testing.assert_close(found[:, c].double(), expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def many() -> dict[Recipe, Draws]:
    return {
        recipe: draw(recipe, NUM_DRAWS, np.random.default_rng([7, i]), height=HEIGHT, width=WIDTH, pad=PAD)
        for i, recipe in enumerate(RECIPES)
    }


def assert_share(hits: torch.Tensor, probability: float) -> None:
    """Within five standard deviations of a binomial."""
    deviation = (probability * (1 - probability) / NUM_DRAWS) ** 0.5
    assert hits.double().mean().item() == pytest.approx(probability, abs=5 * deviation)


@pytest.mark.parametrize(
    ("recipe", "erased", "gray", "channels"),
    [
        ("visible", 0.6, 0.1, {KEEP: 1.0}),
        ("visible_augmented", 0.6, 0.0, {KEEP: 1 / 2, 0: 1 / 6, 1: 1 / 6, 2: 1 / 6}),
        ("infrared", 0.5, 0.0, {0: 1 / 4, 1: 1 / 4, 2: 1 / 4, GRAY: 0.15, KEEP: 0.1}),
    ],
)
def test_probabilities_are_those_of_the_paper(
    many: dict[Recipe, Draws], recipe: Recipe, erased: float, gray: float, channels: dict[int, float]
) -> None:
    draws = many[recipe]
    assert_share(draws.erase_B4[:, 2] > 0, erased)
    assert_share(draws.gray_B, gray)
    assert_share(draws.flip_B, 0.5)
    assert set(draws.channel_B.tolist()) == set(channels)
    for channel, probability in channels.items():
        assert_share(draws.channel_B == channel, probability)
    for corner in (draws.top_B, draws.left_B):
        assert (int(corner.min()), int(corner.max())) == (0, 2 * PAD)
        for place in range(2 * PAD + 1):
            assert_share(corner == place, 1 / (2 * PAD + 1))


def test_draws_of_one_image_are_independent(many: dict[Recipe, Draws]) -> None:
    draws = many["visible"]
    columns = torch.stack([draws.top_B, draws.left_B, draws.flip_B, draws.gray_B, draws.erase_B4[:, 2] > 0]).double()
    correlation = torch.corrcoef(columns) - torch.eye(5, dtype=torch.float64)
    assert correlation.abs().max() < 5 / NUM_DRAWS**0.5
    assert torch.corrcoef(torch.stack([columns[2, :-1], columns[2, 1:]]))[0, 1].abs() < 5 / NUM_DRAWS**0.5


@pytest.mark.parametrize("recipe", RECIPES)
def test_erased_boxes_stay_inside_and_within_their_bounds(many: dict[Recipe, Draws], recipe: Recipe) -> None:
    top, left, height, width = many[recipe].erase_B4[many[recipe].erase_B4[:, 2] > 0].double().unbind(dim=1)
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= HEIGHT).all() and (left + width <= WIDTH).all()
    assert (height < HEIGHT).all() and (width < WIDTH).all() and (width > 0).all()
    # Sides are rounded to pixels: half a pixel on each.
    assert ((height + 0.5) * (width + 0.5) >= 0.02 * HEIGHT * WIDTH).all()
    assert ((height - 0.5) * (width - 0.5) <= 0.4 * HEIGHT * WIDTH).all()
    assert ((height + 0.5) / (width - 0.5) >= 0.3).all()
    assert ((height - 0.5) / (width + 0.5) <= 1 / 0.3).all()
    share = height * width / (HEIGHT * WIDTH)
    assert share.min() < 0.03 and share.max() > 0.39
    assert (height / width).min() < 0.35 and (height / width).max() > 3.2
    assert top.min() == 0 and ((top + height) == HEIGHT).any() and ((left + width) == WIDTH).any()
    expected = np.array(erasing_area_share_loop(HEIGHT, WIDTH, len(share), seed=1))
    deviation = expected.std() * (2 / len(share)) ** 0.5
    assert share.mean().item() == pytest.approx(expected.mean(), abs=5 * deviation)


def test_the_same_generator_state_draws_the_same() -> None:
    first, again, other = (
        draw("infrared", 50, np.random.default_rng(seed), height=20, width=10, pad=2) for seed in (1, 1, 2)
    )
    for field in fields(Draws):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name))
    assert any(not torch.equal(getattr(first, field.name), getattr(other, field.name)) for field in fields(Draws))
