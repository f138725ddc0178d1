"""Images for retrieval: the input of the network, and thumbnails."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
QUALITY = 85
WIDEST = 4  # maximum width of a thumbnail, relative to its height


def resized(pixels: Pixels, *, height: int, width: int) -> Pixels:
    """Return (H, W, 3) uint8 resized like `data.pixels.decode` does."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def thumbnail(pixels: Pixels, *, height: int) -> bytes:
    """Return a small JPEG of (H, W, 3) uint8 with the same aspect ratio and without metadata.

    It is at most `height` high and `WIDEST` x `height` wide, because a JPEG has at most 65,500 pixels per side.
    """
    tall, wide = pixels.shape[:2]
    scale = min(height / tall, WIDEST * height / wide)
    small = pixels if scale >= 1 else resized(pixels, height=_side(tall * scale), width=_side(wide * scale))
    file = io.BytesIO()
    Image.fromarray(small).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _side(pixels: float) -> int:
    return max(1, round(pixels))
