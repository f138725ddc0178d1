"""Published caption files: read them into the caption table; `caption_writing` writes them.

The files of METHOD 5 name an image by its path on the authors' machine. An entry is matched to the image of the
manifest with the longest common end of the path (`caption_keys.py`).
No caption is dropped silently: files in another format raise an error, and keys without an image raise an error
(`read_caption_dict`) or are returned for `tvilfm data check` (`collect`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tvilfm.data.captions import BY_IDENTITY, IDENTITY_MAP
from tvilfm.data.manifest import CAPTION_SCHEMA, select
from tvilfm.data.splits import TEST_SPLITS
from tvilfm.data.text_files import read_text
from tvilfm.datasets.caption_keys import match, names_of, without_root
from tvilfm.datasets.caption_tables import is_table, match_table

SENSORS = {"visible": "RGB", "infrared": "IR"}
PUBLISHED = "published"
_FIELDS = ("description", "aug_description")


@dataclass(frozen=True)
class Caption:
    """One entry of a published caption file."""

    caption: str
    rephrased: str | None


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The captions of a Text folder, matched to the images of a manifest.

    Attributes:
        found: image -> caption.
        unknown: file -> its keys without an image in the manifest.
        differing: images whose caption differs between `caption_dict_*` and `caption_llm_dict_*`; the latter is used.
        identity_texts: pid -> unique visible captions of this identity, from `id_caption_map_*_RGB.json`.
    """

    found: dict[str, Caption]
    unknown: dict[Path, list[str]]
    differing: list[str]
    identity_texts: dict[int, list[str]]


def read_captions(manifest: pa.Table, root: Path, path: Path | None = None) -> pa.Table:
    """Read the captions at `data.captions` into the caption table.

    Args:
        manifest: images to read captions for.
        root: dataset folder.
        path: `data.captions`: a caption table (.parquet, .csv) or a folder in the published layout; None = `root/Text`.

    Returns:
        Caption table, one row per image, in manifest order.

    Raises:
        ValueError: as in `read_published`, or the file is not a caption table.
    """
    if path is None or not is_table(path):
        return read_published(root, manifest, text_dir=path)
    table, matched = match_table(path, manifest)
    require_all(manifest, matched.found, {path: matched.unknown} if matched.unknown else {})
    rows = [matched.found[image] for image in manifest["image"].to_pylist()]
    return pa.Table.from_pylist(rows, schema=CAPTION_SCHEMA).replace_schema_metadata(
        {key: value for key, value in (table.schema.metadata or {}).items() if key == IDENTITY_MAP}
    )


def read_published(root: Path, manifest: pa.Table, *, text_dir: Path | None = None) -> pa.Table:
    """Read a dataset's `Text` folder into the caption table.

    Captions come from `Blip_{RGB,IR}/caption_dict_*.json` and `caption_llm_dict_*.json` (which has priority, because it
    was written later), and from SYSU-MM01's `train_text_*.npy` for training images that are in neither file. A visible
    test image without a caption gets one of its identity's captions, in turn, from `id_caption_map_*`. This keeps the
    witness pool of the published protocol, but it assigns a sentence to an image, and so to a camera, that it may not
    describe. Such rows have the captioner "published, by identity" and are never used as a held-out witness.

    Args:
        root: dataset folder.
        manifest: images to read captions for.
        text_dir: folder that contains Blip_RGB and Blip_IR, or the files of both; None = `root/Text`.

    Returns:
        Caption table, one row per image, in manifest order. Its metadata contains the lists of `id_caption_map_*`, see
        `identity_map`.

    Raises:
        ValueError: there is no caption file, a file has another format, or images have no caption (the message contains
            the first one).

    Source: METHOD 5. Differs: none known.
    """
    folder = text_dir or root / "Text"
    collected = collect(folder, manifest)
    captioner = dict.fromkeys(collected.found, PUBLISHED)
    captions = dict(collected.found)
    for image, text in identity_captions(manifest, captions, collected.identity_texts).items():
        captions[image], captioner[image] = Caption(text, None), BY_IDENTITY
    require_all(manifest, captions, collected.unknown)
    table = _table([(image, captions[image], captioner[image]) for image in manifest["image"].to_pylist()])
    if not collected.identity_texts:
        return table
    return table.replace_schema_metadata({IDENTITY_MAP: json.dumps(collected.identity_texts)})


def read_caption_dict(path: Path, images: Iterable[str] | None = None) -> pa.Table:
    """Read one `caption_dict_*.json` or `caption_llm_dict_*.json`, in the file's order.

    Args:
        path: path of the file.
        images: images that the keys are matched to; None = use the part of each key from the dataset's top folder.

    Raises:
        ValueError: the file has another format, or keys belong to no image (the message contains the first one).

    Source: METHOD 5. Differs: none known.
    """
    entries = _read_json(path)
    if images is None:
        return _table([(without_root(key), entry, PUBLISHED) for key, entry in entries.items()])
    names = names_of(images)
    matched = {key: match(key, names) for key in entries}
    unknown = [key for key, image in matched.items() if image is None]
    if unknown:
        raise ValueError(
            f"{path}: expected keys that end in an image of the dataset, got {unknown[0]!r} "
            f"({len(unknown)} of {len(entries)} keys unknown). Check that the captions belong to this dataset."
        )
    return _table([(str(matched[key]), entry, PUBLISHED) for key, entry in entries.items()])


def read_identity_map(path: Path) -> dict[int, list[str]]:
    """Read `id_caption_map_*_RGB.json`: the unique visible captions of each identity (the witness pool).

    Raises:
        ValueError: the file has another format.
    """
    entries = _load_json(path)
    if not isinstance(entries, dict) or not all(
        str(pid).isdigit() and isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        for pid, texts in entries.items()
    ):
        raise ValueError(f"{path}: expected {{identity number: [captions]}}, got another format. Restore the file.")
    return {int(pid): texts for pid, texts in entries.items()}


def read_sysu_arrays(folder: Path, manifest: pa.Table, modality: str) -> dict[str, Caption]:
    """Read the training texts of SYSU-MM01, which are arrays in the order of the released training arrays.

    The files are `train_text_*.npy` and, if they exist, `train_llm_text_*.npy` (rephrases) and
    `train_text_label_*.npy` (only checked). Entry i belongs to image i of the training identities (train and val),
    sorted by identity, camera and file name.

    Args:
        folder: Blip_RGB or Blip_IR.
        manifest: manifest of SYSU-MM01.
        modality: visible or infrared.

    Returns:
        Image -> caption; empty if the folder has no such array.

    Raises:
        ValueError: an array contains objects or has another length, or the labels do not match the identities.

    Source: METHOD 5. Differs: none known.
    """
    sensor = SENSORS[modality]
    arrays = {path.name.removesuffix(f"_{sensor}.npy"): path for path in sorted(folder.glob(f"train_*_{sensor}.npy"))}
    paths = {
        kind: next((path for name, path in arrays.items() if name.rpartition("_")[0] == kind), None)
        for kind in ("train_text", "train_llm_text", "train_text_label")
    }
    if paths["train_text"] is None:
        return {}
    rows = select(manifest, split=("train", "val"), modality=modality)
    rows = rows.sort_by([("pid", "ascending"), ("camid", "ascending"), ("image", "ascending")])
    texts = _read_array(paths["train_text"], rows.num_rows)
    rephrases: Sequence[str | None] = [None] * rows.num_rows
    if paths["train_llm_text"] is not None:
        rephrases = _read_array(paths["train_llm_text"], rows.num_rows).tolist()
    if paths["train_text_label"] is not None:
        pids = rows["pid"].to_pylist()
        labels = _read_array(paths["train_text_label"], rows.num_rows)
        pairs = set(zip(pids, labels, strict=True))
        if len(pairs) != len(set(pids)) or len(pairs) != len(set(labels)):
            raise ValueError(
                f"{paths['train_text_label']}: expected one label per identity, got {len(pairs)} pairs of "
                f"{len(set(pids))} identities and {len(set(labels))} labels. The texts belong to other images or have "
                "another order. Restore the dataset and its Text folder together."
            )
    captions = [
        Caption(str(text), None if aug is None else str(aug)) for text, aug in zip(texts, rephrases, strict=True)
    ]
    return dict(zip(rows["image"].to_pylist(), captions, strict=True))


def collect(text_dir: Path, manifest: pa.Table) -> Collected:
    """Read all caption files of a Text folder and match them to the manifest.

    Raises:
        ValueError: a modality of the manifest has no caption file, or a file has another format.
    """
    names = names_of(manifest["image"].to_pylist())
    captions: dict[str, Caption] = {}
    unknown: dict[Path, list[str]] = {}
    differing: list[str] = []
    identity_texts: dict[int, list[str]] = {}
    for modality, sensor in SENSORS.items():
        if not select(manifest, modality=modality).num_rows:
            continue
        folder = text_dir / f"Blip_{sensor}"
        flat = "" if folder.is_dir() else f"_{sensor}"
        folder = folder if folder.is_dir() else text_dir
        plain = sorted(folder.glob(f"caption_dict_*{flat}.json"))[:1]
        rephrased = sorted(folder.glob(f"caption_llm_dict_*{flat}.json"))[:1]
        arrays = read_sysu_arrays(folder, manifest, modality)
        if not plain and not rephrased and not arrays:
            raise ValueError(
                f"captions: expected {text_dir}/Blip_{sensor}/caption_llm_dict_*.json or caption_dict_*.json, got "
                "neither file. Copy the published Text folder to the dataset, or set data.captions."
            )
        listed: dict[str, Caption] = {}
        for path in (*plain, *rephrased):
            for key, entry in _read_json(path).items():
                image = match(key, names)
                if image is None:
                    unknown.setdefault(path, []).append(key)
                    continue
                if image in listed and listed[image].caption != entry.caption:
                    differing.append(image)
                listed[image] = entry
        captions |= arrays | listed
        if modality == "visible":
            for path in sorted(folder.glob("id_caption_map_*RGB.json"))[:1]:
                identity_texts = read_identity_map(path)
    return Collected(found=captions, unknown=unknown, differing=differing, identity_texts=identity_texts)


def _table(entries: Iterable[tuple[str, Caption, str]]) -> pa.Table:
    rows = [
        {
            "image": image,
            "caption": entry.caption,
            "rephrased": entry.rephrased,
            "captioner": captioner,
            "revision": None,
        }
        for image, entry, captioner in entries
    ]
    return pa.Table.from_pylist(rows, schema=CAPTION_SCHEMA)


def require_all(manifest: pa.Table, captions: Mapping[str, object], unknown: Mapping[Path, list[str]]) -> None:
    missing = [image for image in manifest["image"].to_pylist() if image not in captions]
    if not missing:
        return
    stray = [
        f" {len(keys)} keys of {path} belong to no image, the first {keys[0]!r}." for path, keys in unknown.items()
    ]
    raise ValueError(
        f"captions: expected one per image, got none for {len(missing)} of {manifest.num_rows}, the first "
        f"{missing[0]}.{''.join(stray)} Caption these images or restore the caption files."
    )


def identity_captions(
    manifest: pa.Table, captions: Mapping[str, Caption], identity_texts: Mapping[int, list[str]]
) -> dict[str, str]:
    """Return a caption for every visible test image without one: the captions of its identity, in turn."""
    counts: dict[int, int] = {}
    assigned: dict[str, str] = {}
    visible = select(manifest, split=TEST_SPLITS, modality="visible")
    for image, pid in zip(visible["image"].to_pylist(), visible["pid"].to_pylist(), strict=True):
        texts = identity_texts.get(pid)
        if image not in captions and texts:
            assigned[image] = texts[counts.setdefault(pid, 0) % len(texts)]
            counts[pid] += 1
    return assigned


def _load_json(path: Path) -> Any:
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}. Restore the file.") from None


def _read_json(path: Path) -> dict[str, Caption]:
    entries = _load_json(path)
    if not isinstance(entries, dict):
        raise ValueError(
            f'{path}: expected {{image path: {{"description": ...}}}}, got another format. Restore the file.'
        )
    captions = {}
    for key, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("description"), str):
            raise ValueError(
                f'{path}: expected {{image path: {{"description": ...}}}}, got another format at {key!r}. '
                "Restore the file."
            )
        unknown = sorted(set(entry) - set(_FIELDS))
        if unknown:
            raise ValueError(
                f"{path}: expected {' and '.join(_FIELDS)}, got the key {unknown[0]!r} at {key!r}. Remove it."
            )
        captions[key] = Caption(entry["description"], entry.get("aug_description"))
    return captions


def _read_array(path: Path, length: int) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except ValueError:
        raise ValueError(
            f"{path}: expected an array of text or labels, got pickled objects or no array. Save it as a text array."
        ) from None
    if array.shape != (length,):
        raise ValueError(
            f"{path}: expected {length} entries, one per training image (train and val), got shape {array.shape}. "
            "Restore the dataset and its Text folder together."
        )
    return array
