"""Augmentation in two steps: draw random numbers for a batch, then apply them as batched tensor operations.

The draws are separate for three reasons: one seeded generator makes them for the global batch, so they do not depend
on the number of workers; the tensor operations run on the device that holds the pixels; and a test can repeat them for
one image at a time.

Shapes: B images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
LUMINANCE = (0.2989, 0.5870, 0.1140)
ERASED = (0.4914, 0.4822, 0.4465)  # fill value of erased boxes, after normalisation, as in the released code
Recipe = Literal["visible", "visible_augmented", "infrared"]

KEEP, GRAY = -1, 3  # 0, 1, 2 = copy this channel to all three


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of a batch.

    Attributes:
        top_B, left_B: int64, corner of the crop in the padded image.
        flip_B: bool, flip horizontally.
        gray_B: bool, convert to gray before normalisation.
        erase_B4: int64, (top, left, height, width) of the erased box; height 0 = no box.
        channel_B: int64, applied after erasing: 0-2 = copy this channel to all, 3 = convert to gray, -1 = no change.
    """

    top_B: Tensor
    left_B: Tensor
    flip_B: Tensor
    gray_B: Tensor
    erase_B4: Tensor
    channel_B: Tensor

    def __getitem__(self, rows: slice) -> Draws:
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def map(self, change: Callable[[Tensor], Tensor]) -> Draws:
        """Return the draws with every tensor changed."""
        return replace(self, **{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device) -> Draws:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def draw(recipe: Recipe, count: int, rng: np.random.Generator, *, height: int, width: int, pad: int) -> Draws:
    """Draw the augmentation of one batch.

    Args:
        recipe: operations and their probabilities. visible: gray 0.1, erasing 0.6. visible_augmented: erasing 0.6,
            channel exchange 0.5. infrared: erasing 0.5, then copy one channel to all (3/4), otherwise gray 0.6.
        count: number of images.
        rng: generator of the batch.
        height, width, pad: pixels.

    Source: METHOD 4. Differs: none known (the stream of random numbers is ours).
    """
    erase = _draw_erasing(count, rng, height=height, width=width, probability=0.5 if recipe == "infrared" else 0.6)
    channel = np.full(count, KEEP)
    if recipe == "visible_augmented":
        channel = np.where(rng.random(count) < 0.5, rng.integers(0, 3, count), KEEP)
    elif recipe == "infrared":
        choice = rng.integers(0, 4, count)
        channel = np.where(choice < 3, choice, np.where(rng.random(count) < 0.6, GRAY, KEEP))
    gray = rng.random(count) < 0.1 if recipe == "visible" else np.zeros(count, dtype=bool)
    return Draws(
        top_B=torch.from_numpy(rng.integers(0, 2 * pad + 1, count)),
        left_B=torch.from_numpy(rng.integers(0, 2 * pad + 1, count)),
        flip_B=torch.from_numpy(rng.random(count) < 0.5),
        gray_B=torch.from_numpy(gray),
        erase_B4=torch.from_numpy(erase),
        channel_B=torch.from_numpy(channel),
    )


def draw_views(
    recipe: Recipe, images: Sequence[int], *, seed: int, view: int, height: int, width: int, pad: int
) -> Draws:
    """Draw one view of each image; it depends only on (seed, recipe, image, view), not on the other images.

    Args:
        recipe: as in `draw`.
        images: row numbers of the images in the dataset.
        seed: seed of the run.
        view: number of the view.
        height, width, pad: pixels.
    """
    kind = get_args(Recipe).index(recipe)
    draws = [
        draw(recipe, 1, np.random.default_rng([seed, 13, kind, view, image]), height=height, width=width, pad=pad)
        for image in images
    ]
    return Draws(**{field.name: torch.cat([getattr(one, field.name) for one in draws]) for field in fields(Draws)})


def _draw_erasing(
    count: int, rng: np.random.Generator, *, height: int, width: int, probability: float
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Draw erased boxes (Zhong et al., AAAI 2020): relative area 0.02-0.4, aspect ratio 0.3-3.3.

    Of 100 attempts, the first box that fits into the image is used.
    """
    attempts = 100
    area = rng.uniform(0.02, 0.4, (count, attempts)) * height * width
    ratio = rng.uniform(0.3, 1 / 0.3, (count, attempts))
    box_height, box_width = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (box_height < height) & (box_width < width)
    first = np.argmax(fits, axis=1)
    rows = np.arange(count)
    erased = (rng.random(count) < probability) & fits[rows, first]
    h = np.where(erased, box_height[rows, first], 0).astype(np.int64)
    w = np.where(erased, box_width[rows, first], 0).astype(np.int64)
    return np.stack([rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w], axis=1)


def augment(pixels_BHW3: Tensor, draws: Draws, *, pad: int) -> Tensor:
    """Pad, crop, flip, convert to gray, normalise, erase and exchange channels, on the device of the pixels.

    Args:
        pixels_BHW3: uint8.
        draws: draws for this batch, on the same device.
        pad: width of the black border before the crop, pixels.

    Returns:
        (B, 3, H, W) float32, normalised.
    """
    count, height, width, _ = pixels_BHW3.shape
    device = pixels_BHW3.device
    padded = F.pad(pixels_BHW3, (0, 0, pad, pad, pad, pad))
    rows = draws.top_B[:, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, width)
    columns = draws.left_B[:, None] + torch.where(draws.flip_B[:, None], width - 1 - columns, columns)
    batch = torch.arange(count, device=device)[:, None, None]
    images = padded[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    images = torch.where(draws.gray_B[:, None, None, None], _gray_uint8(images), images)
    images = normalise(images)

    top, left, box_height, box_width = (draws.erase_B4[:, i, None] for i in range(4))
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    in_rows, in_columns = (y >= top) & (y < top + box_height), (x >= left) & (x < left + box_width)
    box = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
    images = torch.where(box, _channels(ERASED, device), images)

    channel = draws.channel_B[:, None, None]
    copied = images[batch[:, :, 0], channel[:, :, 0].clamp(0, 2)]
    luminance = (images * _channels(LUMINANCE, device)).sum(dim=1, keepdim=True)
    images = torch.where((channel >= 0)[:, None] & (channel < GRAY)[:, None], copied, images)
    return torch.where((channel == GRAY)[:, None], luminance, images)


def normalise(images_B3HW: Tensor) -> Tensor:
    """Convert uint8 (B, 3, H, W) to float32, normalised with ImageNet's mean and standard deviation.

    Test images are only normalised.
    """
    device = images_B3HW.device
    return (images_B3HW.float() / 255.0 - _channels(MEAN, device)) / _channels(STD, device)


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return (3, 1, 1) constants. They are made once per device: to copy them in every step would wait for the GPU."""
    with torch.inference_mode(False):  # also if the first call is in inference mode
        return torch.tensor(values, device=device)[:, None, None]


def _gray_uint8(images_B3HW: Tensor) -> Tensor:
    """Convert to gray, bit for bit like PIL: integer weights with rounding."""
    r, g, b = images_B3HW.int().unbind(dim=1)
    luma = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16
    return luma.to(torch.uint8)[:, None].expand_as(images_B3HW)
