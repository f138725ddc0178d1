"""RegDB: 412 identities, ten visible and ten thermal images of each, ten random splits into two halves.

Files: `Visible/{pid}/*.bmp`, `Thermal/{pid}/*.bmp` and `idx/{train,test}_{visible,thermal}_{1..10}.txt`. All splits
divide the same identities, so a model was trained on half of the test identities of every other split. The split
therefore belongs to the model; it is stored in the configuration as `data.split`.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from tvilfm.data.manifest import build_manifest
from tvilfm.data.splits import held_out, read_image_list, require_sound
from tvilfm.datasets.record import Dataset, published

NUM_SPLITS = 10
FOLDERS = {"visible": "Visible", "infrared": "Thermal"}
LISTS = {"visible": "visible", "infrared": "thermal"}
CAMERAS = {"visible": 1, "infrared": 2}


def read(root: Path, *, split: int = 1, strict: bool = True) -> pa.Table:
    """Return the manifest of one of the ten splits.

    `pid` is the number of the folder, not the label in the list: a label is a position in one list and stands for
    another person in the next list. The published captions by identity also use the number of the folder. Every tenth
    training identity is `val` (see `splits.held_out`). Rows are in the order of the lists.

    Args:
        root: folder that contains Visible, Thermal and idx.
        split: 1 to 10.
        strict: raise an error for missing images and for identities in two splits; `tvilfm data check` sets False.

    Raises:
        ValueError: the layout is different, a list is missing or malformed, an image is listed under the wrong
            modality, or a check of `strict` failed, including that both modalities have the same identities.

    Source: Nguyen et al., Sensors 2017; lists of Ye et al., AAAI 2018; METHOD 8. Differs: none known.
    """
    if not 1 <= split <= NUM_SPLITS:
        raise ValueError(f"data.split: expected 1 to {NUM_SPLITS}, got {split}. Choose one of RegDB's splits.")
    absent = [folder for folder in FOLDERS.values() if not (root / folder).is_dir()]
    if absent:
        raise ValueError(
            f"data.root: expected RegDB's folders Visible and Thermal in {root}, got no {absent[0]}. "
            "Set data.root to the folder that contains Visible, Thermal and idx."
        )
    listed: dict[str, dict[str, list[tuple[str, int]]]] = {"train": {}, "test": {}}
    for part, modalities in listed.items():
        for modality in FOLDERS:
            path = root / "idx" / f"{part}_{LISTS[modality]}_{split}.txt"
            modalities[modality] = [
                (image, _pid(image, modality, path)) for image in read_image_list(path, top=FOLDERS[modality])
            ]
        pids = {modality: {pid for _, pid in entries} for modality, entries in modalities.items()}
        differ = sorted(pids["visible"] ^ pids["infrared"])
        if differ and strict:
            raise ValueError(
                f"idx/{part}_*_{split}.txt: expected the same identities in both modalities, got pid {differ[0]} in "
                "one of them only. Restore the idx folder."
            )
    val = held_out(pid for entries in listed["train"].values() for _, pid in entries)
    manifest = build_manifest(
        {
            "image": image,
            "pid": pid,
            "camid": CAMERAS[modality],
            "modality": modality,
            "split": "val" if part == "train" and pid in val else part,
        }
        for part, modalities in listed.items()
        for modality, entries in modalities.items()
        for image, pid in entries
    )
    return require_sound(root, manifest) if strict else manifest


def _pid(image: str, modality: str, path: Path) -> int:
    folder, pid, *file = [*image.split("/"), "", ""][:3]
    if folder != FOLDERS[modality] or not pid.isdigit() or not file[0]:
        raise ValueError(f"{path}: expected {FOLDERS[modality]}/<identity>/<file>, got {image!r}. Restore the file.")
    return int(pid)


_SPLITS = "10 splits"
DATASET = Dataset(
    label="RegDB",
    read=read,
    caption_folders=frozenset(("Visible", "Thermal")),
    # METHOD 8.
    counts={
        "train identities": 206,
        "test identities": 206,
        "visible train images": 2060,
        "infrared train images": 2060,
        "visible test images": 2060,
        "infrared test images": 2060,
        "visible cameras": 1,
        "infrared cameras": 1,
    },
    # METHOD 9 (Hu, Yang, Ye, NeurIPS 2024; an independent re-run of the released code; others).
    published=(
        published(_SPLITS, "TVI-LFM, infrared only", "infrared", 89.51, 83.51, 69.65),
        published(_SPLITS, "TVI-LFM, all parts", "ensemble", 91.38, 85.92, 72.73),
    ),
)
