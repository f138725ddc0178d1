"""Read and decode images in Ray tasks. The tasks need no network, so this module imports none."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

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

    Raises:
        ValueError: a file is not an image; the message names it.
    """
    folder = Place(root)
    images, thumbnails, inputs = [], [], []
    for name in batch["name"]:
        pixels = decode((folder / name).read(), height=None, width=None, name=name, depth_range=depth_range)
        images.append(reference(folder, name))
        thumbnails.append(thumbnail(pixels, height=thumbnail_height))
        if size is not None:
            inputs.append(resized(pixels, height=size[0], width=size[1]))
    batch = batch | {"image": np.array(images), "thumbnail": np.array(thumbnails, dtype=object)}
    return batch if size is None else batch | {"pixels": np.stack(inputs)}
