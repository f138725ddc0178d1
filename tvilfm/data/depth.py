"""Images of more than 8 bits per pixel: one scaling to 8 bits, for training, indexing and search.

A pixel v becomes round(255 * (v - low) / (high - low)), with values outside of the window set to its ends. Without a
window, low is 0 and high is 65,535, so an 8-bit image whose values were multiplied by 257 comes back unchanged.
Thermal cameras write counts that fill a small part of 16 bits, such as 7,000 to 9,000. They need a window: a fixed one
keeps temperatures comparable between images, percentiles adapt to each image.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from tvilfm.terms import DepthRange

FULL_RANGE = (0.0, 65535.0)
PERCENTILES = (1.0, 99.0)


def is_deep(image: Image.Image) -> bool:
    """Return whether the image has one channel of 16-bit, 32-bit or floating-point values.

    Pillow itself reads 16-bit colour images as their upper 8 bits, which is the same scaling as without a window.
    """
    return image.mode == "F" or image.mode.startswith("I")


def to_eight_bits(image: Image.Image, depth_range: DepthRange, *, name: str) -> Image.Image:
    """Scale a deep image to 8 bits; return other images unchanged.

    Args:
        image: image of any mode.
        depth_range: `data.depth_range`.
        name: name of the image in error messages.

    Raises:
        ValueError: there is no window, and the values are not 16-bit integers; or no value is a finite number.
    """
    if not is_deep(image):
        return image
    values = np.asarray(image).astype(np.float64)
    low, high = _window(values, depth_range, name=name)
    if high == low:  # percentiles of an image with one value
        low, high = low - 1, high + 1
    inside = np.clip(np.nan_to_num(values, nan=low), low, high)
    return Image.fromarray(np.rint(255 * (inside - low) / (high - low)).astype(np.uint8))


def finite_range(image: Image.Image) -> tuple[float, float]:
    """Return the smallest and the largest finite pixel of a deep image."""
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    return float(finite.min()), float(finite.max())


def _window(values: npt.NDArray[np.float64], depth_range: DepthRange, *, name: str) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError(f"{name}: expected finite pixels, got NaN or infinity only. Export the image again.")
    if depth_range == "percentiles":
        low, high = np.percentile(finite, PERCENTILES)
        return float(low), float(high)
    if depth_range is not None:
        return depth_range
    smallest, largest = float(finite.min()), float(finite.max())
    if (finite != np.rint(finite)).any() or smallest < FULL_RANGE[0] or largest > FULL_RANGE[1]:
        raise ValueError(
            f"{name}: expected integers from 0 to 65535 while data.depth_range is null, got pixels from {smallest:g} "
            f"to {largest:g}. Set data.depth_range=[low,high] or data.depth_range=percentiles."
        )
    return FULL_RANGE
