"""The ingress replica: the HTTP service, and the `Backend` that calls the other replicas."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from fastapi import FastAPI
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Histogram

from cluster.serve.replicas import PATIENCE_S, keep_going
from tvilfm.config import Config
from tvilfm.data.images import Pixels
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.query import Query, Question
from tvilfm.retrieval.search import Answer, Request
from tvilfm.retrieval.store import Change, Unavailable
from tvilfm.service.app import create_app
from tvilfm.service.backend import Busy
from tvilfm.service.messages import ModelFacts, Status

RETENTION_S = 3600.0  # interval of the deletion of expired rows
BOUNDARIES_S = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]


class Ingress:
    """Replica that is the HTTP service and its `Backend`."""

    def __init__(
        self,
        config: Config,
        facts: ModelFacts,
        encoder: DeploymentHandle[Any],
        searcher: DeploymentHandle[Any],
    ) -> None:
        self._config = config
        self._encoder, self._searcher = encoder, searcher
        self.facts = facts
        self._gallery = Gallery.open(config.gallery_url, space_id=facts.space_id)
        threading.Thread(target=self._expire, daemon=True).start()
        self._seconds = Histogram(
            "tvilfm_stage_seconds", "Duration of a stage of a request, in seconds.", BOUNDARIES_S, tag_keys=("stage",)
        )
        self._refusals = Counter("tvilfm_refused", "Requests that a replica could not accept.", tag_keys=("why",))

    def __serve_build_asgi_app__(self) -> FastAPI:
        config = self._config
        return create_app(
            self,
            config.serve,
            thumbnail_height=config.gallery.thumbnail_height,
            observe=lambda stage, seconds: self._seconds.observe(seconds, tags={"stage": stage}),
        )

    async def encode(self, questions: Sequence[Question]) -> list[Query]:
        return await self._call(self._encoder.encode, questions)

    async def encode_visible(self, pictures: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        features: npt.NDArray[np.float32] = await self._call(self._encoder.encode_visible, pictures)
        return features

    async def search(
        self, queries: Sequence[Query], requests: Sequence[Request], *, min_version: int = 0
    ) -> list[Answer]:
        return await self._call(self._searcher.search, (queries, requests, min_version))

    async def upsert(self, rows: pa.Table, *, space_id: str, by: str | None) -> Change:
        return await asyncio.to_thread(self._gallery.upsert, rows, space_id=space_id, by=by)

    async def delete(self, ids: Sequence[str], *, by: str | None) -> Change:
        return await asyncio.to_thread(self._gallery.delete, ids, by=by)

    async def delete_person(self, pid: int, *, by: str | None) -> Change:
        return await asyncio.to_thread(self._gallery.delete_person, pid, by=by)

    async def note_searches(self, answers: Sequence[Answer], *, by: str | None) -> None:
        entries = [(answer.version, [hit.id for hit in answer.hits]) for answer in answers]
        await asyncio.to_thread(self._gallery.note, "search", entries, by=by)

    async def picture(self, id: str) -> bytes | None:
        picture = await asyncio.to_thread(self._gallery.picture, id)
        return None if picture is None else picture[1]

    async def ready(self) -> None:
        parts = (self._call(part.ready) for part in (self._encoder, self._searcher))
        await asyncio.gather(*parts, asyncio.to_thread(self._gallery.snapshot))

    async def status(self) -> Status:
        return Status(**dict(self.facts), **await self._call(self._searcher.facts))

    def _expire(self) -> None:
        """Delete what is older than the retention allows, at the start and then each hour."""
        section = self._config.serve
        while True:
            with keep_going("expired rows could not be removed"):
                self._gallery.expire(rows_days=section.retention_days, audit_days=section.audit_days)
            time.sleep(RETENTION_S)

    async def _call(self, method: DeploymentHandle[Any], *arguments: Any) -> Any:
        """Call a replica and return its result. Retry once if it dies or the timeout passes."""
        for last in (False, True):
            try:
                async with asyncio.timeout(PATIENCE_S):
                    return await method.remote(*arguments)
            except BackPressureError:
                self._refusals.inc(tags={"why": "busy"})
                raise Busy("service: expected room for one more request, got a full queue. Retry later.") from None
            except (RayActorError, ObjectLostError, DeploymentUnavailableError, TimeoutError):
                if last:
                    self._refusals.inc(tags={"why": "unavailable"})
                    raise Unavailable(
                        "service: expected an answer, got none while a replica is replaced. Retry."
                    ) from None
            except RayTaskError as error:
                if isinstance(error.cause, Unavailable):
                    self._refusals.inc(tags={"why": "unavailable"})
                if isinstance(error.cause, (ValueError, Unavailable)):
                    raise error.cause from None
                raise
