"""Move galleries: to and from files, and to another model; and measure what the index finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.rows import Where, column_of, vectors_of

SPACE_KEY = b"tvilfm.space_id"
IMPORTED = 1000  # rows per transaction
K = 10  # of the recall


def export_gallery(gallery: Gallery, path: Path) -> int:
    """Write all rows of a gallery to a new file.

    Args:
        gallery: the gallery.
        path: `*.parquet`, or `*.lance` (a folder).

    Returns:
        The number of rows.

    Raises:
        ValueError: the file exists, or its name has another ending.
    """
    if path.exists():
        raise ValueError(f"{path}: expected a new file, got an existing one. Choose another name.")
    schema = gallery.exported.with_metadata({SPACE_KEY: gallery.space_id.encode()})
    count = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal count
        for batch in gallery.batches():
            count += batch.num_rows
            yield batch

    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, schema) as writer:
            for batch in batches():
                writer.write_batch(batch)
    elif path.suffix == ".lance":
        lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), path, schema=schema)
    else:
        raise ValueError(f"{path}: expected *.parquet or *.lance, got {path.suffix or 'no ending'}.")
    return count


def import_gallery(gallery: Gallery, path: Path) -> int:
    """Write the rows of an exported file into a gallery of the same model; rows with existing ids are replaced.

    Returns:
        The number of rows.

    Raises:
        ValueError: the file is missing, of another model, or not an exported gallery.
    """
    if not path.exists():
        raise ValueError(f"{path}: expected an exported gallery, got no such file.")
    if path.suffix == ".lance":
        dataset = lance.dataset(path)
        schema, batches = dataset.schema, dataset.to_batches(batch_size=IMPORTED)
    else:
        file = pq.ParquetFile(path)
        schema, batches = file.schema_arrow, file.iter_batches(IMPORTED)
    space = (schema.metadata or {}).get(SPACE_KEY, b"none").decode()
    gallery.check_space(space)
    count = 0
    for batch in batches:
        table = pa.Table.from_batches([batch])
        position = table["position"].to_numpy()
        gallery.upsert(table.drop_columns(["position"]), space_id=space, position=position)
        count += table.num_rows
    return count


def migrate_gallery(old: Gallery, new: Gallery) -> tuple[int, int]:
    """Fill the gallery of a new model whose backbone is that of the old one, from raw features, and put it in use.

    The old gallery stays, and can be searched meanwhile. A killed call continues where it stopped.

    Returns:
        The number of rows that were written, and the number of rows without a raw feature, which stay behind.

    Raises:
        ValueError: the backbones differ, so images have to be encoded again.
    """
    if old.encoder != new.encoder:
        raise ValueError(
            "gallery: expected models with the same backbone, got different ones, whose raw features differ. "
            "Encode the images again with tvilfm gallery migrate --images."
        )
    written = left = 0
    for batch in old.batches():
        table = pa.Table.from_batches([batch])
        featured = table["raw"].is_valid()
        left += table.num_rows - int(np.count_nonzero(featured))
        table = table.filter(featured)
        table = table.filter(pa.array(~new.contains(table["id"].to_pylist())))
        position = table["position"].to_numpy()
        table = table.drop_columns(["position", "vector", "vector_base"])
        new.upsert(table, space_id=new.space_id, position=position)
        written += table.num_rows
    new.publish()
    return written, left


@dataclass(frozen=True, kw_only=True)
class Recall:
    """How many of the true `K` nearest rows the database finds, on average over queries.

    Attributes:
        rows: rows of the gallery.
        queries: number of rows that served as queries.
        recall: share of the nearest rows that were found, per vector column.
    """

    rows: int
    queries: int
    recall: dict[str, float]


def measure_recall(gallery: Gallery, *, queries: int, seed: int = 0) -> Recall:
    """Compare the database's nearest rows with those of an exact comparison with all rows.

    Args:
        gallery: the gallery. Its rows are read twice, batch by batch.
        queries: number of rows that serve as queries; each finds itself.
        seed: of the draw of queries.
    """
    total = gallery.count()
    drawn = set(np.random.default_rng(seed).choice(total, size=min(queries, total), replace=False).tolist())
    asked: dict[str, list[np.ndarray]] = {column_of(base): [] for base in (False, True)}
    place = 0
    for table in gallery.tables():
        for row in range(table.num_rows):
            if place + row in drawn:
                for name, vectors in asked.items():
                    vectors.append(vectors_of(table[name])[row])
        place += table.num_rows
    queries_QD = {name: np.stack(vectors) for name, vectors in asked.items()}
    best: dict[str, list[list[tuple[float, str]]]] = {name: [[] for _ in drawn] for name in asked}
    for table in gallery.tables():
        ids = table["id"].to_pylist()
        for name, query_QD in queries_QD.items():
            scores_QN = query_QD @ vectors_of(table[name]).T
            for query, scores_N in enumerate(scores_QN):
                top = np.argpartition(-scores_N, min(K, len(ids) - 1))[: K + 1]
                candidates = best[name][query] + [(float(scores_N[row]), ids[row]) for row in top]
                best[name][query] = sorted(candidates, reverse=True)[:K]
    recall = {}
    for base in (False, True):
        name = column_of(base)
        shares = []
        for query_D, nearest in zip(queries_QD[name], best[name], strict=True):
            table = gallery.nearest(query_D, base=base, count=K, where=Where())
            shares.append(len({id for _, id in nearest} & set(table["id"].to_pylist())) / len(nearest))
        recall[name] = float(np.mean(shares))
    return Recall(rows=total, queries=len(drawn), recall=recall)
