"""The caption table and the published caption files it is read from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from tvilfm.datasets.manifest import CAPTION_SCHEMA


def read_published(root: Path, manifest: pa.Table) -> pa.Table:
    """Read a dataset's `Text/Blip_{RGB,IR}/caption_llm_dict_*.json` (or `caption_dict_*.json`) into the caption table.

    The files key a caption by an image path whose root is that of whoever wrote them; it is matched by its tail.

    Args:
        root: dataset folder.
        manifest: the images that captions are wanted for.

    Returns:
        Caption table, one row a captioned image, in manifest order.

    Raises:
        ValueError: no caption file, a file of another format, or images without a caption (the first is named).

    Source: METHOD 5.
    """
    wanted = set(manifest["image"].to_pylist())
    found: dict[str, dict[str, str | None]] = {}
    for sensor in ("RGB", "IR"):
        folder = root / "Text" / f"Blip_{sensor}"
        files = sorted(folder.glob("caption_llm_dict_*.json")) or sorted(folder.glob("caption_dict_*.json"))
        if not files:
            raise ValueError(
                f"captions: expected {folder}/caption_llm_dict_*.json or caption_dict_*.json, got neither. "
                "Copy the published Text folder into the dataset."
            )
        for key, entry in _read_json(files[0]).items():
            image = _match(key, wanted)
            if image is not None:
                found[image] = {"caption": entry["description"], "rephrased": entry.get("aug_description")}
    missing = [image for image in manifest["image"].to_pylist() if image not in found]
    if missing:
        raise ValueError(
            f"captions: expected one an image, got none for {len(missing)} of {manifest.num_rows}, the first "
            f"{missing[0]}. Caption these images or restore the caption files."
        )
    rows = [
        {"image": image, **found[image], "captioner": "published", "revision": None}
        for image in manifest["image"].to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=CAPTION_SCHEMA)


def texts_of(captions: pa.Table, images: Sequence[str]) -> tuple[list[str], list[str]]:
    """Caption and rephrase of each image; an image that was never rephrased answers with its caption twice."""
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


def _read_json(path: Path) -> dict[str, dict[str, str]]:
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}. Restore the file.") from None
    if not isinstance(entries, dict) or not all(
        isinstance(e, dict) and "description" in e for e in entries.values()
    ):
        raise ValueError(f'{path}: expected {{image path: {{"description": ...}}}}, got another format.')
    return entries


def _match(key: str, wanted: set[str]) -> str | None:
    parts = key.replace("\\", "/").split("/")
    for start in range(len(parts)):
        tail = "/".join(parts[start:])
        if tail in wanted:
            return tail
    return None
