"""LLCM: nine cameras in low light, 713 training and 351 test identities.

All images are stored in `vis/{pid:04d}/` and `nir/{pid:04d}/` as `{pid}_c{camera}_s*_f*_{vis,nir}.jpg`.
`idx/train_{vis,nir}.txt` list the training images. The test images are stored a second time in
`test_{vis,nir}/cam{c}/{pid:04d}/`; the published protocol reads these folders, for the identities in `idx/test_id.txt`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from tvilfm.data.image_files import images_in
from tvilfm.data.manifest import build_manifest
from tvilfm.data.splits import held_out, read_ids, read_image_list, require_sound
from tvilfm.datasets.record import AS_REPORTED, Dataset, published

FOLDERS = {"visible": "vis", "infrared": "nir"}
_CAMERA = re.compile(r"_c(\d+)_")


def read(root: Path, *, strict: bool = True) -> pa.Table:
    """Return the manifest of a dataset folder.

    The splits are `train`, `val` (every tenth training identity, see `splits.held_out`) and `test`. `test` contains
    both modalities, because each one is the query in one of the two protocols. Test images are read from `test_vis`
    and `test_nir` or, if these folders are missing, from `idx/test_{vis,nir}.txt`. `pid` is the number of the folder.

    Args:
        root: folder that contains vis, nir, test_vis, test_nir and idx.
        strict: raise an error for missing images and for identities in two splits; `tvilfm data check` sets False.

    Raises:
        ValueError: the layout is different, a list is missing or malformed, a file name contains no camera, or a check
            of `strict` failed.

    Source: Zhang and Wang, CVPR 2023; METHOD 5, 8. Differs: none known.
    """
    absent = [folder for folder in FOLDERS.values() if not (root / folder).is_dir()]
    if absent:
        raise ValueError(
            f"data.root: expected LLCM's folders vis and nir in {root}, got no {absent[0]}. "
            "Set data.root to the folder that contains vis, nir and idx."
        )
    train = [row for modality in FOLDERS for row in _listed(root, "train", modality)]
    folders = [root / f"test_{folder}" for folder in FOLDERS.values()]
    if all(folder.is_dir() for folder in folders):
        pids = read_ids(root / "idx" / "test_id.txt")
        test = [row for modality in FOLDERS for row in _test_folder(root, modality, pids)]
    else:
        test = [row for modality in FOLDERS for row in _listed(root, "test", modality)]
    val = held_out(int(str(row["pid"])) for row in train)
    for row in train:
        row["split"] = "val" if row["pid"] in val else "train"
    manifest = build_manifest([*train, *test])
    return require_sound(root, manifest) if strict else manifest


def _listed(root: Path, part: str, modality: str) -> Iterator[dict[str, object]]:
    folder = FOLDERS[modality]
    path = root / "idx" / f"{part}_{folder}.txt"
    for image in read_image_list(path, top=folder):
        head, pid, name = [*image.split("/"), "", ""][:3]
        camera = _CAMERA.search(name)
        if head != folder or not pid.isdigit() or camera is None:
            raise ValueError(
                f"{path}: expected {folder}/<identity>/<identity>_c<camera>_*.jpg, got {image!r}. Restore the file."
            )
        yield _row(image, int(pid), int(camera[1]), modality, part)


def _test_folder(root: Path, modality: str, pids: list[int]) -> Iterator[dict[str, object]]:
    """Yield the images of `test_{vis,nir}` by identity, camera and file name, like the released protocol."""
    top = f"test_{FOLDERS[modality]}"
    cameras = sorted(
        int(folder.name[3:])
        for folder in (root / top).iterdir()
        if folder.is_dir() and folder.name.startswith("cam") and folder.name[3:].isdigit()
    )
    if not cameras:
        raise ValueError(
            f"data.root: expected camera folders cam1 to cam9 in {root / top}, got none. Unpack the test images again."
        )
    for pid in pids:
        for camid in cameras:
            folder = root / top / f"cam{camid}" / f"{pid:04d}"
            if folder.is_dir():
                for file in images_in(folder):
                    yield _row(f"{top}/cam{camid}/{pid:04d}/{file.name}", pid, camid, modality, "test")


def _row(image: str, pid: int, camid: int, modality: str, split: str) -> dict[str, object]:
    return {"image": image, "pid": pid, "camid": camid, "modality": modality, "split": split}


_SINGLE = "one gallery image per camera"
DATASET = Dataset(
    label="LLCM",
    read=read,
    caption_folders=frozenset(("vis", "nir", "test_vis", "test_nir")),
    # Zhang and Wang, CVPR 2023, section 4.2. Its text says 13,909 test images, but its 8,680 + 7,166 test images and
    # 30,921 training images add up to the 46,767 images of the abstract, so these numbers are used. The protocol
    # excludes infrared camera 3, so a different number of test images is a note and not a fault.
    counts={
        "train identities": 713,
        "test identities": 351,
        "visible train images": 16946,
        "infrared train images": 13975,
        "visible test images": 8680,
        "infrared test images": 7166,
        "visible cameras": 9,
    },
    unsure=frozenset(("visible test images", "infrared test images")),
    # METHOD 9 (Hu, Yang, Ye, NeurIPS 2024; an independent re-run of the released code; others).
    published=(
        published(_SINGLE, "TVI-LFM, infrared only", "infrared", 53.53, 59.77, 56.40),
        published(_SINGLE, "baseline, infrared + text", "fusion", 52.63, 58.82, 55.43),
        published(_SINGLE, "baseline + SFF", "fusion", 54.73, 60.95, 57.64),
        published(_SINGLE, "baseline + SFF + MJL", "fusion", 56.76, 63.58, 60.35),
        published(_SINGLE, "baseline + SFF + MJL + LLM", "fusion", 57.13, 64.06, 60.72),
        published(_SINGLE, "baseline + SFF + MJL + MER", "ensemble", 57.09, 63.87, 60.62),
        published(_SINGLE, "TVI-LFM, all parts", "ensemble", 58.19, 65.08, 61.83),
        published(_SINGLE, "YYDS, human text", "fusion", 58.22, 65.09, None, AS_REPORTED),
        published("NIR to VIS", "BIT (CVPR 2026), image only", "infrared", 66.7, None, None, AS_REPORTED),
    ),
)
