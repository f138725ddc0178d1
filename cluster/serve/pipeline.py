"""Answer the searches of several requests in one batch: encode, search, and add them to the audit trail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from cluster.serve.batching import Batcher, in_model_thread
from cluster.serve.encoder import Encoder
from cluster.serve.remote import RemoteEncoder, Shards
from cluster.serve.searcher import GallerySearcher
from tvilfm.config import ServeSection
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.query import Query, Question
from tvilfm.retrieval.store import Unavailable
from tvilfm.service.backend import Busy, Result, Search, entries_of


class Pipeline:
    """Searches of a replica.

    Args:
        encoder: in this process, or the encoders that replicas share.
        searcher: in this process, or the shards of the gallery.
        gallery: has the audit trail.
        section: size of a batch, and how long it waits for more searches.
        observe: called with the name (encode, search) and the seconds of each finished stage of a batch.
    """

    def __init__(
        self,
        encoder: Encoder | RemoteEncoder,
        searcher: GallerySearcher | Shards,
        gallery: Gallery,
        section: ServeSection,
        observe: Callable[[str, float], None],
    ) -> None:
        self._encoder, self._searcher, self._gallery, self._observe = encoder, searcher, gallery, observe
        self._batched = Batcher(
            self._answer, size=section.batch, wait_ms=section.batch_wait_ms, shared=(Busy, Unavailable)
        )

    async def answer(self, searches: Sequence[Search]) -> list[Result]:
        """Return the results of the searches of a request, after they were added to the audit trail."""
        return await self._batched(searches)

    async def _answer(self, groups: list[Sequence[Search]]) -> list[list[Result]]:
        searches = [search for group in groups for search in group]
        queries = await self._queries([search.asked for search in searches])
        with self._timed("search"):
            requests, versions = [one.request for one in searches], {one.min_version for one in searches}
            answers = await self._searcher.search((queries, requests, versions))
        rest = map(Result.of, searches, queries, answers)
        results = [[next(rest) for _ in group] for group in groups]
        entries = [entry for group, own in zip(groups, results, strict=True) for entry in entries_of(group, own)]
        await in_model_thread(self._gallery.note, entries)
        return results

    async def _queries(self, asked: Sequence[Question | Query]) -> list[Query]:
        questions = [one for one in asked if isinstance(one, Question)]
        with self._timed("encode"):
            encoded = iter(await self._encoder.encode(questions) if questions else ())
        return [next(encoded) if isinstance(one, Question) else one for one in asked]

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._observe(stage, time.perf_counter() - started)
