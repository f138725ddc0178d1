"""List, read and decode images. Ray tasks that do this need no network, so this module imports none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tvilfm.data import image_files
from tvilfm.data.boxes import cropped
from tvilfm.data.images import Pixels, resized, thumbnail
from tvilfm.data.pixels import decode
from tvilfm.data.video import read_frames
from tvilfm.place import Place
from tvilfm.terms import DepthRange

Batch = dict[str, npt.NDArray[Any]]
EDGES = ("left", "top", "right", "bottom")  # columns of rows that are parts of frames, in pixels
FRAME_TIME = "frame_time"  # column of rows from a video: presentation time of the frame, in the video's unit


def reference(folder: Place, name: str) -> str:
    """Return the id of an image: its real path, or its URI without options in an object store.

    The same file has the same id, however its folder is written: with `..`, `file://`, a trailing slash or a link.
    """
    if folder.is_local:
        return os.path.realpath(f"{folder.path}/{name}")
    scheme, separator, _ = folder.uri.partition("://")
    return f"{scheme}{separator}{folder.path}/{name}"


def read_pictures(
    batch: Batch,
    *,
    root: str,
    size: tuple[int, int] | None,
    thumbnail_height: int,
    depth_range: DepthRange = None,
) -> Batch:
    """Add the location, the thumbnail and, if requested, the pixels of an image to rows with a `name`.

    Args:
        batch: rows. Those with the columns `EDGES` are parts of frames, whose location is their `id`.
        root: folder or URI that the names are relative to, or a video.
        size: height and width of the pixels; None = no pixels.
        thumbnail_height: maximum height of thumbnails, in pixels.
        depth_range: `data.depth_range` of the run whose model encodes the images.

    Returns:
        The rows with `image`, `thumbnail`, `pixels` and `fault`: why the file is not an image, else "". Such a row has
        an empty thumbnail and black pixels.
    """
    folder, count = Place(root), len(batch["name"])
    thumbnails, inputs, faults = [b""] * count, [np.zeros((1, 1, 3), dtype=np.uint8)] * count, [""] * count
    if size is not None:
        inputs = [resized(pixels, height=size[0], width=size[1]) for pixels in inputs]
    for row, pixels in _pictures(batch, folder, depth_range):
        if isinstance(pixels, Exception):
            faults[row] = str(pixels)
            continue
        thumbnails[row] = thumbnail(pixels, height=thumbnail_height)
        if size is not None:
            inputs[row] = resized(pixels, height=size[0], width=size[1])
    images = batch["id"] if "left" in batch else [reference(folder, name) for name in batch["name"]]
    batch = batch | {
        "image": np.array(images),
        "thumbnail": np.array(thumbnails, dtype=object),
        "fault": np.array(faults, dtype=object),
    }
    return batch if size is None else batch | {"pixels": np.stack(inputs)}


def _pictures(batch: Batch, folder: Place, depth_range: DepthRange) -> Iterator[tuple[int, Pixels | Exception]]:
    """Yield each row's place and its pixels, or why it has none. Each frame is decoded once for all its boxes."""
    if FRAME_TIME in batch:
        rows_of: dict[int, list[int]] = {}
        for row, time in enumerate(batch[FRAME_TIME].tolist()):
            rows_of.setdefault(time, []).append(row)
        for time, pixels in read_frames(folder, rows_of):
            for row in rows_of.pop(time):
                yield row, _part(batch, row, pixels)
        for row in (row for rows in rows_of.values() for row in rows):
            yield row, ValueError(f"{batch['id'][row]}: expected a frame that can be decoded, got a damaged one")
        return
    known, pixels_of = None, np.zeros((1, 1, 3), dtype=np.uint8)
    for row, name in enumerate(batch["name"]):
        try:
            if name != known:
                content = (folder / name).read()
                known, pixels_of = name, decode(content, height=None, width=None, name=name, depth_range=depth_range)
        except (ValueError, OSError) as error:
            yield row, error
            continue
        yield row, _part(batch, row, pixels_of) if "left" in batch else pixels_of


def _part(batch: Batch, row: int, pixels: Pixels) -> Pixels | Exception:
    left, top, right, bottom = (int(batch[edge][row]) for edge in EDGES)
    try:
        return cropped(pixels, (left, top, right, bottom), str(batch["id"][row]))
    except ValueError as error:
        return error


def list_images(uri: str, modality: str) -> pa.Table:
    """Return all image files below a folder as rows for `caption_images`, sorted by name, each real file once.

    Raises:
        ValueError: the folder has no image files, or the name of one is not UTF-8.
    """
    place = Place(uri)
    names = image_files.list_images(place)
    if not names:
        suffixes = ", ".join(image_files.SUFFIXES)
        raise ValueError(f"--images: expected {suffixes} files below {place}, got none. Check the path.")
    image_files.require_text_names(place, names)
    return pa.table({"image": names, "modality": pa.repeat(pa.scalar(modality), len(names))})
