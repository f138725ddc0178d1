"""Rows of a gallery as records of the database, and back.

Shapes: N rows, D feature, E raw image feature.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pgvector import HalfVector, Vector
from psycopg import sql

from tvilfm.retrieval.rows import FACTS, TIME, VECTORS, Where, vector_column, vectors_of
from tvilfm.retrieval.spaces import Heads

FACT_TYPES = (pa.string(), pa.string(), pa.string(), TIME, pa.string(), pa.int64())
READ = (*FACTS, "stamp", "raw", "given")  # columns that `table_of` reads
INCOMING = """
    CREATE TEMP TABLE IF NOT EXISTS incoming (
        number integer, id text, position bigint, pid text, camid text, time timestamptz, image text,
        thumbnail bytea, raw vector, given vector, current halfvec, base halfvec
    ) ON COMMIT DELETE ROWS
"""
INCOMING_TYPES = (
    *("int4", "text", "int8", "text", "text", "timestamptz", "text", "bytea"),
    *("vector", "vector", "halfvec", "halfvec"),
)


def condition_of(where: Where) -> tuple[sql.Composable, dict[str, Any]]:
    """Return a filter as SQL, and its values."""
    terms, values = [sql.SQL("true")], {}
    if where.cameras is not None:
        terms.append(sql.SQL("camid = ANY(%(cameras)s)"))
        values["cameras"] = sorted(where.cameras)
    if where.exclude_cameras:
        terms.append(sql.SQL("camid <> ALL(%(exclude_cameras)s)"))
        values["exclude_cameras"] = sorted(where.exclude_cameras)
    for name, term in (("since", "time >= %(since)s"), ("until", "time <= %(until)s")):
        if getattr(where, name) is not None:
            terms.append(sql.SQL(term))
            values[name] = getattr(where, name)
    return sql.SQL(" AND ").join(terms), values


class _Half(HalfVector):
    """A vector of half precision that NumPy writes; pgvector's own loop takes 50 times as long."""

    def __init__(self, vector_D: npt.NDArray[np.float32]) -> None:
        self._vector_D = vector_D

    def to_binary(self) -> bytes:
        return struct.pack(">HH", len(self._vector_D), 0) + bytes(self._vector_D.astype(">f2").tobytes())


def records_of(rows: pa.Table, heads: Heads, position: npt.NDArray[np.int64] | None) -> list[tuple[Any, ...]]:
    """Return rows of the table `incoming`."""
    count = rows.num_rows
    raw: list[Vector | None] = [None] * count
    given: list[Vector | None] = [None] * count
    vectors = {name: np.empty((count, heads.dim), dtype=np.float32) for name in VECTORS}
    featured = rows["raw"].is_valid().to_numpy()
    if featured.any():
        raw_NE = vectors_of(rows["raw"].filter(pa.array(featured)))
        for name, part in heads.vectors(raw_NE).items():
            vectors[name][featured] = part
        for row, feature in zip(np.flatnonzero(featured), raw_NE, strict=True):
            raw[row] = Vector(feature)
    if not featured.all():
        for name in VECTORS:
            vectors[name][~featured] = vectors_of(rows[name].filter(pa.array(~featured)))
        for row in np.flatnonzero(~featured):
            given[row] = Vector(np.concatenate([vectors[name][row] for name in VECTORS]))
    columns = [rows[name].to_pylist() for name in ("pid", "camid", "time", "image", "thumbnail")]
    places = [None] * count if position is None else position.tolist()
    halves = [[_Half(one) for one in vectors[name]] for name in VECTORS]
    return list(zip(range(count), rows["id"].to_pylist(), places, *columns, raw, given, *halves, strict=True))


def table_of(records: Sequence[tuple[Any, ...]], heads: Heads) -> pa.Table:
    """Return the columns `rows.STORED` of records with the columns `READ`."""
    *facts, stamp, raw, given = zip(*records, strict=True) if records else [()] * len(READ)
    columns = dict(zip(FACTS, map(pa.array, facts, FACT_TYPES), strict=True))
    columns["stamp"] = pa.array(stamp, pa.int64())
    return pa.table(columns | {name: vector_column(part) for name, part in _vectors(raw, given, heads).items()})


def _vectors(
    raw: Sequence[Vector | None], given: Sequence[Vector | None], heads: Heads
) -> dict[str, npt.NDArray[np.float32]]:
    """Return both vectors (N, D) of rows that have either a raw feature or both vectors, joined."""
    vectors = {name: np.empty((len(raw), heads.dim), dtype=np.float32) for name in VECTORS}
    featured = [row for row, one in enumerate(raw) if one is not None]
    if featured:
        raw_NE = np.stack([one.to_numpy() for one in raw if one is not None]).astype(np.float32)
        for name, part in heads.vectors(raw_NE).items():
            vectors[name][featured] = part
    for row, one in enumerate(given):
        if one is not None:
            joined = one.to_numpy()
            vectors["vector"][row], vectors["vector_base"][row] = joined[: heads.dim], joined[heads.dim :]
    return vectors
