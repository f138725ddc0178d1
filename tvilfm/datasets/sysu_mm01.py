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
