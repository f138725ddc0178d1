"""SYSU-MM01: six cameras, 395 + 96 identities, one folder per camera.

Images are `cam{1..6}/{pid:04d}/*.jpg`; cameras 3 and 6 are infrared. `exp/{train,val,test}_id.txt` contain
comma-separated pids. `exp/rand_perm_cam.mat`, an optional file of the authors' evaluation kit, contains the images of
their galleries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from tvilfm.data.image_files import images_in
from tvilfm.data.manifest import build_manifest
from tvilfm.data.splits import read_ids
from tvilfm.datasets.record import AS_REPORTED, Dataset, published

INFRARED_CAMERAS = (3, 6)
CAMERAS = (1, 2, 3, 4, 5, 6)
PERMUTATIONS_FILE = "rand_perm_cam.mat"
PERMUTATIONS = b"rand_perm_cam"  # metadata key of the manifest
MOST_SHOTS = 10


def read(root: Path) -> pa.Table:
    """Return the manifest of a dataset folder.

    The splits are `train` and `val` (together the 395 training identities of the protocol) and, for the test
    identities, `query` (infrared) and `gallery` (visible). Rows are ordered by split file, pid, camera, file name.

    Raises:
        ValueError: a split file is missing or unreadable, an identity is in two splits, or there is no camera folder.

    Source: Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017; METHOD 8.
    """
    if not any((root / f"cam{camid}").is_dir() for camid in CAMERAS):
        raise ValueError(
            f"data.root: expected SYSU-MM01's folders cam1 to cam6 in {root}, got none of them. "
            "Set data.root to the folder that contains cam1 and exp."
        )
    ids = {split: read_ids(root / "exp" / f"{split}_id.txt") for split in ("train", "val", "test")}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        both = sorted(set(ids[first]) & set(ids[second]))
        if both:
            raise ValueError(
                f"exp/{second}_id.txt: expected identities that are not in {first}_id.txt, got pid {both[0]} in both. "
                "Restore the split files."
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
                        for file in images_in(folder)
                    ]
    manifest = build_manifest(rows)
    path = root / "exp" / PERMUTATIONS_FILE
    if not path.is_file():
        return manifest
    return manifest.replace_schema_metadata(
        {PERMUTATIONS: json.dumps(read_permutations(path, ids["val"] + ids["test"]))}
    )


def read_permutations(path: Path, pids: Iterable[int]) -> dict[str, list[list[int]]]:
    """Read `rand_perm_cam.mat` of the dataset authors' evaluation kit.

    Args:
        path: MATLAB file with the cell array `rand_perm_cam`: camera, then identity, then trials x images.
        pids: identities to read.

    Returns:
        "camera/identity" -> per trial, the numbers in the file names of the first `MOST_SHOTS` drawn images.

    Raises:
        ValueError: the file has another format.

    Source: Wu et al., ICCV 2017, evaluation kit.
    """
    from scipy.io import loadmat  # imported here because it is only needed for this file

    try:
        cells = loadmat(path)["rand_perm_cam"]
        return {
            f"{camid}/{pid}": np.atleast_2d(draws)[:, :MOST_SHOTS].astype(int).tolist()
            for camid in CAMERAS
            if camid not in INFRARED_CAMERAS
            for pid in pids
            if (draws := cells[camid - 1][0].squeeze()[pid - 1]).size
        }
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"{path}: expected the authors' cell array rand_perm_cam[camera][identity], got another file ({error}). "
            "Copy it from the dataset's evaluation kit again, or remove it."
        ) from None


def permutations(manifest: pa.Table) -> dict[str, list[list[int]]]:
    """Return the result of `read_permutations` from the manifest's metadata; empty if the dataset has no such file."""
    drawn: dict[str, list[list[int]]] = json.loads((manifest.schema.metadata or {}).get(PERMUTATIONS, b"{}"))
    return drawn


_ALL, _INDOOR = "all search, single-shot", "indoor search, single-shot"
_RERUN = "independent re-run of the released code, mean ± standard deviation of 4 seeds"
DATASET = Dataset(
    label="SYSU-MM01",
    read=read,
    caption_folders=frozenset(f"cam{i}" for i in range(1, 7)),
    # METHOD 8.
    counts={
        "train identities": 395,
        "test identities": 96,
        "visible train images": 22258,
        "infrared train images": 11909,
        "infrared test images": 3803,
        "visible cameras": 4,
        "infrared cameras": 2,
    },
    # METHOD 9 (Hu, Yang, Ye, NeurIPS 2024; an independent re-run of the released code; others).
    published=(
        published(_ALL, "TVI-LFM, infrared only", "infrared", 69.89, 66.74, 53.34),
        published(_ALL, "baseline, infrared + text", "fusion", 72.52, 69.15, 55.93),
        published(_ALL, "baseline + SFF", "fusion", 77.00, 73.73, 61.50),
        published(_ALL, "baseline + SFF + MJL", "fusion", 83.97, 80.40, 69.46),
        published(_ALL, "baseline + SFF + MJL + LLM", "fusion", 84.17, 80.72, 70.02),
        published(_ALL, "baseline + SFF + MJL + MER", "ensemble", 84.88, 81.32, 70.57),
        published(_ALL, "TVI-LFM, all parts", "ensemble", 84.90, 81.47, 70.85),
        published(_INDOOR, "TVI-LFM, all parts", "ensemble", 89.06, 90.78, 88.39),
        published(_ALL, "TVI-LFM re-run, without MER", "fusion", 81.42, 77.29, 64.86, _RERUN, 0.40),
        published(_ALL, "TVI-LFM re-run, with MER", "ensemble", 81.16, 77.23, 64.86, _RERUN, 0.69),
        published(_ALL, "YYDS, human text", "fusion", 85.54, 81.64, 70.51, AS_REPORTED),
        published(_ALL, "BIT (CVPR 2026), image only", "infrared", 80.53, 79.76, None, AS_REPORTED),
        published(_ALL, "IDKL, image only", "infrared", 81.42, 79.85, None, AS_REPORTED),
    ),
)
