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

SPACE_KEY = b"space_id"
TIME = pa.timestamp("us", "UTC")
OPTIONAL = ("pid", "time", "image", "thumbnail")


def row_schema(dim: int) -> pa.Schema:
    """Return the columns of `Gallery.upsert`; pid, time, image and thumbnail may be missing or null.

    id: unique. vector, vector_base: unit vectors from the current and the base stage's head. time: when the image was
    taken. image: reference to the original image. thumbnail: a JPEG.
    """
    vector = pa.list_(pa.float32(), dim)
    return pa.schema(
        [
            # With a primary key, Lance lets only one of two writers that insert the same id commit.
            pa.field("id", pa.string(), nullable=False, metadata={"lance-schema:unenforced-primary-key": "true"}),
            pa.field("vector", vector, nullable=False),
            pa.field("vector_base", vector, nullable=False),
            pa.field("pid", pa.int64()),
            pa.field("camid", pa.int32(), nullable=False),
            pa.field("time", TIME),
            pa.field("image", pa.string()),
            pa.field("thumbnail", pa.binary()),
        ]
    )


def table_schema(dim: int, space_id: str) -> pa.Schema:
    """Return the columns of the table: `row_schema` plus `position`, the order of writing, which breaks ties."""
    position = pa.field("position", pa.int64(), nullable=False)
    return row_schema(dim).append(position).with_metadata({SPACE_KEY: space_id.encode()})


@dataclass(frozen=True, kw_only=True)
class Where:
    """Filter on the rows of a search.

    Attributes:
        cameras: cameras to search; None = all.
        exclude_cameras: cameras to skip: the query's own, or camera 2 for queries of camera 3 as in SYSU-MM01.
        since, until: aware times, both inclusive; None = no bound. A row without a time is outside every window.
    """

    cameras: frozenset[int] | None = None
    exclude_cameras: frozenset[int] = frozenset()
    since: datetime | None = None
    until: datetime | None = None

    def expression(self) -> pc.Expression | None:
        """Return the filter as a pyarrow expression; None if every row matches."""
        camid, time = pc.field("camid"), pc.field("time")
        terms = []
        if self.cameras is not None:
            terms.append(camid.isin(pa.array(sorted(self.cameras), pa.int32())))
        if self.exclude_cameras:
            terms.append(~camid.isin(pa.array(sorted(self.exclude_cameras), pa.int32())))
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
