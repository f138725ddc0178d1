"""Caption tables in Parquet or CSV: one row per image, with keys that may come from another machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from tvilfm.data.manifest import CAPTION_SCHEMA
from tvilfm.data.text_files import read_text
from tvilfm.datasets.caption_keys import match, names_of


@dataclass(frozen=True, kw_only=True)
class Matched:
    """The rows of a caption table, matched to the images of a manifest.

    Attributes:
        found: image -> row with the columns of `CAPTION_SCHEMA`; a null caption is the empty text.
        unknown: keys without an image in the manifest.
    """

    found: dict[str, dict[str, Any]]
    unknown: list[str]


def match_table(path: Path, manifest: pa.Table) -> tuple[pa.Table, Matched]:
    """Read a caption table and match its rows to images, as keys of JSON files are matched.

    Returns:
        The table as stored, and its rows by image.

    Raises:
        ValueError: there is no file, it is not a caption table, or two rows of an image differ.
    """
    table = _read(path)
    images = manifest["image"].to_pylist()
    # Keys of this machine are the images themselves. Then the end of a key says nothing: `1/a.jpg` is not `a.jpg`.
    same_root = not set(images).isdisjoint(table["image"].to_pylist())
    names = names_of(images)
    found: dict[str, dict[str, Any]] = {}
    first: dict[str, int] = {}
    unknown: list[str] = []
    for number, row in enumerate(table.select(CAPTION_SCHEMA.names).to_pylist(), start=1):
        key = row["image"] or ""
        image = names.get(key) if same_root else match(key, names)
        if image is None:
            unknown.append(key)
            continue
        row = {**row, "image": image, "caption": row["caption"] or ""}
        if found.setdefault(image, row) != row:
            raise ValueError(
                f"{path}: expected one caption per image, got two of {image}: {found[image]['caption']!r} (row "
                f"{first[image]}) and {row['caption']!r} (row {number}). Remove one of the rows."
            )
        first.setdefault(image, number)
    return table, Matched(found=found, unknown=unknown)


def is_table(path: Path) -> bool:
    """Return whether `data.captions` names a caption table, rather than a folder of published files."""
    return path.suffix in (".parquet", ".csv")


def _read_csv(path: Path) -> pa.Table:
    types = {field.name: field.type for field in CAPTION_SCHEMA}
    return pcsv.read_csv(
        pa.BufferReader(read_text(path).encode()),
        parse_options=pcsv.ParseOptions(newlines_in_values=True),
        convert_options=pcsv.ConvertOptions(column_types=types, strings_can_be_null=True),
    )


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise ValueError(f"data.captions: expected a caption table, got no file {path}. Check the path.")
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else _read_csv(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: expected a table in Parquet or CSV, got {error}. Write it again.") from None
    for field in CAPTION_SCHEMA:
        if field.name in table.column_names:
            continue
        if not field.nullable:
            raise ValueError(
                f"data.captions: expected the columns image and caption, got no {field.name} in {path}. Add the column."
            )
        table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    for name in CAPTION_SCHEMA.names:
        kind = table.schema.field(name).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_null(value)):
            raise ValueError(f"{path}: expected text in the column {name}, got {kind}. Write the column as text.")
    return table
