"""Decoded pixels: every image is decoded and resized once, into a uint8 array that processes map into memory."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 64_000_000


def decode(
    content: bytes,
    *,
    height: int | None,
    width: int | None,
    name: str,
    min_side: int = 1,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] | None = None,
) -> npt.NDArray[np.uint8]:
    """Decode one image and resize it with Lanczos.

    Args:
        content: content of the image file.
        height: rows after resizing; None = do not resize.
        width: columns after resizing; None = do not resize.
        name: name of the image in error messages.
        min_side: minimum length of the shorter side before resizing, pixels.
        max_pixels: maximum number of pixels before resizing; checked before decoding.
        formats: Pillow's names of the accepted formats; None = all formats of Pillow.

    Returns:
        (H, W, 3) uint8; a single channel is repeated three times.

    Raises:
        ValueError: the content is not an image, is truncated, has more than `max_pixels` pixels, or has a side shorter
            than `min_side`.

    Source: METHOD 4. Differs: none known.
    """
    with _opened(content, name, formats) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{name}: expected at most {max_pixels} pixels, got {image.width} x {image.height}.")
        if min(image.size) < min_side:
            raise ValueError(
                f"{name}: expected at least {min_side} pixels per side, got {image.width} x {image.height}."
            )
        rgb = image.convert("RGB")
    if height is not None and width is not None:
        rgb = rgb.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(rgb, dtype=np.uint8)


def count_pixels(content: bytes, *, name: str, formats: tuple[str, ...] | None = None) -> int:
    """Return the number of pixels according to an image's header, without decoding it.

    Raises:
        ValueError: the content has no image header.
    """
    with _opened(content, name, formats) as image:
        return image.width * image.height


@contextmanager
def _opened(content: bytes, name: str, formats: tuple[str, ...] | None) -> Iterator[Image.Image]:
    if not content:
        raise ValueError(f"{name}: expected an image, got zero bytes. Restore the file or remove it from the dataset.")
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            yield image
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{name}: expected an image, got {error}. Restore the file.") from None


def decode_files(root: Path, images: Sequence[str], *, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return the decoded images as (N, H, W, 3) uint8, in the order of `images`."""
    return np.stack([decode((root / name).read_bytes(), height=height, width=width, name=name) for name in images])


def create(path: Path, count: int, *, height: int, width: int) -> np.memmap[tuple[int, ...], np.dtype[np.uint8]]:
    """Create a .npy file for `count` images and map it for writing."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, height, width, 3))


def open_pixels(path: Path) -> npt.NDArray[np.uint8]:
    """Map a .npy file read-only; all processes of a machine share its memory pages."""
    array: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return array
