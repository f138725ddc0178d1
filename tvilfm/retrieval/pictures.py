"""What the retrieval makes of a decoded picture: the network's input, and a small copy to show."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
QUALITY = 85


def resized(pixels: Pixels, *, height: int, width: int) -> Pixels:
    """(H, W, 3) uint8 as `datasets.pixels.decode` resizes it."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def thumbnail(pixels: Pixels, *, height: int) -> bytes:
    """A JPEG of (H, W, 3) uint8, at most that high, in its own proportions; it holds nothing else of the file."""
    width = max(1, round(pixels.shape[1] * height / pixels.shape[0]))
    small = pixels if pixels.shape[0] <= height else resized(pixels, height=height, width=width)
    file = io.BytesIO()
    Image.fromarray(small).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
