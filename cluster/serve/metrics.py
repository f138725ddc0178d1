"""Gauges for Prometheus: connections to the database, age of the searched copy, and a sample of the index's recall."""

from __future__ import annotations

import threading
import time

from ray.serve.metrics import Gauge

from cluster.serve.common import keep_going
from tvilfm.retrieval.database import Database
from tvilfm.retrieval.search import Searcher

WATCH_S = 5.0
RECALL_S = 600.0  # a sample of the recall reads every row of the gallery
TEXTS = {
    "pool_connections": "Connections of this process to the database.",
    "pool_waiting": "Threads of this process that wait for a connection to the database.",
    "copy_age_seconds": "Longest time for which a change of the gallery may be missing in the copy that is searched.",
    "recall": "Share of the 10 nearest images that the index found for a recent query.",
}


class Watch:
    """Set the gauges of a process, in a background thread.

    Args:
        database: connections of this process.
        searcher: searcher of this process; None = it has none.
    """

    def __init__(self, database: Database, searcher: Searcher | None) -> None:
        self._database, self._searcher = database, searcher
        self._gauges = {name: Gauge(f"tvilfm_{name}", text) for name, text in TEXTS.items()}
        threading.Thread(target=self._repeat, daemon=True).start()

    def _repeat(self) -> None:
        sampled_s = time.monotonic()
        while True:
            with keep_going("metrics could not be read"):
                self._set(**dict(zip(("pool_connections", "pool_waiting"), self._database.connections, strict=True)))
                if self._searcher is not None:
                    self._set(copy_age_seconds=self._searcher.age_s)
                    if time.monotonic() - sampled_s > RECALL_S:
                        sampled_s = time.monotonic()
                        self._set(recall=self._searcher.sample_recall())
            time.sleep(WATCH_S)

    def _set(self, **values: float | None) -> None:
        for name, value in values.items():
            if value is not None:
                self._gauges[name].set(value)
