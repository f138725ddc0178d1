"""The search index of a gallery: HNSW of pgvector over both vectors in half precision."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from psycopg import errors, sql

from tvilfm.config import GallerySection
from tvilfm.retrieval.database import Database

COLUMNS = ("current", "base")  # that have an index
INDEXED_DIM = 4000  # the longest vector of half precision that pgvector indexes
PROGRESS_S = 2.0


def unindexed(database: Database, table: str) -> list[str]:
    """Return the vector columns of a table that have no index."""
    query = "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = %s::regclass AND indisvalid"
    names = database.run(lambda connection: connection.execute(query, (table,)).fetchall())
    existing = {name for (name,) in names}
    return [column for column in COLUMNS if f"{table}_{column}" not in existing]


def build_indexes(
    database: Database,
    table: str,
    dim: int,
    section: GallerySection,
    *,
    workers: int,
    again: bool,
    on_progress: Callable[[float], None] | None,
) -> None:
    """Build the indexes of a table; see `Gallery.build_index`."""
    if dim > INDEXED_DIM:
        raise ValueError(
            f"gallery: expected vectors of at most {INDEXED_DIM} dimensions for an index, got {dim}. "
            "Raise gallery.exact_limit, so that all rows are searched in memory."
        )
    for column in COLUMNS if again else unindexed(database, table):
        name = f"{table}_{column}"
        command = sql.SQL(
            "CREATE INDEX {name} ON {table} USING hnsw (({column}::halfvec({dim})) halfvec_ip_ops) "
            "WITH (m = {m}, ef_construction = {ef})"
        ).format(
            name=sql.Identifier(name),
            table=sql.Identifier(table),
            column=sql.Identifier(column),
            dim=sql.Literal(dim),
            m=sql.Literal(section.m),
            ef=sql.Literal(section.ef_construction),
        )
        for parallel in (workers, 0):  # a small /dev/shm allows no parallel workers
            try:
                _build(database, name, command, parallel, section.build_mb, on_progress)
                break
            except errors.DiskFull:
                if not parallel:
                    raise
    with database.session() as connection:
        connection.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(table)))


def _build(
    database: Database,
    name: str,
    command: sql.Composed,
    workers: int,
    memory_mb: int,
    on_progress: Callable[[float], None] | None,
) -> None:
    with database.session() as connection:
        connection.execute(sql.SQL("DROP INDEX IF EXISTS {}").format(sql.Identifier(name)))
        connection.execute(f"SET maintenance_work_mem = '{memory_mb}MB'".encode())
        connection.execute(f"SET max_parallel_maintenance_workers = {workers}".encode())
        try:
            with _watched(database, on_progress):
                connection.execute(command)
        finally:
            connection.execute("RESET maintenance_work_mem")
            connection.execute("RESET max_parallel_maintenance_workers")


@contextmanager
def _watched(database: Database, on_progress: Callable[[float], None] | None) -> Iterator[None]:
    """Report the progress of the index that is built while the block runs."""
    query = "SELECT sum(tuples_done), sum(tuples_total) FROM pg_stat_progress_create_index"
    ended = threading.Event()

    def watch(report: Callable[[float], None]) -> None:
        while not ended.wait(PROGRESS_S):
            done, total = database.run(lambda connection: connection.execute(query).fetchone()) or (0, 0)
            if done and total:
                report(float(done) / float(total))

    if on_progress is None:
        yield
        return
    watcher = threading.Thread(target=watch, args=(on_progress,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
