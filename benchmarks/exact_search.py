"""`exact_search`: a search of 100,000 x 2,048, against the bare matrix product with top-k in the same precision.

Ours is the whole search as the service asks it: two passes, camera filter, exact order of ties, shares, facts of the
hits. The baseline looks at the same matrix with `torch` alone. Both take turns; the ratio is that of the medians, and
the claim's is the worse of batch 1 and batch 32. Before anything is timed, both have to find the same rows.
"""

from __future__ import annotations

import statistics
import time
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.claim import Claim
from tvilfm.config import GallerySection
from tvilfm.retrieval.query import Query
from tvilfm.retrieval.rows import TIME, Where, vector_column
from tvilfm.retrieval.search import Request, Searcher
from tvilfm.retrieval.store import Changes, GalleryStore, Snapshot

ROWS, DIM, K, REPEATS = 100_000, 2048, 20, 15
SPACE, WEIGHTS = "benchmark", {"infrared": 1.0, "text": 1.0, "fusion": 1.0}
MODALITIES = tuple(WEIGHTS)
GOAL = 1.3


class MemoryStore:
    """A gallery of six cameras without a database: what a searcher in memory reads of one."""

    space_id, dim = SPACE, DIM

    def __init__(self, vectors_GD: npt.NDArray[np.float32]) -> None:
        numbers = np.arange(len(vectors_GD))
        vectors = vector_column(vectors_GD)
        columns = {
            "id": [f"row-{n}" for n in numbers],
            "pid": [str(n // 20) for n in numbers],
            "camid": [str(n % 6 + 1) for n in numbers],
        }
        empty = {"time": pa.nulls(len(numbers), TIME), "image": pa.nulls(len(numbers), pa.string())}
        places = {"position": numbers, "stamp": numbers}
        self.rows = pa.table({**columns, **empty, **places, "vector": vectors, "vector_base": vectors})

    def check_space(self, space_id: str) -> None:
        assert space_id == SPACE

    def count(self, limit: int | None = None) -> int:
        return int(self.rows.num_rows)

    def snapshot(self) -> Snapshot:
        return Snapshot("1:1:")

    def changes(self, since: Snapshot | None) -> Changes:
        return Changes(snapshot=self.snapshot(), rows=self.rows, removed=np.array([], dtype=np.int64), complete=True)


def searcher_of(vectors_GD: npt.NDArray[np.float32]) -> Searcher:
    """Return a searcher that compares with every row."""
    return Searcher(cast(GalleryStore, MemoryStore(vectors_GD)), GallerySection(exact_limit=ROWS))


def unit(generator: torch.Generator, rows: int) -> Tensor:
    return F.normalize(torch.randn(rows, DIM, generator=generator), dim=1)


def query_of(parts: dict[str, Tensor]) -> Query:
    return Query(parts=parts, base=False, space_id=SPACE, filter_text_source="given")


def exact_search() -> Claim:
    """Milliseconds a search, at batch 1 and batch 32."""
    generator = torch.Generator().manual_seed(0)
    vectors_GD = unit(generator, ROWS)
    searcher = searcher_of(vectors_GD.numpy())
    request = Request(weights=WEIGHTS, k=K, where=Where(exclude_cameras=frozenset(("2",))))
    seconds: dict[str, list[float]] = {}
    ratios, figures = {}, {}
    for batch in (1, 32):
        parts = [dict(zip(MODALITIES, unit(generator, 3), strict=True)) for _ in range(batch)]
        summed_QD = torch.stack([torch.stack(list(one.values())).sum(dim=0) for one in parts])
        queries = [query_of(one) for one in parts]
        everywhere = searcher.search(queries, [Request(weights=WEIGHTS, k=K)] * batch)
        for answer, best in zip(everywhere, bare(summed_QD, vectors_GD), strict=True):
            assert [hit.id for hit in answer.hits] == [f"row-{row}" for row in best]
        seconds = {"ours": [], "bare": []}
        for _ in range(REPEATS):
            started = time.perf_counter()
            searcher.search(queries, [request] * batch)
            seconds["ours"].append(time.perf_counter() - started)
            started = time.perf_counter()
            bare(summed_QD, vectors_GD)
            seconds["bare"].append(time.perf_counter() - started)
        ours_s, bare_s = (statistics.median(seconds[name]) for name in ("ours", "bare"))
        ratios[batch] = ours_s / bare_s
        figures[batch] = (f"{1000 * ours_s:.0f} ms", f"{1000 * bare_s:.0f} ms")
    return Claim(
        name="exact_search",
        ratio=max(ratios.values()),
        goal=GOAL,
        higher_is_better=False,
        ours=f"{figures[1][0]} a query, {figures[32][0]} for 32 ({ratios[1]:.2f} and {ratios[32]:.2f} times)",
        baseline=f"{figures[1][1]} and {figures[32][1]} on {torch.get_num_threads()} threads",
    )


def bare(summed_QD: Tensor, vectors_GD: Tensor) -> list[list[int]]:
    """The product and its largest entries, and nothing else."""
    best: list[list[int]] = (summed_QD @ vectors_GD.T).topk(K, dim=1).indices.tolist()
    return best


CLAIMS = {"exact_search": exact_search}
