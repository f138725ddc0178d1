"""Images for retrieval: the network's input, and a thumbnail."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
QUALITY = 85
WIDEST = 4  # times the height; people are taller than wide


def resized(pixels: Pixels, *, height: int, width: int) -> Pixels:
    """Resize (H, W, 3) uint8 as `data.pixels.decode` does."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def thumbnail(pixels: Pixels, *, height: int) -> bytes:
    """Return a small JPEG of (H, W, 3) uint8 in its proportions, without metadata.

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
