"""Search the gallery: hold it, or a share of it, in memory, and follow the database."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection, Sequence
from typing import Any

from cluster.serve.batching import Batcher, in_model_thread
from cluster.serve.common import in_batches, keep_going
from cluster.serve.metrics import Watch
from tvilfm.config import Config
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.query import Query
from tvilfm.retrieval.search import Answer, Request, Searcher
from tvilfm.retrieval.store import Unavailable

# Queries, their search options, and the versions of the gallery that it must be at least as new as, if they exist.
Group = tuple[Sequence[Query], Sequence[Request], Collection[int]]
RETRY_S = 1.0  # after a failure of the database; until then, the loaded rows are searched


class GallerySearcher:
    """Searcher in a replica's process.

    Args:
        config: sections `gallery` and `serve`.
        gallery: the gallery of this process.
    """

    def __init__(self, config: Config, gallery: Gallery) -> None:
        self._gallery = gallery
        device = "cuda" if config.serve.searcher_gpus > 0 else "cpu"
        url = config.gallery.read_url
        replica = None if url is None else self._gallery.replica(url)
        self.searcher = Searcher(self._gallery, config.gallery, device=device, replica=replica)
        self._batch = config.serve.batch
        self._batched = Batcher(self._search_groups, size=config.serve.batch, shared=(Unavailable,))
        self._lock = threading.Lock()  # one refresh at a time; searches continue meanwhile
        threading.Thread(target=self._follow, args=(config.serve.follow_s,), daemon=True).start()

    async def search(self, group: Group) -> list[Answer]:
        """Search with the queries of a group, with those of other calls in one batch."""
        return await self._batched(group)

    async def _search_groups(self, groups: list[Group]) -> list[list[Answer]]:
        queries = [query for group in groups for query in group[0]]
        requests = [request for group in groups for request in group[1]]
        versions = {version for group in groups for version in group[2]}
        answers = iter(await in_model_thread(self._search, queries, requests, versions))
        return [[next(answers) for _ in group[0]] for group in groups]

    async def facts(self) -> dict[str, Any]:
        """Return the fields of `Status` that describe the gallery."""
        return await asyncio.to_thread(self._facts)

    async def ready(self) -> None:
        """Return once the rows are loaded."""

    def _search(self, queries: Sequence[Query], requests: Sequence[Request], versions: Collection[int]) -> list[Answer]:
        for primary in (False, True):
            if not all(self.searcher.snapshot.includes(version) for version in versions):
                self._refresh(primary=primary)
        return in_batches(self.searcher.search, self._batch, queries, requests)

    def _facts(self) -> dict[str, Any]:
        return {
            "images": self._gallery.count(),
            "version": self.searcher.snapshot.version,
            "search": self.searcher.kind,
            "cameras": self._gallery.cameras(),
            "gallery_in_use": self._gallery.in_use,
        }

    def _refresh(self, *, primary: bool = False) -> None:
        with self._lock:
            self.searcher.refresh(primary=primary)

    def _follow(self, every_s: float) -> None:
        while True:
            with keep_going("the gallery could not be read"):
                for _ in self._gallery.wait(every_s):
                    self._refresh()
            time.sleep(RETRY_S)


class Shard(GallerySearcher):
    """Searcher of a share of the rows, in a process of its own (`serve.shards`).

    Args:
        config: sections `gallery` and `serve`.
        space: space of the model that is served.
        number: number of the share.
    """

    def __init__(self, config: Config, space: str, number: int) -> None:
        share = (number, config.serve.shards)
        super().__init__(config, Gallery.open(config.gallery_url, section=config.gallery, space_id=space, share=share))
        Watch(self._gallery.database, self.searcher)
