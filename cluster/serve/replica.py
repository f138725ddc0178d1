"""The replica: the HTTP service and its `Backend` in one process.

The command `tvilfm serve` imports this module, so torch is imported only where a replica starts.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Histogram

from cluster.places.finished import FinishedRun
from cluster.serve.common import keep_going
from tvilfm.config import CaptionerSection, Config
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.store import Change, Unavailable
from tvilfm.service.backend import Busy, Result, Search
from tvilfm.service.key_checker import KeyChecker
from tvilfm.service.keys import key_store
from tvilfm.service.messages import ModelFacts, Status

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tvilfm.data.images import Pixels
    from tvilfm.retrieval.query import Query

RETENTION_S = 3600.0  # interval of the deletion of expired rows
BOUNDARIES_S = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]


class Replica:
    """Replica that answers whole requests.

    Args:
        config: sections `serve`, `gallery` and `cluster`.
        facts: facts about the model.
        run: the run whose model is served.
        captioner: see `application.filter_captioner`.
        encoder: encoders that all replicas share; None = this process encodes.
        shards: searchers that each hold a share of the rows; none = this process searches.
    """

    def __init__(
        self,
        config: Config,
        facts: ModelFacts,
        run: FinishedRun,
        captioner: CaptionerSection | None,
        encoder: DeploymentHandle[Any] | None = None,
        shards: Sequence[DeploymentHandle[Any]] = (),
    ) -> None:
        from cluster.serve.encoder import Encoder
        from cluster.serve.metrics import Watch
        from cluster.serve.pipeline import Pipeline
        from cluster.serve.remote import RemoteEncoder, Shards
        from cluster.serve.searcher import GallerySearcher

        self._config = config
        self.facts = facts
        self._gallery = Gallery.open(config.gallery_url, section=config.gallery, space_id=facts.space_id)
        self._encoder = Encoder(config, run, facts.space_id, captioner) if encoder is None else RemoteEncoder(encoder)
        local = None if shards else GallerySearcher(config, self._gallery)
        self._searcher = Shards(shards) if local is None else local
        self._pipeline = Pipeline(self._encoder, self._searcher, self._gallery, config.serve, self._observe)
        Watch(self._gallery.database, None if local is None else local.searcher)
        self._under_way = 0
        threading.Thread(target=self._expire, daemon=True).start()
        self._seconds = Histogram(
            "tvilfm_stage_seconds",
            "Duration of a stage of a request or a batch, in seconds.",
            BOUNDARIES_S,
            tag_keys=("stage",),
        )
        self._refusals = Counter("tvilfm_refused", "Requests that a replica could not accept.", tag_keys=("why",))

    def __serve_build_asgi_app__(self) -> FastAPI:
        from tvilfm.service.app import create_app

        config, checker = self._config, None
        if config.serve.keys is not None:
            checker = KeyChecker(key_store(config.serve.keys, self._gallery.database), self._gallery.database)
            checker.follow()
        return create_app(
            self,
            config.serve,
            thumbnail_height=config.gallery.thumbnail_height,
            checker=checker,
            observe=self._observe,
        )

    async def encode_visible(self, pictures: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        with self._place():
            return await self._encoder.encode_visible(pictures)

    async def caption(self, picture: Pixels) -> str:
        with self._place():
            return await self._encoder.caption(picture)

    async def like(self, id: str) -> Query | None:
        from tvilfm.retrieval.query import query_like

        return await asyncio.to_thread(query_like, self._gallery, id)

    async def search(self, searches: Sequence[Search]) -> list[Result]:
        with self._place():
            return await self._pipeline.answer(searches)

    async def upsert(self, rows: pa.Table, *, space_id: str, by: str | None) -> Change:
        return await asyncio.to_thread(self._gallery.upsert, rows, space_id=space_id, by=by)

    async def delete(self, ids: Sequence[str], *, by: str | None) -> Change:
        return await asyncio.to_thread(self._gallery.delete, ids, by=by)

    async def delete_person(self, pid: str, *, by: str | None) -> Change:
        return await asyncio.to_thread(self._gallery.delete_person, pid, by=by)

    async def picture(self, id: str) -> bytes | None:
        picture = await asyncio.to_thread(self._gallery.picture, id)
        return None if picture is None else picture[1]

    async def ready(self) -> None:
        with self._place():
            database = asyncio.to_thread(self._gallery.snapshot)
            await asyncio.gather(self._encoder.ready(), self._searcher.ready(), database)

    async def status(self) -> Status:
        with self._place():
            return Status(**dict(self.facts), **await self._searcher.facts())

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Count a request that is being worked on, and the requests that are refused."""
        limit = self._config.serve.max_queued
        self._under_way += 1
        try:
            if self._under_way > limit:
                raise Busy(f"service: expected at most {limit} requests at once, got one more. Retry later.")
            yield
        except (Busy, Unavailable) as error:
            self._refusals.inc(tags={"why": "busy" if isinstance(error, Busy) else "unavailable"})
            raise
        finally:
            self._under_way -= 1

    def _observe(self, stage: str, seconds: float) -> None:
        self._seconds.observe(seconds, tags={"stage": stage})

    def _expire(self) -> None:
        """Delete what is older than the retention allows, at the start and then each hour."""
        section = self._config.serve
        while True:
            with keep_going("expired rows could not be removed"):
                self._gallery.expire(rows_days=section.retention_days, audit_days=section.audit_days)
            time.sleep(RETENTION_S)
