"""Read and decode somebody's pictures in Ray tasks, which need no network for it and so do not import one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tvilfm.data.images import resized, thumbnail
from tvilfm.data.pixels import decode
from tvilfm.place import Place

Batch = dict[str, npt.NDArray[Any]]


def reference(root: str, name: str) -> str:
    """Where a picture lies, without the options that a URI may carry."""
    scheme, separator, _ = root.rpartition("://")
    return f"{scheme}{separator}{Place(root).path}/{name}"


def read_pictures(batch: Batch, *, root: str, size: tuple[int, int] | None, thumbnail_height: int) -> Batch:
    """Add to rows with a `name` where the picture lies, its thumbnail, and its pixels if they are asked for.

    Args:
        batch: rows.
        root: folder or URI that the names are relative to.
        size: height and width of the pixels; None = no pixels.
        thumbnail_height: pixels, at most.

    Raises:
        ValueError: a file is no picture; it is named.
    """
    folder = Place(root)
    images, thumbnails, inputs = [], [], []
    for name in batch["name"]:
        pixels = decode((folder / name).read(), height=None, width=None, name=name)
        images.append(reference(root, name))
        thumbnails.append(thumbnail(pixels, height=thumbnail_height))
        if size is not None:
            inputs.append(resized(pixels, height=size[0], width=size[1]))
    batch = batch | {"image": np.array(images), "thumbnail": np.array(thumbnails, dtype=object)}
    return batch if size is None else batch | {"pixels": np.stack(inputs)}
