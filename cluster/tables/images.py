"""List, read and decode images. Ray tasks that do this need no network, so this module imports none."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tvilfm.data import image_files
from tvilfm.data.images import resized, thumbnail
from tvilfm.data.pixels import decode
from tvilfm.place import Place
from tvilfm.terms import DepthRange

Batch = dict[str, npt.NDArray[Any]]


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
        batch: rows.
        root: folder or URI that the names are relative to.
        size: height and width of the pixels; None = no pixels.
        thumbnail_height: maximum height of thumbnails, in pixels.
        depth_range: `data.depth_range` of the run whose model encodes the images.

    Returns:
        The rows with `image`, `thumbnail`, `pixels` and `fault`: why the file is not an image, else "". Such a row has
        an empty thumbnail and black pixels.
    """
    folder = Place(root)
    images, thumbnails, inputs, faults = [], [], [], []
    for name in batch["name"]:
        pixels, fault, small = np.zeros((1, 1, 3), dtype=np.uint8), "", b""
        try:
            pixels = decode((folder / name).read(), height=None, width=None, name=name, depth_range=depth_range)
            small = thumbnail(pixels, height=thumbnail_height)
        except (ValueError, OSError) as error:
            fault = str(error)
        images.append(reference(folder, name))
        thumbnails.append(small)
        faults.append(fault)
        if size is not None:
            inputs.append(resized(pixels, height=size[0], width=size[1]))
    batch = batch | {
        "image": np.array(images),
        "thumbnail": np.array(thumbnails, dtype=object),
        "fault": np.array(faults, dtype=object),
    }
    return batch if size is None else batch | {"pixels": np.stack(inputs)}


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
