"""The searcher replica: hold the whole gallery in memory and follow the changes of its writer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow.compute as pc
from ray import serve

from cluster.serve.replicas import T, in_batches, keep_going
from tvilfm.config import Config
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.query import Query
from tvilfm.retrieval.search import Answer, Request, Searcher


class SearcherReplica:
    """Replica that holds the gallery in memory and follows the changes of its writer."""

    def __init__(self, config: Config, space: str) -> None:
        gallery = Gallery.open(config.gallery_uri, space_id=space)
        device = "cuda" if config.serve.searcher_gpus > 0 else "cpu"
        self._gallery = gallery
        self._searcher = Searcher(gallery, config.gallery, device=device)
        self._batch = config.serve.batch
        self._lock = threading.Lock()  # one refresh at a time; searches continue meanwhile
        self.search.set_max_batch_size(config.serve.batch)  # type: ignore[attr-defined]
        self.search.set_batch_wait_timeout_s(config.serve.batch_wait_ms / 1000)  # type: ignore[attr-defined]
        threading.Thread(target=self._follow, args=(config.serve.follow_s,), daemon=True).start()

    @serve.batch
    async def search(self, groups: list[tuple[Sequence[Query], Sequence[Request], int]]) -> list[list[Answer]]:
        """Search with the queries of several requests, in a gallery at least as new as the minimum version of each."""
        queries = [query for group in groups for query in group[0]]
        requests = [request for group in groups for request in group[1]]
        answers = iter(await asyncio.to_thread(self._search, queries, requests, max(group[2] for group in groups)))
        return [[next(answers) for _ in group[0]] for group in groups]

    async def picture(self, id: str) -> bytes | None:
        """Return the thumbnail of a row."""
        picture = await asyncio.to_thread(self._gallery.picture, id)
        return None if picture is None else picture[1]

    async def facts(self) -> dict[str, Any]:
        """Return the fields of `Status` that describe the gallery."""
        return await asyncio.to_thread(self._facts)

    async def ready(self) -> None:
        """Return once a replica is ready."""

    def _search(self, queries: Sequence[Query], requests: Sequence[Request], min_version: int) -> list[Answer]:
        if self._searcher.gallery.version < min_version:
            self._refresh()
        return self._read(lambda: in_batches(self._searcher.search, self._batch, queries, requests))

    def _facts(self) -> dict[str, Any]:
        return self._read(self._facts_of_version)

    def _facts_of_version(self) -> dict[str, Any]:
        searched = self._searcher.gallery
        cameras = pc.unique(searched.load(None, ["camid"])["camid"]).to_pylist()
        return {
            "images": len(searched),
            "version": searched.version,
            "search": self._searcher.kind,
            "cameras": sorted(cameras),
            "gallery_in_use": searched.in_use,
        }

    def _read(self, read: Callable[[], T]) -> T:
        """Read from the current version or, on failure, from a newer one: compaction deletes files of old versions."""
        version = self._searcher.gallery.version
        try:
            return read()
        except Exception:
            self._refresh()
            if self._searcher.gallery.version == version:
                raise
            return read()

    def _refresh(self) -> None:
        with self._lock:
            self._searcher.refresh()

    def _follow(self, every_s: float) -> None:
        while True:
            time.sleep(every_s)
            with keep_going("the gallery could not be read"):  # until it can, the loaded version is searched
                self._refresh()
