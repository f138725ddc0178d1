"""The manifest: one Arrow table that describes the images of any dataset.

A reader converts a folder to rows (identity, camera, modality and split of every image) without opening an image.
All later steps, from decoding to the protocols, work on these rows, so all datasets share one code path. Captions are
a second table with the same image path as key, because they depend on the captioner and the language model and the
images do not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tvilfm.data.image_files import require_text_names
from tvilfm.files import content_digests
from tvilfm.terms import MODALITIES

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("image", pa.string(), nullable=False),
        pa.field("pid", pa.int32(), nullable=False),
        pa.field("camid", pa.int32(), nullable=False),
        pa.field("modality", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)
CAPTION_SCHEMA = pa.schema(
    [
        pa.field("image", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("rephrased", pa.string()),
        pa.field("captioner", pa.string()),
        pa.field("revision", pa.string()),
    ]
)


def build_manifest(rows: Iterable[Mapping[str, object]]) -> pa.Table:
    """Build a manifest from mappings with the columns of `MANIFEST_SCHEMA`.

    Args:
        rows: one mapping per image: `image` (path relative to the dataset root, forward slashes), `pid`, `camid`,
            `modality` (visible or infrared), `split` (train, val, query, gallery, test).

    Returns:
        The table, in the order of `rows`.

    Raises:
        ValueError: there is no row, an image occurs twice or has a name that is not UTF-8, or a modality is neither
            visible nor infrared.
    """
    listed = [dict(row) for row in rows]
    require_text_names("data.root", (str(row["image"]) for row in listed))
    table = pa.Table.from_pylist(listed, schema=MANIFEST_SCHEMA)
    if table.num_rows == 0:
        raise ValueError("manifest: expected at least one image, got none. Check the dataset root.")
    counts = pc.value_counts(table["image"])
    twice = [item["values"].as_py() for item in counts if item["counts"].as_py() > 1]
    if twice:
        raise ValueError(
            f"manifest.image: expected each image once, got {twice[0]} more than once. Remove the duplicate."
        )
    unknown = sorted(set(table["modality"].to_pylist()) - set(MODALITIES))
    if unknown:
        raise ValueError(f"manifest.modality: expected visible or infrared, got {unknown[0]}. Fix the reader.")
    return table


def select(manifest: pa.Table, *, split: str | Iterable[str] | None = None, modality: str | None = None) -> pa.Table:
    """Return the rows of the given splits and modality, in manifest order."""
    mask = pa.array(np.ones(manifest.num_rows, dtype=bool))
    if split is not None:
        splits = [split] if isinstance(split, str) else list(split)
        mask = pc.and_(mask, pc.is_in(manifest["split"], pa.array(splits)))
    if modality is not None:
        mask = pc.and_(mask, pc.equal(manifest["modality"], modality))
    return manifest.filter(mask)


def column(table: pa.Table, name: str) -> npt.NDArray[np.int64]:
    """Return an integer column as a numpy array."""
    return np.asarray(table[name].to_numpy(), dtype=np.int64)


def rows_of(manifest: pa.Table, subset: pa.Table) -> npt.NDArray[np.int64]:
    """Return the row number in `manifest` of every image in `subset`, in the order of `subset`."""
    rows = pc.index_in(subset["image"].combine_chunks(), manifest["image"].combine_chunks())
    assert rows.null_count == 0, "an image of the subset is not in the manifest"
    return np.asarray(rows.to_numpy(), dtype=np.int64)


def fingerprint(*tables: pa.Table, root: Path | None = None) -> str:
    """Return a hash of tables and, with `root`, of the image files that the first table lists.

    It does not depend on the path or the modification times of the dataset.

    Args:
        tables: tables in the order in which they are hashed.
        root: folder of the images.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for table in tables:
        digest.update(repr(table.schema.names).encode())
        digest.update(repr(sorted((table.schema.metadata or {}).items())).encode())
        for name in table.schema.names:
            digest.update("\0".join(map(str, table[name].to_pylist())).encode())
    if root is not None:
        for content in content_digests(root, tables[0]["image"].to_pylist()):
            digest.update(content)
    return digest.hexdigest()[:16]
