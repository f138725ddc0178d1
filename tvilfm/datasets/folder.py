"""Your own images: a folder tree, or a table with the columns of the manifest.

The folder tree is `visible/<pid>/<camid>/*` and `infrared/<pid>/<camid>/*`, where camid is a number and pid is any text
(`data/people.py`). If the folder contains `manifest.parquet` or `manifest.csv`, only this table is used. For a folder
tree, `splits.csv` (`pid,split`) assigns identities to splits; without this file, a rule does (`split_rule`), and a
warning is logged.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from tvilfm.data.image_files import is_image, list_files, patterns
from tvilfm.data.manifest import MANIFEST_SCHEMA, build_manifest
from tvilfm.data.people import number_people, spelling, with_people
from tvilfm.data.splits import TEST_SPLITS, require_sound
from tvilfm.data.text_files import read_text
from tvilfm.datasets.record import Dataset
from tvilfm.terms import MODALITIES

SPLITS = ("train", "val", *TEST_SPLITS)
TABLES = ("manifest.parquet", "manifest.csv")
SPLIT_FILE = "splits.csv"
SIDES = {"query": "infrared", "gallery": "visible"}  # of the protocol: modality of each side

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Row:
    """An image; `person` is the identity as written."""

    image: str
    person: str
    camid: int
    modality: str
    split: str


def read(root: Path, *, table: str | Path | None = None, distractors: bool = False, strict: bool = True) -> pa.Table:
    """Return the manifest of a folder of images.

    Images with a negative identity show nobody. They are left out, or put into the gallery as distractors.

    Args:
        root: folder that the `image` paths are relative to.
        table: CSV or Parquet file with the columns `image`, `pid`, `camid`, `modality`, `split`; None =
            `manifest.parquet` or `manifest.csv` in `root` or, without such a file, the folder tree.
        distractors: keep visible images with a negative identity, in the split `gallery`.
        strict: raise an error for missing images and for identities in two splits; `tvilfm data check` sets False.

    Raises:
        ValueError: the layout is different, a column of the table is missing or has an invalid value, a table
            contradicts itself, an identity is missing in `splits.csv`, or a check of `strict` failed.
    """
    if table is None:
        table = next((root / name for name in TABLES if (root / name).is_file()), None)
    rows = _read_tree(root) if table is None else _read_table(Path(table), root)
    numbers, names = number_people(row.person for row in rows)
    if table is None:
        split_of = _splits(root, {numbers[row.person]: row.person for row in rows if numbers[row.person] >= 0})
        rows = [replace(row, split=split_of.get(numbers[row.person], "gallery")) for row in rows]
    kept = [row for row in rows if numbers[row.person] >= 0 or (distractors and row.modality == SIDES["gallery"])]
    manifest = build_manifest(
        {
            "image": row.image,
            "pid": numbers[row.person],
            "camid": row.camid,
            "modality": row.modality,
            "split": row.split if numbers[row.person] >= 0 else "gallery",
        }
        for row in kept
    )
    manifest = with_people(manifest, names)
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


def _read_tree(root: Path) -> list[_Row]:
    for modality in MODALITIES:
        if not (root / modality).is_dir():
            raise ValueError(
                f"data.root: expected folders visible and infrared, or {' or '.join(TABLES)}, in {root}, got no "
                f"{modality}. Store images as visible/<pid>/<camid>/* and infrared/<pid>/<camid>/*."
            )
    names = [name for name in list_files(root) if is_image(name)]
    placed = [parts for name in names if len(parts := name.split("/")) == 4 and parts[0] in MODALITIES]
    if not placed:
        raise ValueError(
            f"data.root: expected images in visible/<pid>/<camid>/ and infrared/<pid>/<camid>/ of {root}, got "
            f"{_elsewhere(names)}. Move them to such folders, or list them in {TABLES[1]}."
        )
    cameras = {camera: "/".join([modality, person, camera]) for modality, person, camera, _ in placed}
    for camera, folder in cameras.items():
        if not _is_number(camera):
            raise ValueError(
                f"data.root: expected <modality>/<pid>/<camid>/<image> with a number for camid, got {folder} in "
                f"{root}. Rename or move it."
            )
    order: dict[str, int] = {modality: place for place, modality in enumerate(MODALITIES)}
    numbers, _ = number_people(person for _, person, _, _ in placed)
    placed.sort(key=lambda parts: (order[parts[0]], numbers[parts[1]], int(parts[2]), parts[3]))
    return [
        _Row("/".join(parts), person=parts[1], camid=int(parts[2]), modality=parts[0], split="") for parts in placed
    ]


def _elsewhere(names: Sequence[str]) -> str:
    if not names:
        return "no image"
    found = (f"{len(group)} in {pattern}" for pattern, group in patterns(names).items())
    return f"{', '.join(found)}, such as {names[0]}"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _splits(root: Path, people: Mapping[int, str]) -> dict[int, str]:
    """Return the split of every identity; `people` maps numbers to texts as written."""
    path = root / SPLIT_FILE
    if not path.is_file():
        split_of = split_rule(list(people))
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
    _known(path, "split", set(table["split"].to_pylist()), SPLITS)
    listed: dict[str, tuple[int, str]] = {}
    for line, row in enumerate(table.to_pylist(), _first_row(path)):
        person, split = row["pid"], row["split"]
        before, first = listed.setdefault(spelling(person), (line, split))
        if first != split:
            raise ValueError(
                f"{path}: expected each identity in one split, got {person} in {first} (line {before}) and in {split} "
                f"(line {line}). Remove one of the lines."
            )
    missing = sorted(person for person in people.values() if spelling(person) not in listed)
    if missing:
        raise ValueError(f"{path}: expected a line for every identity, got none for pid {missing[0]}. Add its split.")
    return {pid: listed[spelling(person)][1] for pid, person in people.items()}


def _read_table(path: Path, root: Path) -> list[_Row]:
    table = _columns(path, _load(path), tuple(MANIFEST_SCHEMA.names))
    _known(path, "modality", set(table["modality"].to_pylist()), MODALITIES)
    _known(path, "split", set(table["split"].to_pylist()), SPLITS)
    first: dict[str, tuple[int, _Row]] = {}
    for line, fields in enumerate(table.to_pylist(), _first_row(path)):
        image = _in_folder(path, root, fields.pop("image"))
        row = _Row(image, person=fields.pop("pid"), **fields)
        before, other = first.setdefault(row.image, (line, row))
        if other != row:
            differing = [
                f"{name} {getattr(other, name)} (row {before}) and {getattr(row, name)} (row {line})"
                for name in ("person", "camid", "modality", "split")
                if getattr(other, name) != getattr(row, name)
            ]
            raise ValueError(
                f"{path}: expected each image once, got {row.image} with {', '.join(differing)}. Remove "
                "one of the rows."
            )
        if SIDES.get(row.split, row.modality) != row.modality:
            raise ValueError(
                f"{path}: expected infrared images in the split query and visible images in the split gallery, got "
                f"the {row.modality} image {row.image} (row {line}) in {row.split}. Write test instead, which uses "
                "both modalities as the protocol does."
            )
    return [row for _, row in first.values()]


def _in_folder(path: Path, root: Path, written: str) -> str:
    """Return the image that a table names: as written, or the longest end of the path that is a file of the folder.

    Tables from other machines have backslashes or absolute paths. A missing image stays as written.
    """
    plain = PurePosixPath(written)
    inside = not plain.is_absolute() and ".." not in plain.parts
    if inside and (root / written).is_file():
        return written
    parts = [part for part in written.replace("\\", "/").split("/") if part not in ("", ".")]
    for start in range(len(parts)):
        tail = "/".join(parts[start:])
        if ".." not in parts[start:] and (root / tail).is_file():
            return tail
    if not inside or "\\" in written:
        raise ValueError(
            f"{path}: expected image paths relative to data.root, got {written!r}, and no end of this path is a file "
            f"in {root}. Rewrite the column, or set data.root to the folder of the images."
        )
    return written


def _load(path: Path) -> pa.Table:
    if not path.is_file():
        raise ValueError(f"data.root: expected the table {path}, got no such file. Check the path.")
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        texts = dict.fromkeys(("image", "pid", "modality", "split"), pa.string())
        options = pyarrow.csv.ConvertOptions(column_types=texts, strings_can_be_null=True, null_values=[""])
        return pyarrow.csv.read_csv(io.BytesIO(read_text(path).encode()), convert_options=options)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: expected a CSV or Parquet table, got {error}. Fix the file.") from None


def _first_row(path: Path) -> int:
    """Return the number of the first row in messages: a CSV file has its header in row 1."""
    return 1 if path.suffix == ".parquet" else 2


def _columns(path: Path, table: pa.Table, names: tuple[str, ...]) -> pa.Table:
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{path}: expected the columns {', '.join(names)}, got no {missing[0]} among "
            f"{', '.join(table.column_names)}. Add it."
        )
    table = table.select(list(names))
    for name in names:
        values = enumerate(table[name].to_pylist(), _first_row(path))
        empty = next((row for row, value in values if _is_empty(value)), None)
        if empty is not None:
            raise ValueError(
                f"{path}: expected a value in every row of {name}, got an empty one in row {empty}. Add the value."
            )
    types = {name: pa.string() if name == "pid" else MANIFEST_SCHEMA.field(name).type for name in names}
    try:
        return table.cast(pa.schema(types))
    except pa.ArrowException as error:
        raise ValueError(
            f"{path}: expected integers in camid and text elsewhere, got {error}. Fix the table."
        ) from None


def _is_empty(value: object) -> bool:
    # pandas writes a missing number as NaN, which is not equal to itself.
    return value is None or value != value or not str(value).strip()


def _known(path: Path, column: str, values: Iterable[str], known: tuple[str, ...]) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{path}: expected {column} among {', '.join(known)}, got {unknown[0]!r}. Fix it.")


DATASET = Dataset(
    label="folder",
    read=read,
    caption_folders=frozenset(("visible", "infrared")),
)
