"""What the retrieval makes of a decoded picture: the network's input, and a small copy to show."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
QUALITY = 85
WIDEST = 4  # times the height; people are taller than wide


def resized(pixels: Pixels, *, height: int, width: int) -> Pixels:
    """(H, W, 3) uint8 as `datasets.pixels.decode` resizes it."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def thumbnail(pixels: Pixels, *, height: int) -> bytes:
    """A JPEG of (H, W, 3) uint8 in its own proportions; it holds nothing else of the file.

    It is at most that high and `WIDEST` times as wide: a JPEG has at most 65,500 pixels a side.
    """
    tall, wide = pixels.shape[:2]
    scale = min(height / tall, WIDEST * height / wide)
    small = pixels if scale >= 1 else resized(pixels, height=_side(tall * scale), width=_side(wide * scale))
    file = io.BytesIO()
    Image.fromarray(small).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _side(pixels: float) -> int:
    return max(1, round(pixels))
