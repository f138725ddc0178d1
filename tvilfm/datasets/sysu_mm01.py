"""SYSU-MM01: six cameras, 395 + 96 identities, single-folder-per-camera layout.

`cam{1..6}/{pid:04d}/*.jpg`; cameras 3 and 6 are infrared; `exp/{train,val,test}_id.txt` hold comma-separated pids.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from tvilfm.datasets.manifest import build_manifest
from tvilfm.datasets.splits import read_ids

INFRARED_CAMERAS = (3, 6)
CAMERAS = (1, 2, 3, 4, 5, 6)
SUFFIXES = (".jpg", ".png", ".bmp")


def read(root: Path) -> pa.Table:
    """Read the folder.

    Splits: `train`, `val` (together the 395 training identities of the protocol), and of the test identities
    `query` (infrared) and `gallery` (visible). Rows are ordered by split file, pid, camera, file name.

    Raises:
        ValueError: a split file is missing or unreadable, an identity is in two splits, or no camera folder is there.

    Source: Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017; METHOD 8.
    """
    if not any((root / f"cam{camid}").is_dir() for camid in CAMERAS):
        raise ValueError(
            f"data.root: expected SYSU-MM01's folders cam1 to cam6 in {root}, got none of them. "
            "Give the folder that holds cam1 and exp."
        )
    ids = {split: read_ids(root / "exp" / f"{split}_id.txt") for split in ("train", "val", "test")}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        both = sorted(set(ids[first]) & set(ids[second]))
        if both:
            raise ValueError(
                f"exp/{second}_id.txt: expected identities that are not in {first}_id.txt, got pid {both[0]} in both."
            )
    rows = []
    for split, pids in ids.items():
        for pid in pids:
            for camid in CAMERAS:
                modality = "infrared" if camid in INFRARED_CAMERAS else "visible"
                part = {"infrared": "query", "visible": "gallery"}[modality] if split == "test" else split
                folder = root / f"cam{camid}" / f"{pid:04d}"
                if folder.is_dir():
                    rows += [
                        {
                            "image": f"cam{camid}/{pid:04d}/{file.name}",
                            "pid": pid,
                            "camid": camid,
                            "modality": modality,
                            "split": part,
                        }
                        for file in sorted(folder.iterdir())
                        if file.suffix.lower() in SUFFIXES
                    ]
    return build_manifest(rows)
