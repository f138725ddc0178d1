"""The ingress replica: the HTTP service, and the `Backend` that calls the other replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from fastapi import FastAPI
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Histogram

from cluster.serve.replicas import PATIENCE_S
from tvilfm.config import Config
from tvilfm.data.images import Pixels
from tvilfm.retrieval.query import Query, Question
from tvilfm.retrieval.search import Answer, Request
from tvilfm.service.app import create_app
from tvilfm.service.audit import Audit
from tvilfm.service.backend import Busy, Change, Unavailable
from tvilfm.service.messages import ModelFacts, Status

BOUNDARIES_S = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]


class Ingress:
    """Replica that is the HTTP service and its `Backend`."""

    def __init__(
        self,
        config: Config,
        facts: ModelFacts,
        encoder: DeploymentHandle[Any],
        searcher: DeploymentHandle[Any],
        writer: DeploymentHandle[Any],
    ) -> None:
        self._config = config
        self._encoder, self._searcher, self._writer = encoder, searcher, writer
        self.facts = facts
        self._seconds = Histogram(
            "tvilfm_stage_seconds", "Duration of a stage of a request, in seconds.", BOUNDARIES_S, tag_keys=("stage",)
        )
        self._refusals = Counter("tvilfm_refused", "Requests that a replica could not accept.", tag_keys=("why",))

    def __serve_build_asgi_app__(self) -> FastAPI:
        config = self._config
        return create_app(
            self,
            config.serve,
            audit=Audit(config.audit_path, days=config.serve.audit_days),
            thumbnail_height=config.gallery.thumbnail_height,
            observe=lambda stage, seconds: self._seconds.observe(seconds, tags={"stage": stage}),
        )

    async def encode(self, questions: Sequence[Question]) -> list[Query]:
        return await self._call(self._encoder.encode, questions)

    async def encode_visible(self, pictures: Sequence[Pixels]) -> list[dict[str, Any]]:
        return await self._call(self._encoder.encode_visible, pictures)

    async def search(
        self, queries: Sequence[Query], requests: Sequence[Request], *, min_version: int = 0
    ) -> list[Answer]:
        return await self._call(self._searcher.search, (queries, requests, min_version))

    async def upsert(self, rows: pa.Table, *, space_id: str, by: str | None) -> Change:
        return await self._call(self._writer.upsert, rows, space_id, by)

    async def delete(self, ids: Sequence[str], *, by: str | None) -> Change:
        return await self._call(self._writer.delete, ids, by)

    async def delete_person(self, pid: int, *, by: str | None) -> Change:
        return await self._call(self._writer.delete_person, pid, by)

    async def compact(self, *, by: str | None) -> Change:
        return await self._call(self._writer.compact, by, patience_s=None)

    async def picture(self, id: str) -> bytes | None:
        return await self._call(self._searcher.picture, id)

    async def ready(self) -> None:
        await asyncio.gather(*(self._call(part.ready) for part in (self._encoder, self._searcher, self._writer)))

    async def status(self) -> Status:
        return Status(**dict(self.facts), **await self._call(self._searcher.facts))

    async def _call(self, method: DeploymentHandle[Any], *arguments: Any, patience_s: float | None = PATIENCE_S) -> Any:
        """Call a replica and return its result. Retry once if it dies or the timeout passes (None = no timeout)."""
        for last in (False, True):
            try:
                async with asyncio.timeout(patience_s):
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
