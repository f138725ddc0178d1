"""Recognize how a folder of images is organized, and write the manifest table of layouts that no reader reads."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tvilfm.data.image_files import list_images
from tvilfm.data.people import number_people
from tvilfm.datasets.findings import Fault
from tvilfm.datasets.folder import TABLES, split_rule

MOST = 0.9  # share of the images that a naming has to fit
# Folders that a dataset of each reader has.
MARKS: Mapping[str, tuple[str, ...]] = {
    "sysu_mm01": ("cam1", "cam3", "exp"),
    "regdb": ("Visible", "Thermal", "idx"),
    "llcm": ("vis", "nir", "idx"),
    "folder": ("visible", "infrared"),
}


@dataclass(frozen=True)
class Naming:
    """A way to write identity, camera and perhaps modality into the path of an image."""

    what: str
    pattern: re.Pattern[str]


READ_BY_FOLDER = re.compile(r"(?:visible|infrared)/[^/]+/[0-9]+/[^/]+")
NAMINGS = (
    Naming(
        "folders visible/<pid>/<camid>/<track>/",
        re.compile(r"(?:^|/)(?P<modality>visible|infrared)/(?P<pid>[^/]+)/(?P<camid>[0-9]+)/(?:[^/]+/)*[^/]+$"),
    ),
    Naming("folders cam<camid>/<pid>/, as SYSU-MM01", re.compile(r"(?:^|/)cam(?P<camid>[0-9]+)/(?P<pid>[^/]+)/[^/]+$")),
    Naming(
        "file names <pid>_c<camid>..., as Market-1501",
        re.compile(r"(?:^|/)(?P<pid>-?[A-Za-z0-9]+)_c(?:am)?(?P<camid>[0-9]+)[^/]*$"),
    ),
)


def recognize(root: Path, name: str) -> Iterator[Fault]:
    """Yield notes about what a folder that the reader `name` refuses looks like, with the command that reads it."""
    for other, folders in MARKS.items():
        if other != name and all((root / folder).is_dir() for folder in folders):
            yield Fault(
                what=f"this folder looks like {other}: it has {', '.join(folders)}",
                where=(str(root),),
                fix=f"Set data.name={other}.",
                serious=False,
            )
            return
    names = list_images(root)
    naming, fitting = _best(names)
    if naming is not None and not (name == "folder" and all(map(READ_BY_FOLDER.fullmatch, fitting))):
        needs = "" if "modality" in naming.pattern.groupindex else " --infrared-cameras <numbers>"
        yield Fault(
            what=f"{len(fitting)} of {len(names)} images are organized by {naming.what}",
            where=(fitting[0],),
            fix=f"Write {TABLES[1]} with `tvilfm data table {root}{needs}`, then set data.name=folder.",
            serious=False,
        )


def write_table(root: Path, infrared_cameras: Collection[int]) -> list[dict[str, object]]:
    """Write `manifest.csv` for images whose paths contain identity and camera; splits follow `folder.split_rule`.

    Args:
        root: folder of the images.
        infrared_cameras: numbers of the infrared cameras; ignored if the paths contain the modality.

    Returns:
        The rows.

    Raises:
        ValueError: the paths follow no known naming, the cameras are not given, or the table exists.
    """
    path = root / TABLES[1]
    if path.exists():
        raise ValueError(f"{path}: expected no table yet, got one. Remove it, or edit it.")
    names = list_images(root)
    naming, fitting = _best(names)
    if naming is None:
        known = "; ".join(one.what for one in NAMINGS)
        raise ValueError(f"{root}: expected images organized by one of: {known}; got {names[:1] or 'no image'}.")
    found = [match for name in fitting if (match := naming.pattern.search(name))]
    cameras = sorted({int(match["camid"]) for match in found})
    if "modality" not in naming.pattern.groupindex and not set(infrared_cameras) & set(cameras):
        raise ValueError(
            f"--infrared-cameras: expected some of the cameras {', '.join(map(str, cameras))}, got "
            f"{', '.join(map(str, infrared_cameras)) or 'none'}. Give the numbers of the infrared ones."
        )
    numbers, _ = number_people(match["pid"] for match in found)
    split_of = split_rule([number for number in numbers.values() if number >= 0])
    rows: list[dict[str, object]] = []
    for match in found:
        camid = int(match["camid"])
        modality = match.groupdict().get("modality") or ("infrared" if camid in infrared_cameras else "visible")
        split = split_of.get(numbers[match["pid"]], "test")
        rows.append({"image": match.string, "pid": match["pid"], "camid": camid, "modality": modality, "split": split})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def _best(names: Sequence[str]) -> tuple[Naming | None, list[str]]:
    """Return the first naming that fits most images, and the images that it fits."""
    for naming in NAMINGS:
        fitting = [name for name in names if naming.pattern.search(name)]
        if fitting and len(fitting) >= MOST * len(names):
            return naming, fitting
    return None, []
