"""Parts of the service in processes of their own: shared encoders, and shards of the gallery.

Each class has the interface of the part that a replica has in its own process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cluster.serve.common import PATIENCE_S
from cluster.serve.searcher import Group
from tvilfm.data.images import Pixels
from tvilfm.retrieval.query import Query, Question
from tvilfm.retrieval.search import Answer, merged
from tvilfm.retrieval.store import Unavailable
from tvilfm.service.backend import Busy
from tvilfm.terms import SearchKind

SLOWER: tuple[SearchKind, ...] = ("exact", "index", "scan")


class RemoteEncoder:
    """The encoders that all replicas share."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def encode(self, questions: Sequence[Question]) -> list[Query]:
        return await _call(self._handle.encode, questions)

    async def encode_visible(self, pictures: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        features: npt.NDArray[np.float32] = await _call(self._handle.encode_visible, pictures)
        return features

    async def caption(self, picture: Pixels) -> str:
        sentence: str = await _call(self._handle.caption, picture)
        return sentence

    async def ready(self) -> None:
        await _call(self._handle.ready)


class Shards:
    """Searchers that each hold a share of the rows."""

    def __init__(self, handles: Sequence[DeploymentHandle[Any]]) -> None:
        self._handles = handles

    async def search(self, group: Group) -> list[Answer]:
        shares = await asyncio.gather(*(_call(handle.search, group) for handle in self._handles))
        return [merged(parts, request) for parts, request in zip(zip(*shares, strict=True), group[1], strict=True)]

    async def facts(self) -> dict[str, Any]:
        every = await asyncio.gather(*(_call(handle.facts) for handle in self._handles))
        return every[0] | {
            "images": sum(facts["images"] for facts in every),
            "version": min(facts["version"] for facts in every),
            "search": max((facts["search"] for facts in every), key=SLOWER.index),
        }

    async def ready(self) -> None:
        await asyncio.gather(*(_call(handle.ready) for handle in self._handles))


async def _call(method: DeploymentHandle[Any], *arguments: Any) -> Any:
    """Call a replica and return its result. Retry once if it dies or the timeout passes."""
    for last in (False, True):
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await method.remote(*arguments)
        except BackPressureError:
            raise Busy("service: expected room for one more request, got a full queue. Retry later.") from None
        except (RayActorError, ObjectLostError, DeploymentUnavailableError, TimeoutError):
            if last:
                raise Unavailable("service: expected an answer, got none while a replica is replaced. Retry.") from None
        except RayTaskError as error:
            if isinstance(error.cause, (ValueError, Unavailable)):
                raise error.cause from None
            raise
