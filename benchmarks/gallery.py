"""The gallery at size: writing, indexing, searching and erasing, against NumPy and against pgvector alone.

    python -m benchmarks.gallery --rows 100000

Fills an embedded PostgreSQL server with random unit vectors and measures each operation. The baselines use the same
vectors in the same run: NumPy compares a query with all vectors in single precision; "pgvector alone" sends the index
query without a filter, a transaction setting or a second comparison. Writes `benchmarks/results/gallery.jsonl`. It is
not part of `make bench`, because 100,000 rows take half an hour and 4 GB of disk.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from pgvector import HalfVector
from torch import Tensor

from benchmarks.__main__ import RESULTS, machine, versions
from tvilfm.config import GallerySection
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.query import Query
from tvilfm.retrieval.rows import Where, vector_column
from tvilfm.retrieval.search import Request, Searcher
from tvilfm.retrieval.spaces import Heads
from tvilfm.retrieval.transfer import measure_recall

DIM, K, CAMERAS, WRITTEN = 2048, 10, 50, 1000
SPACE = "benchmark"
IDENTITIES = 20  # rows per identity, which are similar as images of one person are
SPREAD = 0.7
QUERIES, CLIENTS = 100, 16


@contextmanager
def filled(rows: int, *, exact_limit: int, seed: int = 0) -> Iterator[tuple[Gallery, Tensor, float]]:
    """Provide a gallery in an embedded server, its vectors (N, D), and the rate at which it was filled."""
    section = GallerySection(exact_limit=exact_limit, build_mb=8192)
    head_4D = np.repeat(np.array([[0.0], [1.0], [1.0], [0.0]], dtype=np.float32), DIM, axis=1)
    heads = Heads(current_4D=head_4D, base_4D=head_4D, eps=0.0, width=DIM)
    vectors_ND = drawn(rows, seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        gallery = Gallery.prepare(f"{folder}/gallery", space_id=SPACE, heads=heads, encoder=SPACE, section=section)
        started = time.perf_counter()
        for start in range(0, rows, WRITTEN):
            write(gallery, range(start, min(rows, start + WRITTEN)), vectors_ND)
        yield gallery, vectors_ND, rows / (time.perf_counter() - started)
        gallery.close()


def drawn(rows: int, seed: int) -> Tensor:
    """Return (N, D) unit vectors in groups of similar ones."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, rows, WRITTEN):
        count = min(WRITTEN, rows - start)
        centres = torch.randn(-(-count // IDENTITIES), DIM, generator=generator).repeat_interleave(IDENTITIES, dim=0)
        parts.append(F.normalize(centres[:count] + SPREAD * torch.randn(count, DIM, generator=generator), dim=1))
    return torch.cat(parts)


def write(gallery: Gallery, numbers: range, vectors_ND: Tensor) -> None:
    """Write rows whose raw features are the vectors."""
    columns = {
        "id": [f"row-{n}" for n in numbers],
        "camid": [str(n % CAMERAS) for n in numbers],
        "pid": [str(n // IDENTITIES) for n in numbers],
        "raw": vector_column(vectors_ND[numbers.start : numbers.stop].numpy()),
    }
    gallery.upsert(pa.table(columns), space_id=SPACE)


def milliseconds(work: Callable[[int], object], repeats: int = QUERIES) -> tuple[float, float]:
    """Return the median and the 99th percentile of calls, in milliseconds."""
    seconds = []
    for number in range(repeats):
        started = time.perf_counter()
        work(number)
        seconds.append(time.perf_counter() - started)
    return tuple(round(1000 * float(np.quantile(seconds, share)), 2) for share in (0.5, 0.99))  # type: ignore[return-value]


def queries_of(vectors_ND: Tensor) -> list[Query]:
    generator = torch.Generator().manual_seed(1)
    places = torch.randint(len(vectors_ND), (QUERIES,), generator=generator)
    near_QD = F.normalize(vectors_ND[places] + 0.02 * torch.randn(QUERIES, DIM, generator=generator), dim=1)
    return [Query(parts={"text": one}, base=False, space_id=SPACE, filter_text_source="none") for one in near_QD]


def searched(searcher: Searcher, queries: list[Query], where: Where | None = None) -> Callable[[int], object]:
    request = Request(weights={}, k=K, where=where or Where())
    return lambda number: searcher.search([queries[number % QUERIES]], [request])


def together(search: Callable[[int], object]) -> dict[str, float]:
    """Measure searches of several clients at once."""
    latencies: list[tuple[float, float]] = []
    started = time.perf_counter()
    threads = [
        threading.Thread(target=lambda: latencies.append(milliseconds(search, QUERIES // 4))) for _ in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = CLIENTS * (QUERIES // 4) / (time.perf_counter() - started)
    p50, p99 = (round(float(np.median([one[place] for one in latencies])), 2) for place in (0, 1))
    return {"p50_ms": p50, "p99_ms": p99, "searches_per_s": round(rate, 1)}


def numpy_flat(vectors_ND: npt.NDArray[np.float32], queries: list[Query]) -> Callable[[int], object]:
    def search(number: int) -> object:
        scores_N = vectors_ND @ queries[number % QUERIES].parts["text"].numpy()
        best = np.argpartition(-scores_N, K)[:K]
        return best[np.argsort(-scores_N[best])]

    return search


def pgvector_alone(gallery: Gallery, queries: list[Query]) -> Callable[[int], object]:
    command = (
        f"SELECT id FROM image_{gallery.number} ORDER BY current::halfvec({DIM}) <#> %s::halfvec({DIM}) LIMIT {K}"
    ).encode()

    def search(number: int) -> object:
        vector = HalfVector(queries[number % QUERIES].parts["text"].numpy())
        return gallery.database.run(lambda connection: connection.execute(command, (vector,)).fetchall())

    return search


def while_written(gallery: Gallery, vectors_ND: Tensor, search: Callable[[int], object]) -> tuple[float, float]:
    """Return latencies while another thread replaces rows."""
    ended = threading.Event()

    def replace() -> None:
        while not ended.is_set():
            write(gallery, range(0, 100), vectors_ND)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        return milliseconds(search)
    finally:
        ended.set()
        writer.join()


def measure(rows: int) -> dict[str, Any]:
    """Return all figures of a gallery of a size."""
    figures: dict[str, Any] = {"rows": rows, "dim": DIM}
    with filled(rows, exact_limit=rows) as (gallery, vectors_ND, rate):
        figures["ingest_rows_per_s"] = round(rate)
        queries, camera = queries_of(vectors_ND), Where(cameras=frozenset(("7",)))
        started = time.perf_counter()
        exact = Searcher(gallery, GallerySection(exact_limit=rows))
        figures["load_into_memory_s"] = round(time.perf_counter() - started, 1)
        figures["numpy_flat_ms"] = milliseconds(numpy_flat(vectors_ND.numpy(), queries))
        figures["exact_ms"] = milliseconds(searched(exact, queries))
        figures["exact_camera_ms"] = milliseconds(searched(exact, queries, camera))
        figures["exact_16_clients"] = together(searched(exact, queries))
        del exact
        started = time.perf_counter()
        gallery.build_index(workers=os.cpu_count() or 1)
        figures["index_build_s"] = round(time.perf_counter() - started, 1)
        indexed = Searcher(gallery, GallerySection(exact_limit=0))
        figures["pgvector_alone_ms"] = milliseconds(pgvector_alone(gallery, queries))
        figures["index_ms"] = milliseconds(searched(indexed, queries))
        figures["index_camera_ms"] = milliseconds(searched(indexed, queries, camera))
        figures["index_16_clients"] = together(searched(indexed, queries))
        figures["index_during_writes_ms"] = while_written(gallery, vectors_ND, searched(indexed, queries))
        figures["recall_at_10"] = measure_recall(gallery, queries=QUERIES).recall["vector"]
        figures["upsert_one_ms"] = milliseconds(lambda number: write(gallery, range(number, number + 1), vectors_ND))
        last = rows // IDENTITIES - 1
        figures["erase_person_ms"] = milliseconds(lambda number: gallery.delete_person(str(last - number)))
        figures["bytes_per_row"] = round(gallery.describe().bytes / rows)
        figures["process_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return figures


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the gallery")
    figures = measure(parser.parse_args().rows)
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = {"date": date, "machine": machine(), "versions": versions(), **figures}
    with Path(RESULTS / "gallery.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
