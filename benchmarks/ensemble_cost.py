"""`ensemble_cost`: a search with three modalities, against one with a single modality.

The three meet the gallery as one sum, so the search is the same; what is left is to say each one's share of the hits.
100,000 x 2,048, one query at a time, in turns; the ratio is that of the medians.
"""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.claim import Claim
from benchmarks.exact_search import MODALITIES, ROWS, WEIGHTS, K, query_of, searcher_of, unit
from tvilfm.retrieval.search import Request

REPEATS = 25
GOAL = 1.1


def ensemble_cost() -> Claim:
    """Milliseconds a search, both ways in turn."""
    generator = torch.Generator().manual_seed(0)
    request = Request(weights=WEIGHTS, k=K)
    searcher = searcher_of(unit(generator, ROWS).numpy())
    parts = dict(zip(MODALITIES, unit(generator, 3), strict=True))
    queries = {"three": query_of(parts), "one": query_of({"text": parts["text"]})}
    seconds: dict[str, list[float]] = {name: [] for name in queries}
    for _ in range(REPEATS + 1):
        for name, query in queries.items():
            started = time.perf_counter()
            searcher.search([query], [request])
            seconds[name].append(time.perf_counter() - started)
    three_s, one_s = (statistics.median(seconds[name][1:]) for name in ("three", "one"))
    return Claim(
        name="ensemble_cost",
        ratio=three_s / one_s,
        goal=GOAL,
        higher_is_better=False,
        ours=f"{1000 * three_s:.1f} ms for infrared, text and fusion with their shares",
        baseline=f"{1000 * one_s:.1f} ms for text alone, on {torch.get_num_threads()} threads",
    )


CLAIMS = {"ensemble_cost": ensemble_cost}
