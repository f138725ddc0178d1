"""Your own images: a folder tree, or a table with the columns of the manifest.

The folder tree is `visible/<pid>/<camid>/*` and `infrared/<pid>/<camid>/*`, where pid and camid are numbers. If the
folder contains `manifest.parquet` or `manifest.csv`, only this table is used. For a folder tree, `splits.csv`
(`pid,split`) assigns identities to splits; without this file, a rule does (`split_rule`), and a warning is logged.
"""

from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from tvilfm.data.manifest import MANIFEST_SCHEMA, build_manifest
from tvilfm.data.splits import TEST_SPLITS, require_sound
from tvilfm.datasets.record import Dataset
from tvilfm.datasets.sysu_mm01 import SUFFIXES
from tvilfm.terms import MODALITIES

SPLITS = ("train", "val", *TEST_SPLITS)
TABLES = ("manifest.parquet", "manifest.csv")
SPLIT_FILE = "splits.csv"

logger = logging.getLogger(__name__)


def read(root: Path, *, table: str | Path | None = None, strict: bool = True) -> pa.Table:
    """Return the manifest of a folder of images.

    Args:
        root: folder that the `image` paths are relative to.
        table: CSV or Parquet file with the columns `image`, `pid`, `camid`, `modality`, `split`; None =
            `manifest.parquet` or `manifest.csv` in `root` or, without such a file, the folder tree.
        strict: raise an error for missing images and for identities in two splits; `tvilfm data check` sets False.

    Raises:
        ValueError: the layout is different, a column of the table is missing or has an invalid value, an identity is
            missing in `splits.csv`, or a check of `strict` failed.
    """
    if table is None:
        table = next((root / name for name in TABLES if (root / name).is_file()), None)
    manifest = _read_tree(root) if table is None else _read_table(Path(table))
    return require_sound(root, manifest) if strict else manifest


def split_rule(pids: list[int]) -> dict[int, str]:
    """Return the split of every identity if there is no `splits.csv`: half train, a tenth val, the rest test.

    Identities are shuffled first, because their numbers often follow the order of recording. The shuffle depends only
    on the set of pids.
    """
    ordered = np.random.default_rng(0).permutation(sorted(set(pids))).tolist()
    num_train = round(0.5 * len(ordered))
    num_val = max(1, round(0.1 * len(ordered)))
    return {
        pid: "train" if i < num_train else "val" if i < num_train + num_val else "test" for i, pid in enumerate(ordered)
    }


def _read_tree(root: Path) -> pa.Table:
    rows: list[dict[str, object]] = []
    for modality in MODALITIES:
        if not (root / modality).is_dir():
            raise ValueError(
                f"data.root: expected folders visible and infrared, or {' or '.join(TABLES)}, in {root}, got no "
                f"{modality}. Store images as visible/<pid>/<camid>/* and infrared/<pid>/<camid>/*."
            )
        for person in _numbered(root, root / modality):
            for camera in _numbered(root, person):
                rows += [
                    {
                        "image": file.relative_to(root).as_posix(),
                        "pid": int(person.name),
                        "camid": int(camera.name),
                        "modality": modality,
                        "split": "",
                    }
                    for file in sorted(camera.iterdir())
                    if file.suffix.lower() in (*SUFFIXES, ".jpeg")
                ]
    split_of = _splits(root, [int(str(row["pid"])) for row in rows])
    for row in rows:
        row["split"] = split_of[int(str(row["pid"]))]
    return build_manifest(rows)


def _numbered(root: Path, folder: Path) -> list[Path]:
    """Return the numbered subfolders in numeric order; raise an error for other entries that are not hidden."""
    subfolders = [path for path in folder.iterdir() if not path.name.startswith(".")]
    for path in subfolders:
        if not path.is_dir() or not path.name.isdigit():
            raise ValueError(
                f"data.root: expected <modality>/<pid>/<camid>/<image> with numbers for pid and camid, got "
                f"{path.relative_to(root).as_posix()} in {root}. Rename or move it."
            )
    return sorted(subfolders, key=lambda path: int(path.name))


def _splits(root: Path, pids: list[int]) -> dict[int, str]:
    path = root / SPLIT_FILE
    if not path.is_file():
        split_of = split_rule(pids)
        counts = {split: list(split_of.values()).count(split) for split in ("train", "val", "test")}
        logger.warning(
            "data.root: no %s in %s; identities were split by rule: %d train, %d val, %d test. "
            "To choose the splits, write a %s with the columns pid,split.",
            SPLIT_FILE,
            root,
            *counts.values(),
            SPLIT_FILE,
        )
        return split_of
    table = _columns(path, _load(path), ("pid", "split"))
    split_of = dict(zip(table["pid"].cast(pa.int64()).to_pylist(), table["split"].to_pylist(), strict=True))
    missing = sorted(set(pids) - set(split_of))
    if missing:
        raise ValueError(f"{path}: expected a line for every identity, got none for pid {missing[0]}. Add its split.")
    _known(path, "split", set(split_of.values()), SPLITS)
    return split_of


def _read_table(path: Path) -> pa.Table:
    table = _columns(path, _load(path), tuple(MANIFEST_SCHEMA.names))
    _known(path, "modality", set(table["modality"].to_pylist()), MODALITIES)
    _known(path, "split", set(table["split"].to_pylist()), SPLITS)
    for image in table["image"].to_pylist():
        parts = PurePosixPath(image)
        if parts.is_absolute() or ".." in parts.parts:
            raise ValueError(f"{path}: expected image paths relative to data.root, got {image!r}. Rewrite the column.")
    return build_manifest(table.to_pylist())


def _load(path: Path) -> pa.Table:
    if not path.is_file():
        raise ValueError(f"data.root: expected the table {path}, got no such file. Check the path.")
    try:
        return pq.read_table(path) if path.suffix == ".parquet" else pyarrow.csv.read_csv(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: expected a CSV or Parquet table, got {error}. Fix the file.") from None


def _columns(path: Path, table: pa.Table, names: tuple[str, ...]) -> pa.Table:
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{path}: expected the columns {', '.join(names)}, got no {missing[0]} among "
            f"{', '.join(table.column_names)}. Add it."
        )
    schema = pa.schema([MANIFEST_SCHEMA.field(name) for name in names])
    table = table.select(list(names))
    empty = [name for name in names if table[name].null_count]
    if empty:
        raise ValueError(f"{path}: expected a value in every row of {empty[0]}, got an empty one. Add the value.")
    try:
        return table.cast(schema)
    except pa.ArrowException as error:
        raise ValueError(
            f"{path}: expected integers in pid and camid and text elsewhere, got {error}. Fix the table."
        ) from None


def _known(path: Path, column: str, values: set[str], known: tuple[str, ...]) -> None:
    unknown = sorted(values - set(known))
    if unknown:
        raise ValueError(f"{path}: expected {column} among {', '.join(known)}, got {unknown[0]!r}. Fix it.")


DATASET = Dataset(
    label="folder",
    read=read,
    caption_folders=frozenset(("visible", "infrared")),
)
