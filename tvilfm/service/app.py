"""The HTTP service: check API keys, validate requests, call a `Backend`, and map errors to status codes.

401: missing or wrong key. 403: key without the scope, or a page of another site. 409: conflict with the state of the
gallery. 413: body too large. 422: invalid request. 429: too many waiting requests, or too many with this key. 503: a
replica is being replaced. 429 and 503 have a Retry-After header.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from fastapi import Depends, FastAPI, HTTPException, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from tvilfm.config import ServeSection
from tvilfm.data.images import Pixels, thumbnail
from tvilfm.data.pixels import count_pixels, decode
from tvilfm.retrieval.query import Query, Question
from tvilfm.retrieval.rows import VECTORS, Where, row_schema
from tvilfm.retrieval.search import Request as SearchRequest
from tvilfm.retrieval.store import Change, Unavailable
from tvilfm.service import errors, messages
from tvilfm.service.access import BodyLimit, guarded, needs
from tvilfm.service.backend import Backend, Busy, Result, Search
from tvilfm.service.key_checker import KeyChecker
from tvilfm.service.keys import SCOPES
from tvilfm.service.messages import HEADER, Bulk, SearchAnswer, SearchBatch, SearchQuery, Status, Written

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MIN_SIDE = 8  # pixels; smaller images cannot show a person
ROOM = 8  # all running requests together may have this many times serve.max_pixels decoded, at three bytes per pixel
READY_S = 5.0
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "testserver")
# The page is a single file and only talks to its own origin.
CONTENT_SECURITY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": messages.Problem} for status in (401, 403, 404, 409, 413, 422, 429, 503)
}

# How a client searched, for the audit trail; never the image or the words.
AUDITED = {"k", "like", "cameras", "exclude_cameras", "since", "until", "by_identity", "min_score"}

T = TypeVar("T")
Observe = Callable[[str, float], None]


def create_app(
    backend: Backend,
    section: ServeSection,
    *,
    thumbnail_height: int,
    checker: KeyChecker | None = None,
    observe: Observe = lambda stage, seconds: None,
) -> FastAPI:
    """Return the service as an ASGI application.

    Args:
        backend: encodes, searches and writes.
        section: limits.
        thumbnail_height: height in pixels of the thumbnails that are stored with the vectors.
        checker: checks keys; None = every program on this machine may send requests, and others may not.
        observe: called with the name (decode, caption, encode, write) and the seconds of each finished stage.
    """
    app = FastAPI(
        title="TVI-LFM retrieval",
        description="Search for people seen by visible cameras, with an infrared image, a sentence, or both.",
        docs_url=None,  # FastAPI's documentation pages load scripts from other sites
        redoc_url=None,
    )
    handlers = _Handlers(backend, section, thumbnail_height, observe)
    read, write, admin = (guarded(needs(scope, checker)) for scope in SCOPES)
    documented = [] if checker is None else [Depends(APIKeyHeader(name=HEADER, auto_error=False))]

    def route(path: str, handler: Callable[..., Awaitable[Any]], method: str, who: type[APIRoute], **more: Any) -> None:
        more |= {"methods": [method], "dependencies": documented, "responses": PROBLEMS}
        app.router.add_api_route(path, handler, route_class_override=who, **more)

    route("/v1/search", handlers.search, "POST", read, response_model=SearchAnswer)
    route("/v1/search/batch", handlers.search_batch, "POST", read, response_model=messages.BatchAnswer)
    route("/v1/caption", handlers.caption, "POST", read, response_model=messages.Caption)
    route("/v1/status", handlers.status, "GET", read, response_model=Status)
    route("/v1/gallery/bulk", handlers.bulk, "POST", write, response_model=Written)
    route("/v1/people/{pid:path}", handlers.delete_person, "DELETE", admin, response_model=Written)
    route("/v1/gallery/{id:path}/image", handlers.picture, "GET", read, response_class=JPEGResponse)
    route("/v1/gallery/{id:path}", handlers.put, "PUT", write, response_model=Written)
    route("/v1/gallery/{id:path}", handlers.delete, "DELETE", write, response_model=Written)
    app.add_api_route("/healthz", healthz, methods=["GET"])
    app.add_api_route("/readyz", handlers.readyz, methods=["GET"], responses={503: PROBLEMS[503]})
    app.add_api_route("/", page, methods=["GET"], response_class=HTMLResponse, include_in_schema=False)

    app.add_exception_handler(RequestValidationError, errors.not_understood)
    app.add_exception_handler(StarletteHTTPException, errors.refused)
    app.add_exception_handler(Busy, partial(errors.try_again, 429))
    app.add_exception_handler(Unavailable, partial(errors.try_again, 503))
    app.add_exception_handler(Exception, errors.fault)
    app.add_middleware(BodyLimit, max_bytes=int(section.max_body_mb * 1e6))
    if checker is None:
        # Without keys, every program on this machine may send requests. This blocks pages in a browser on this machine
        # that reach the service under another host name (DNS rebinding).
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, section.host], www_redirect=False)
    return app


class JPEGResponse(Response):
    media_type = "image/jpeg"


class _Handlers:
    """Handlers of the routes."""

    def __init__(self, backend: Backend, section: ServeSection, thumbnail_height: int, observe: Observe) -> None:
        self._backend, self._section = backend, section
        self._thumbnail_height, self._observe = thumbnail_height, observe
        self._pixels = 0  # decoded by all running requests

    async def search(self, request: Request, query: SearchQuery) -> SearchAnswer:
        """Search for a person."""
        (answer,) = await self._answers(request, [query])
        return answer

    async def search_batch(self, request: Request, batch: SearchBatch) -> messages.BatchAnswer:
        """Search for several people; each answer equals that of a separate search."""
        self._check_count("queries", len(batch.queries))
        return messages.BatchAnswer(answers=await self._answers(request, batch.queries))

    async def caption(self, picture: messages.Picture) -> messages.Caption:
        """Describe an infrared image as the captioner does for a search without infrared_caption."""
        if not self._backend.facts.captioner:
            raise HTTPException(404, "caption: expected a service with a captioner, got one without (serve.captioner).")
        async with self._decoded([picture.image]) as (image,):
            assert image is not None
            return messages.Caption(caption=await self._timed("caption", self._backend.caption(image)))

    async def put(
        self,
        request: Request,
        id: Annotated[messages.RowId, Path()],
        row: messages.Row,
    ) -> Written:
        """Add an image to the gallery, or replace it. The response is sent once the image is on disk."""
        return await self._write_rows(request, [id], [row])

    async def bulk(self, request: Request, bulk: Bulk) -> Written:
        """Add or replace several images, all or none."""
        self._check_count("rows", len(bulk.rows))
        return await self._write_rows(request, [row.id for row in bulk.rows], bulk.rows)

    async def delete(self, request: Request, id: Annotated[messages.RowId, Path()]) -> Written:
        """Remove an image if it exists."""
        return _written(await self._timed("write", self._backend.delete([id], by=request.state.key)))

    async def delete_person(self, request: Request, pid: Annotated[messages.Person, Path()]) -> Written:
        """Remove all images of a person."""
        return _written(await self._timed("write", self._backend.delete_person(pid, by=request.state.key)))

    async def picture(self, id: Annotated[messages.RowId, Path()]) -> Response:
        """Return the thumbnail that is stored with a row."""
        content = await self._backend.picture(id)
        if content is None:
            raise HTTPException(404, f"id: expected a row with an image, got {id}.")
        return JPEGResponse(content, headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})

    async def status(self) -> Status:
        """Return the status of the model and the gallery."""
        return await self._backend.status()

    async def readyz(self) -> dict[str, str]:
        """Check that every replica of the service answers."""
        try:
            await asyncio.wait_for(self._backend.ready(), READY_S)
        except TimeoutError:
            raise Unavailable("service: expected an answer from every replica, got a timeout. Retry.") from None
        return {"status": "ready"}

    def _check_count(self, key: str, count: int) -> None:
        if count > self._section.max_batch:
            raise HTTPException(422, f"{key}: expected at most {self._section.max_batch}, got {count}. Send fewer.")

    async def _answers(self, request: Request, asked: Sequence[SearchQuery]) -> list[SearchAnswer]:
        if not self._backend.facts.text and any(query.sentence is not None for query in asked):
            raise HTTPException(422, "sentence: expected none, because the served model reads no text, got one.")
        liked = {query.like for query in asked if query.like is not None}
        similar = {id: await self._like(id) for id in liked}
        least = [self._min_scores(query) for query in asked]
        async with self._decoded([query.image for query in asked]) as images:
            searches = [
                Search(
                    asked=_question(query, image) if query.like is None else similar[query.like],
                    request=_request(query, self._backend.facts.weights),
                    min_version=query.min_version or 0,
                    min_score=score,
                    min_score_unfiltered=unfiltered,
                    facts=query.model_dump(mode="json", include=AUDITED, exclude_defaults=True),
                    by=request.state.key,
                )
                for query, image, (score, unfiltered) in zip(asked, images, least, strict=True)
            ]
            results = await self._backend.search(searches)
        for search, result in zip(searches, results, strict=True):
            if result.answer.version < search.min_version:
                raise HTTPException(
                    409, f"min_version: expected at most {result.answer.version}, the latest, got {search.min_version}."
                )
        return [_answer(search, result) for search, result in zip(searches, results, strict=True)]

    def _min_scores(self, asked: SearchQuery) -> tuple[float | None, float | None]:
        """Return the scores below which hits are left out, if fusion subtracts a filter text and if it does not."""
        wanted = self._section.min_score if asked.min_score is None else asked.min_score
        if wanted is None or wanted == "none":
            return None, None
        if wanted != "fitted":
            return wanted, wanted
        modalities, scores = _modalities(asked), self._backend.facts.min_scores
        if len(modalities) == 1:
            fitted = unfiltered = scores.get(modalities[0])
        elif asked.weights in (None, self._backend.facts.weights):
            fitted = scores.get("ensemble")
            unfiltered = scores.get("ensemble-unfiltered", fitted)
        else:  # other weights have other scores
            fitted = unfiltered = None
        if fitted is None and asked.min_score == "fitted":
            raise HTTPException(
                422,
                "min_score: expected a number, because this run has no fitted score for "
                f"{' + '.join(modalities)} with these weights, got fitted.",
            )
        return fitted, unfiltered

    async def _like(self, id: str) -> Query:
        query = await self._backend.like(id)
        if query is None:
            raise HTTPException(404, f"like: expected the id of a gallery image, got {id}.")
        return query

    @asynccontextmanager
    async def _decoded(self, contents: Sequence[bytes | None]) -> AsyncIterator[list[Pixels | None]]:
        """Decode the images of a request if the limit for all running requests allows it; else raise `Busy`."""
        started = time.perf_counter()
        pixels = await asyncio.to_thread(self._count, contents)
        if self._pixels + pixels > ROOM * self._section.max_pixels:
            raise Busy("service: expected room for the images of one more request, got none. Retry later.")
        self._pixels += pixels
        try:
            pictures = await asyncio.to_thread(self._decode, contents)
            self._observe("decode", time.perf_counter() - started)
            yield pictures
        finally:
            self._pixels -= pixels

    def _count(self, contents: Sequence[bytes | None]) -> int:
        """Return the number of pixels of all images, and check it against the limit per request.

        The size of the files says little: a small file may decode to a large image.
        """
        limit = self._section.max_pixels
        try:
            total = sum(count_pixels(content, name="image", formats=FORMATS) for content in contents if content)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        if total > limit:
            raise HTTPException(
                422,
                f"image: expected at most {limit} pixels in the images of a request, got {total}. Send smaller "
                "images, or fewer per request.",
            )
        return total

    def _decode(self, contents: Sequence[bytes | None]) -> list[Pixels | None]:
        picture = partial(
            decode,
            height=None,
            width=None,
            name="image",
            max_pixels=self._section.max_pixels,
            min_side=MIN_SIDE,
            formats=FORMATS,
            depth_range=self._backend.facts.depth_range,
        )
        try:
            return [picture(content) if content else None for content in contents]
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

    def _thumbnails(self, pictures: Sequence[Pixels | None]) -> list[bytes | None]:
        height = self._thumbnail_height
        return [None if picture is None else thumbnail(picture, height=height) for picture in pictures]

    async def _encoded_rows(
        self, rows: Sequence[messages.Row]
    ) -> tuple[list[npt.NDArray[np.float32] | None], list[bytes | None]]:
        """Return the raw feature and the thumbnail of each row; None for rows that bring vectors."""
        async with self._decoded([row.image for row in rows]) as pictures:
            shown = [picture for picture in pictures if picture is not None]
            features = iter(await self._timed("encode", self._backend.encode_visible(shown)) if shown else ())
            thumbnails = await asyncio.to_thread(self._thumbnails, pictures)
        return [None if picture is None else next(features) for picture in pictures], thumbnails

    async def _write_rows(self, request: Request, ids: Sequence[str], rows: Sequence[messages.Row]) -> Written:
        facts = self._backend.facts
        for row in rows:
            if row.space_id not in (None, facts.space_id):
                raise HTTPException(
                    409, f"space_id: expected vectors of {facts.space_id}, got {row.space_id}. Send the image instead."
                )
            lengths = {len(vector) for vector in (row.vector, row.vector_base) if vector is not None}
            if lengths - {facts.dim}:
                raise HTTPException(
                    422, f"{', '.join(VECTORS)}: expected vectors of length {facts.dim}, got {sorted(lengths)}."
                )
        raw, thumbnails = await self._encoded_rows(rows)
        columns: dict[str, Any] = {"id": list(ids), "raw": raw, "thumbnail": thumbnails}
        columns |= {name: [getattr(row, name) for row in rows] for name in (*VECTORS, "pid", "camid", "time")}
        columns["image"] = [row.reference for row in rows]
        schema = row_schema(facts.dim, facts.width)
        table = pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema})
        try:
            writing = self._backend.upsert(table, space_id=facts.space_id, by=request.state.key)
            return _written(await self._timed("write", writing))
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

    async def _timed(self, stage: str, work: Awaitable[T]) -> T:
        started = time.perf_counter()
        try:
            return await work
        finally:
            self._observe(stage, time.perf_counter() - started)


def _written(change: Change) -> Written:
    return Written(version=change.version, count=change.count)


def _request(query: SearchQuery, weights: messages.Weights) -> SearchRequest:
    return SearchRequest(
        weights=(query.weights or weights).model_dump(),
        k=query.k,
        where=Where(
            cameras=None if query.cameras is None else frozenset(query.cameras),
            exclude_cameras=frozenset(query.exclude_cameras),
            since=query.since,
            until=query.until,
        ),
        by_identity=query.by_identity,
    )


def _question(query: SearchQuery, image: Pixels | None) -> Question:
    return Question(infrared=image, sentence=query.sentence, infrared_caption=query.infrared_caption)


def _modalities(query: SearchQuery) -> tuple[str, ...]:
    """Return the modalities that a query will have; see `Query.parts`."""
    if query.like is not None:
        return ("visible",)
    if query.image is None or query.sentence is None:
        return ("text",) if query.image is None else ("infrared",)
    return ("infrared", "text", "fusion")


def _answer(search: Search, result: Result) -> SearchAnswer:
    query, weights = result.query, search.request.weights
    voted = query.parts if len(query.parts) == 1 else [name for name in query.parts if weights[name]]
    return SearchAnswer(
        hits=[messages.HitMessage.model_validate(hit) for hit in result.answer.hits],
        version=result.answer.version,
        modalities=list(voted),
        filter_text=query.filter_text_source,
        infrared_caption=query.filter_text,
        min_score=result.min_score,
        left_out=result.left_out,
        sentence_cut=query.sentence_cut,
    )


async def healthz() -> dict[str, str]:
    """Check that the service is up."""
    return {"status": "up"}


async def page() -> HTMLResponse:
    """Return the search page."""
    content = files("tvilfm.service").joinpath("page.html").read_text()
    headers = {"Content-Security-Policy": CONTENT_SECURITY, "Referrer-Policy": "no-referrer"}
    return HTMLResponse(content, headers=headers)
