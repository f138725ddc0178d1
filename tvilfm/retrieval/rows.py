"""The rows of a gallery: their schema, their vectors, and conditions on them."""

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
    """Columns of `Gallery.upsert`; pid, time, image and thumbnail may be left out or null.

    id: unique. vector, vector_base: unit, through the current and the base stage's head. time: when the picture was
    taken. image: where it lies. thumbnail: a JPEG.
    """
    vector = pa.list_(pa.float32(), dim)
    return pa.schema(
        [
            # Lance lets of two writers that insert the same key only one commit.
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
    """Columns of the table itself: those of `row_schema` and `position`, the order of writing, which breaks ties."""
    position = pa.field("position", pa.int64(), nullable=False)
    return row_schema(dim).append(position).with_metadata({SPACE_KEY: space_id.encode()})


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which rows take part in a search.

    Attributes:
        cameras: those that do; None = all.
        exclude_cameras: those that do not: the query's own, or as SYSU-MM01 wants camera 2 for a query of camera 3.
        since, until: aware times, both included; a row without a time is outside of every window. None = no bound.
    """

    cameras: frozenset[int] | None = None
    exclude_cameras: frozenset[int] = frozenset()
    since: datetime | None = None
    until: datetime | None = None

    def expression(self) -> pc.Expression | None:
        """The same as a filter of a table; None where every row takes part."""
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
    """The column that holds the vectors of a space."""
    return "vector_base" if base else "vector"


def vectors_of(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """A column of vectors as (N, D) float32."""
    vectors = column.combine_chunks()
    if isinstance(vectors, pa.ChunkedArray):  # pyarrow keeps an empty column chunked
        return np.empty((0, column.type.list_size), dtype=np.float32)
    return np.asarray(vectors.flatten().to_numpy(), dtype=np.float32).reshape(-1, column.type.list_size)


def vector_column(vectors_ND: npt.NDArray[np.float32]) -> pa.FixedSizeListArray:
    """(N, D) float32 as a column of `row_schema`."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), vectors_ND.shape[1])
