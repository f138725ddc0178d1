"""Decoded pixels: every image is decoded and resized once, into a uint8 array that processes map into memory."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from tvilfm.data.depth import finite_range, is_deep, to_eight_bits
from tvilfm.place import full_disk_named
from tvilfm.terms import DepthRange

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
    depth_range: DepthRange = None,
) -> npt.NDArray[np.uint8]:
    """Decode one image, turn it upright by its EXIF orientation, and resize it with Lanczos.

    All images of the program are decoded here. Of a file with several pages or frames, the first one is used.

    Args:
        content: content of the image file.
        height: rows after resizing; None = do not resize.
        width: columns after resizing; None = do not resize.
        name: name of the image in error messages.
        min_side: minimum length of the shorter side before resizing, pixels.
        max_pixels: maximum number of pixels before resizing; checked before decoding.
        formats: Pillow's names of the accepted formats; None = all formats of Pillow.
        depth_range: `data.depth_range`, the scaling of images above 8 bits (`data/depth.py`).

    Returns:
        (H, W, 3) uint8; a single channel is repeated three times.

    Raises:
        ValueError: the content is not an image, is truncated, has more than `max_pixels` pixels, has a side shorter
            than `min_side`, or is deep and does not fit `depth_range`.

    Source: METHOD 4. Differs: none known.
    """
    with _opened(content, name, formats) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{name}: expected at most {max_pixels} pixels, got {image.width} x {image.height}.")
        if min(image.size) < min_side:
            raise ValueError(
                f"{name}: expected at least {min_side} pixels per side, got {image.width} x {image.height}."
            )
        image.load()
        rgb = to_eight_bits(_upright(image), depth_range, name=name).convert("RGB")
    if height is not None and width is not None:
        rgb = rgb.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(rgb, dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a check wants to know about a readable image.

    Attributes:
        flat: whether all pixels have one value after scaling to 8 bits.
        values: smallest and largest finite pixel of an image above 8 bits; None for other images.
        frames: number of pages or frames; only the first is used.
    """

    flat: bool
    values: tuple[float, float] | None
    frames: int


def inspect(content: bytes, *, name: str, depth_range: DepthRange) -> Inspection:
    """Decode one image as `decode` does and describe it.

    Raises:
        ValueError: as `decode`.
    """
    pixels = decode(content, height=None, width=None, name=name, depth_range=depth_range)
    with _opened(content, name, None) as image:
        frames = getattr(image, "n_frames", 1)
        values = finite_range(image) if is_deep(image) else None
    return Inspection(flat=bool((pixels == pixels[:1, :1]).all()), values=values, frames=frames)


def count_pixels(content: bytes, *, name: str, formats: tuple[str, ...] | None = None) -> int:
    """Return the number of pixels according to an image's header, without decoding it.

    Raises:
        ValueError: the content has no image header.
    """
    with _opened(content, name, formats) as image:
        return image.width * image.height


def _upright(image: Image.Image) -> Image.Image:
    try:
        image.getexif()
    except Exception:  # parsers raise many types on damaged metadata, and the pixels are whole
        return image
    return ImageOps.exif_transpose(image)


@contextmanager
def _opened(content: bytes, name: str, formats: tuple[str, ...] | None) -> Iterator[Image.Image]:
    advice = "Restore the file or convert it to PNG or JPEG." if formats is None else "Send another file."
    if not content:
        raise ValueError(f"{name}: expected an image, got zero bytes. {advice}")
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            yield image
    except UnidentifiedImageError:  # its message is the address of an object
        kinds = "" if formats is None else f" as {', '.join(formats)}"
        raise ValueError(
            f"{name}: expected an image{kinds}, got a file that begins with {content[:8]!r}. {advice}"
        ) from None
    except (OSError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{name}: expected an image, got {error}. {advice}") from None


def decode_files(
    root: Path, images: Sequence[str], *, height: int, width: int, depth_range: DepthRange = None
) -> npt.NDArray[np.uint8]:
    """Return the decoded images as (N, H, W, 3) uint8, in the order of `images`."""
    read = partial(decode, height=height, width=width, depth_range=depth_range)
    return np.stack([read((root / name).read_bytes(), name=name) for name in images])


def create(path: Path, count: int, *, height: int, width: int) -> np.memmap[tuple[int, ...], np.dtype[np.uint8]]:
    """Create a .npy file for `count` images and map it for writing.

    Its space is reserved now: on a full disk, writing to a map would kill the process.

    Raises:
        OSError: the disk has too little space; the message contains the folder and the need.
    """
    pixels: np.memmap[tuple[int, ...], np.dtype[np.uint8]] = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.uint8, shape=(count, height, width, 3)
    )
    what = f"{count} images of {height} x {width}"
    with full_disk_named(path.parent, what, need=pixels.nbytes), path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return pixels


def open_pixels(path: Path) -> npt.NDArray[np.uint8]:
    """Map a .npy file read-only; all processes of a machine share its memory pages."""
    array: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return array
