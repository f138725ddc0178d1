"""Write captions in the format of the published files; `caption_files` reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from tvilfm.data.captions import texts_of
from tvilfm.data.manifest import select
from tvilfm.datasets.caption_files import SENSORS, require_all
from tvilfm.datasets.caption_keys import published_name


def write_published(
    text_dir: Path, captions: pa.Table, manifest: pa.Table, *, key_root: str = "", arrays: bool = False
) -> None:
    """Write caption files in the published layout, in the same byte format as the released files.

    The files are `Blip_{RGB,IR}/caption_dict_Blip_*.json`, `caption_llm_dict_Blip_*.json` (images with a rephrase) and
    `Blip_RGB/id_caption_map_Blip_RGB.json`. Entries are in the order of the caption table.

    Args:
        text_dir: folder to write to; created if it is missing.
        captions: caption table of images of the manifest.
        manifest: manifest with the modality and identity of the images.
        key_root: prefix of every image path, e.g. `datasets/regdb/`; the released code looks up keys with it.
        arrays: also write SYSU-MM01's `train_text_*`, `train_llm_text_*` and `train_text_label_*.npy`.

    Raises:
        ValueError: `arrays` is true and a training image has no caption.

    Source: METHOD 5. Differs: the released map lists an identity's captions in the order of a Python set, which cannot
        be reproduced; ours lists them in the order of the caption table.
    """
    modality_of = dict(zip(manifest["image"].to_pylist(), manifest["modality"].to_pylist(), strict=True))
    pid_of = dict(zip(manifest["image"].to_pylist(), manifest["pid"].to_pylist(), strict=True))
    for modality, sensor in SENSORS.items():
        rows = [row for row in captions.to_pylist() if modality_of[row["image"]] == modality]
        folder = text_dir / f"Blip_{sensor}"
        folder.mkdir(parents=True, exist_ok=True)
        keys = [key_root + published_name(row["image"]) for row in rows]
        plain = {key: {"description": row["caption"]} for key, row in zip(keys, rows, strict=True)}
        rephrased = {
            key: {"description": row["caption"], "aug_description": row["rephrased"]}
            for key, row in zip(keys, rows, strict=True)
            if row["rephrased"] is not None
        }
        _write_json(folder / f"caption_dict_Blip_{sensor}.json", plain, indent=None)
        if rephrased:
            _write_json(folder / f"caption_llm_dict_Blip_{sensor}.json", rephrased, indent=4)
        if modality == "visible":
            texts: dict[int, dict[str, None]] = {}
            for row in rows:
                texts.setdefault(pid_of[row["image"]], {})[row["caption"]] = None
            by_identity = {str(pid): list(texts[pid]) for pid in sorted(texts)}
            _write_json(folder / f"id_caption_map_Blip_{sensor}.json", by_identity, indent=4)
        if arrays:
            _write_sysu_arrays(folder, captions, manifest, modality)


def _write_sysu_arrays(folder: Path, captions: pa.Table, manifest: pa.Table, modality: str) -> None:
    rows = select(manifest, split=("train", "val"), modality=modality)
    rows = rows.sort_by([("pid", "ascending"), ("camid", "ascending"), ("image", "ascending")])
    written = {row["image"]: row for row in captions.to_pylist()}
    require_all(rows, written, {})
    plain, rephrased = texts_of(captions, rows["image"].to_pylist())
    # Labels number the training identities of both modalities together.
    pids = np.unique(select(manifest, split=("train", "val"))["pid"].to_numpy())
    labels = np.searchsorted(pids, rows["pid"].to_numpy())
    sensor = SENSORS[modality]
    np.save(folder / f"train_text_Blip_{sensor}.npy", np.array(plain))
    np.save(folder / f"train_llm_text_Blip_{sensor}.npy", np.array(rephrased))
    np.save(folder / f"train_text_label_Blip_{sensor}.npy", labels)


def _write_json(path: Path, entries: object, *, indent: int | None) -> None:
    path.write_text(json.dumps(entries, indent=indent), encoding="utf-8")
