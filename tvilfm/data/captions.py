"""Access to the caption table and its metadata."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pyarrow as pa

IDENTITY_MAP = b"identity_captions"  # metadata key of a caption table: the lists of id_caption_map_*.json
BY_IDENTITY = "published, by identity"  # captioner of captions that belong to an identity, not to an image


def identity_map(captions: pa.Table) -> dict[int, list[str]]:
    """Return pid -> captions in the order of `id_caption_map_*.json`; empty if the dataset has no such file."""
    entries = json.loads((captions.schema.metadata or {}).get(IDENTITY_MAP, b"{}"))
    return {int(pid): texts for pid, texts in entries.items()}


def texts_of(captions: pa.Table, images: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the captions and the rephrases of images; the caption replaces a missing rephrase."""
    rows = {
        image: (caption, rephrased or caption)
        for image, caption, rephrased in zip(
            captions["image"].to_pylist(),
            captions["caption"].to_pylist(),
            captions["rephrased"].to_pylist(),
            strict=True,
        )
    }
    pairs = [rows[image] for image in images]
    return [caption for caption, _ in pairs], [rephrased for _, rephrased in pairs]
