"""`exact_search`: a search of 100,000 x 2,048, against the bare matrix product with top-k in the same precision.

Ours is the whole search as the service asks it: two passes, camera filter, exact order of ties, shares, facts of the
hits. The baseline looks at the same matrix with `torch` alone. Both take turns; the ratio is that of the medians, and
the claim's is the worse of batch 1 and batch 32. Before anything is timed, both have to find the same rows.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.claim import Claim
from tvilfm.config import GallerySection
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.query import Query
from tvilfm.retrieval.rows import Where, vector_column
from tvilfm.retrieval.search import Request, Searcher

ROWS, DIM, K, REPEATS = 100_000, 2048, 20, 15
SPACE, WEIGHTS = "benchmark", {"infrared": 1.0, "text": 1.0, "fusion": 1.0}
MODALITIES = tuple(WEIGHTS)
GOAL = 1.3


def gallery_of(folder: str, vectors_GD: npt.NDArray[np.float32]) -> Gallery:
    """A gallery of six cameras on disk."""
    gallery = Gallery.prepare(str(Path(folder) / "gallery"), space_id=SPACE, dim=DIM)
    for start in range(0, len(vectors_GD), 10_000):
        part = vector_column(vectors_GD[start : start + 10_000])
        numbers = np.arange(start, start + len(part))
        columns = {"id": [f"row-{n}" for n in numbers], "vector": part, "vector_base": part, "camid": numbers % 6 + 1}
        gallery.upsert(pa.table({**columns, "pid": numbers // 20}), space_id=SPACE)
    gallery.publish()
    return gallery


def unit(generator: torch.Generator, rows: int) -> Tensor:
    return F.normalize(torch.randn(rows, DIM, generator=generator), dim=1)


def query_of(parts: dict[str, Tensor]) -> Query:
    return Query(parts=parts, base=False, space_id=SPACE, filter_text_source="given")


def exact_search() -> Claim:
    """Milliseconds a search, at batch 1 and batch 32."""
    generator = torch.Generator().manual_seed(0)
    vectors_GD = unit(generator, ROWS)
    with tempfile.TemporaryDirectory() as folder:
        searcher = Searcher(gallery_of(folder, vectors_GD.numpy()), GallerySection(exact_limit=ROWS))
        request = Request(weights=WEIGHTS, k=K, where=Where(exclude_cameras=frozenset((2,))))
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
