"""The rows of a gallery: schema, vector columns, and filters."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tvilfm.terms import MAX_ID, is_id, is_name

TIME = pa.timestamp("us", "UTC")
OPTIONAL = ("raw", "vector", "vector_base", "pid", "time", "image", "thumbnail")
VECTORS = ("vector", "vector_base")
FACTS = ("id", "pid", "camid", "time", "image", "position")
# What a gallery returns of its rows. `position` orders equal scores; `stamp` is new with each write of a row.
STORED = (*FACTS, "stamp", *VECTORS)
UNIT_TOLERANCE = 1e-3


def row_schema(dim: int, width: int) -> pa.Schema:
    """Return the columns of rows that are written to a gallery.

    Each row has either the raw feature of its image or both vectors. All columns but id and camid may be missing or
    null.

    id: unique. raw: feature before the heads. vector, vector_base: unit vectors from the current and the base stage's
    head. pid, camid: person and camera as people write them; numbers become their text. time: when the image was taken.
    image: reference to the original image. thumbnail: a JPEG.

    Args:
        dim: length of the vectors.
        width: length of a raw feature, `ModelSpec.image_dim`.
    """
    vector = pa.list_(pa.float32(), dim)
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("raw", pa.list_(pa.float32(), width)),
            pa.field("vector", vector),
            pa.field("vector_base", vector),
            pa.field("pid", pa.string()),
            pa.field("camid", pa.string(), nullable=False),
            pa.field("time", TIME),
            pa.field("image", pa.string()),
            pa.field("thumbnail", pa.binary()),
        ]
    )


def checked(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return rows with exactly the columns of `row_schema`; missing columns are null.

    Raises:
        ValueError: a column is missing or has another type, an id is empty, too long or given twice, a row has not
            either a raw feature or both vectors, a vector is not a unit vector, or a person or camera is not as
            `terms.is_name` expects it.
    """
    for field in schema:
        if field.name not in rows.column_names:
            if field.name not in OPTIONAL:
                raise ValueError(f"rows: expected a column {field.name}, got {rows.column_names}.")
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    try:
        rows = rows.select(schema.names).cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"rows: expected the columns of row_schema, got an error: {error}.") from None
    ids = rows["id"].to_pylist()
    for id in ids:
        if not is_id(id):
            raise ValueError(f"rows.id: expected 1 to {MAX_ID} printable characters, got {id[:MAX_ID]!r}.")
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise ValueError(f"rows.id: expected each id once, got {twice!r} twice. Send only the last one.")
    for name in ("pid", "camid"):
        for text in rows[name].unique().drop_null().to_pylist():
            if not is_name(text):
                raise ValueError(
                    f"rows.{name}: expected 1 to {MAX_ID} printable characters without spaces around them, got "
                    f"{text[:MAX_ID]!r}."
                )
    raw_N, current_N, base_N = (rows[name].is_valid().to_numpy() for name in ("raw", *VECTORS))
    if (wrong := np.flatnonzero((raw_N == current_N) | (current_N != base_N))).size:
        raise ValueError(
            f"rows: expected either raw or {' and '.join(VECTORS)}, got neither or both for {ids[wrong[0]]!r}."
        )
    for name in ("raw", *VECTORS):
        given = rows.filter(rows[name].is_valid())
        length_N = np.linalg.norm(vectors_of(given[name]), axis=1)
        fits_N = np.isfinite(length_N) if name == "raw" else np.abs(length_N - 1) <= UNIT_TOLERANCE  # NaN does not
        if (wrong := np.flatnonzero(~fits_N)).size:
            expected = "finite numbers" if name == "raw" else "unit vectors"
            raise ValueError(
                f"rows.{name}: expected {expected}, got a vector of length {length_N[wrong[0]]:g} for "
                f"{given['id'][wrong[0]].as_py()!r}."
            )
    return rows


@dataclass(frozen=True, kw_only=True)
class Where:
    """Filter on the rows of a search.

    Attributes:
        cameras: cameras to search; None = all.
        exclude_cameras: cameras to skip: the query's own, or camera `2` for queries of camera `3` as in SYSU-MM01.
        since, until: aware times, both inclusive; None = no bound. A row without a time is outside every window.
    """

    cameras: frozenset[str] | None = None
    exclude_cameras: frozenset[str] = frozenset()
    since: datetime | None = None
    until: datetime | None = None

    def expression(self) -> pc.Expression | None:
        """Return the filter as a pyarrow expression; None if every row matches."""
        camid, time = pc.field("camid"), pc.field("time")
        terms = []
        if self.cameras is not None:
            terms.append(camid.isin(pa.array(sorted(self.cameras), pa.string())))
        if self.exclude_cameras:
            terms.append(~camid.isin(pa.array(sorted(self.exclude_cameras), pa.string())))
        if self.since is not None:
            terms.append(time >= pa.scalar(self.since, TIME))
        if self.until is not None:
            terms.append(time <= pa.scalar(self.until, TIME))
        return functools.reduce(operator.and_, terms) if terms else None


def column_of(base: bool) -> str:
    """Return the name of the column that holds the vectors of a space."""
    return "vector_base" if base else "vector"


def vectors_of(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """Convert a column of vectors to (N, D) float32."""
    vectors = column.combine_chunks()
    if isinstance(vectors, pa.ChunkedArray):  # pyarrow keeps an empty column chunked
        return np.empty((0, column.type.list_size), dtype=np.float32)
    return np.asarray(vectors.flatten().to_numpy(), dtype=np.float32).reshape(-1, column.type.list_size)


def vector_column(vectors_ND: npt.NDArray[np.float32]) -> pa.FixedSizeListArray:
    """Convert (N, D) float32 to a column of `row_schema`."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), vectors_ND.shape[1])
