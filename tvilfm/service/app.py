"""The HTTP service: validates, checks who asks, hands the work to a `Backend`, and maps what goes wrong to a status.

401 no key or a wrong one, 403 a key without that scope or another site's page, 409 what does not fit the gallery as it
is, 413 a body that is too large, 422 what cannot be understood, 429 too many requests wait, 503 a part is being
replaced; the last two say when to try again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.resources import files
from typing import Annotated, Any, TypeVar

import numpy as np
import pyarrow as pa
from fastapi import Depends, FastAPI, HTTPException, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tvilfm.config import ServeSection
from tvilfm.data.images import Pixels, thumbnail
from tvilfm.data.pixels import count_pixels, decode
from tvilfm.retrieval import search
from tvilfm.retrieval.query import Query, Question
from tvilfm.retrieval.rows import Where, row_schema, vector_column
from tvilfm.retrieval.search import Answer
from tvilfm.service import keys, messages
from tvilfm.service.audit import Audit
from tvilfm.service.backend import Backend, Busy, Change, Unavailable
from tvilfm.service.messages import HEADER, RETRY_S, Bulk, SearchAnswer, SearchBatch, SearchQuery, Status, Written

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MIN_SIDE = 8  # pixels; what is smaller shows nobody
ROOM = 8  # times serve.max_pixels that all requests under way may have decoded, at three bytes a pixel
VECTORS = ("vector", "vector_base")
READY_S = 5.0
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "testserver")
# The page is one file of our own and talks to its own origin alone.
CONTENT_SECURITY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": messages.Problem} for status in (401, 403, 404, 409, 413, 422, 429, 503)
}

T = TypeVar("T")
Observe = Callable[[str, float], None]


def create_app(
    backend: Backend,
    section: ServeSection,
    *,
    audit: Audit,
    thumbnail_height: int,
    observe: Observe = lambda stage, seconds: None,
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        backend: who encodes, searches and writes.
        section: limits, and the file of keys.
        audit: where searches and writes are noted down.
        thumbnail_height: pixels of the pictures that are kept with the vectors.
        observe: told of every stage (decode, encode, search, write) and its seconds.
    """
    app = FastAPI(
        title="TVI-LFM retrieval",
        description="Find people that visible cameras saw by an infrared picture, a sentence, or both.",
        docs_url=None,  # they load their scripts from elsewhere
        redoc_url=None,
    )
    handlers = _Handlers(backend, section, audit, thumbnail_height, observe)
    key_file = None if section.keys is None else keys.KeyFile(section.keys)
    read, write, admin = (_guarded(_needs(scope, key_file)) for scope in keys.SCOPES)
    documented = [] if key_file is None else [Depends(APIKeyHeader(name=HEADER, auto_error=False))]

    def route(path: str, handler: Callable[..., Awaitable[Any]], method: str, who: type[APIRoute], **more: Any) -> None:
        more |= {"methods": [method], "dependencies": documented, "responses": PROBLEMS}
        app.router.add_api_route(path, handler, route_class_override=who, **more)

    route("/v1/search", handlers.search, "POST", read, response_model=SearchAnswer)
    route("/v1/search/batch", handlers.search_batch, "POST", read, response_model=messages.BatchAnswer)
    route("/v1/status", handlers.status, "GET", read, response_model=Status)
    route("/v1/gallery/bulk", handlers.bulk, "POST", write, response_model=Written)
    route("/v1/gallery/compact", handlers.compact, "POST", admin, response_model=Written)
    route("/v1/people/{pid}", handlers.delete_person, "DELETE", admin, response_model=Written)
    route("/v1/gallery/{id:path}/image", handlers.picture, "GET", read, response_class=JPEGResponse)
    route("/v1/gallery/{id:path}", handlers.put, "PUT", write, response_model=Written)
    route("/v1/gallery/{id:path}", handlers.delete, "DELETE", write, response_model=Written)
    app.add_api_route("/healthz", healthz, methods=["GET"])
    app.add_api_route("/readyz", handlers.readyz, methods=["GET"], responses={503: PROBLEMS[503]})
    app.add_api_route("/", page, methods=["GET"], response_class=HTMLResponse, include_in_schema=False)

    app.add_exception_handler(RequestValidationError, _not_understood)
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.add_exception_handler(Busy, partial(_try_again, 429))
    app.add_exception_handler(Unavailable, partial(_try_again, 503))
    app.add_exception_handler(Exception, _fault)
    app.add_middleware(_BodyLimit, max_bytes=int(section.max_body_mb * 1e6))
    if key_file is None:
        # Without keys every program of this machine may ask; a page in its browser, by a name of its own, may not.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, section.host], www_redirect=False)
    return app


class JPEGResponse(Response):
    media_type = "image/jpeg"


class _Handlers:
    """What the routes do."""

    def __init__(
        self, backend: Backend, section: ServeSection, audit: Audit, thumbnail_height: int, observe: Observe
    ) -> None:
        self._backend, self._section, self._audit = backend, section, audit
        self._thumbnail_height, self._observe = thumbnail_height, observe
        self._pixels = 0  # of the requests under way

    async def search(self, request: Request, query: SearchQuery) -> SearchAnswer:
        """Find a person."""
        (answer,) = await self._answers(request, [query])
        return answer

    async def search_batch(self, request: Request, batch: SearchBatch) -> messages.BatchAnswer:
        """Find several people; each answer is that of a search of its own."""
        self._check_count("queries", len(batch.queries))
        return messages.BatchAnswer(answers=await self._answers(request, batch.queries))

    async def put(
        self,
        request: Request,
        id: Annotated[messages.RowId, Path()],
        row: messages.Row,
    ) -> Written:
        """Add a picture to the gallery, or replace it. The answer comes when it is on disk."""
        return await self._write_rows(request, [id], [row])

    async def bulk(self, request: Request, bulk: Bulk) -> Written:
        """Add or replace pictures, all or none."""
        self._check_count("rows", len(bulk.rows))
        return await self._write_rows(request, [row.id for row in bulk.rows], bulk.rows)

    async def delete(self, request: Request, id: Annotated[messages.RowId, Path()]) -> Written:
        """Remove a picture, if it is there; it stays in earlier versions until the gallery is compacted."""
        return _written(await self._timed("write", self._backend.delete([id], by=request.state.key)))

    async def delete_person(self, request: Request, pid: Annotated[messages.Person, Path()]) -> Written:
        """Remove every picture of a person; they stay in earlier versions until the gallery is compacted."""
        return _written(await self._timed("write", self._backend.delete_person(pid, by=request.state.key)))

    async def compact(self, request: Request) -> Written:
        """Remove from disk, and so from every version, whatever was deleted."""
        try:
            return _written(await self._timed("write", self._backend.compact(by=request.state.key)))
        except ValueError as error:
            raise HTTPException(409, str(error)) from None

    async def picture(self, id: Annotated[messages.RowId, Path()]) -> Response:
        """The small picture that is kept with a row."""
        found = await self._backend.picture(id)
        if found is None:
            raise HTTPException(404, f"id: expected a row with a picture, got {id}.")
        return JPEGResponse(found, headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})

    async def status(self) -> Status:
        """What is served."""
        return await self._backend.status()

    async def readyz(self) -> dict[str, str]:
        """Whether every part of the service answers."""
        try:
            await asyncio.wait_for(self._backend.ready(), READY_S)
        except TimeoutError:
            raise Unavailable("service: expected an answer of every part, got none in time") from None
        return {"status": "ready"}

    def _check_count(self, key: str, count: int) -> None:
        if count > self._section.max_batch:
            raise HTTPException(422, f"{key}: expected at most {self._section.max_batch}, got {count}. Send fewer.")

    async def _answers(self, request: Request, asked: Sequence[SearchQuery]) -> list[SearchAnswer]:
        if not self._backend.facts.text and any(query.sentence is not None for query in asked):
            raise HTTPException(422, "sentence: expected none, as the model that is served reads no text.")
        queries = await self._encoded(asked)
        requests = [_request(query, self._backend.facts.weights) for query in asked]
        min_version = max(query.min_version or 0 for query in asked)
        searching = self._backend.search(queries, requests, min_version=min_version)
        answers = await self._timed("search", searching)
        for query, answer in zip(asked, answers, strict=True):
            if answer.version < (query.min_version or 0):
                raise HTTPException(
                    409, f"min_version: expected at most {answer.version}, the newest, got {query.min_version}."
                )
        await asyncio.to_thread(self._note, request.state.key, answers)
        return [_answer(query, answer, own) for query, answer, own in zip(queries, answers, requests, strict=True)]

    def _note(self, key: str | None, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self._audit.note("search", key=key, version=answer.version, ids=[hit.id for hit in answer.hits])

    async def _encoded(self, asked: Sequence[SearchQuery]) -> list[Query]:
        async with self._decoded([query.image for query in asked]) as images:
            questions = [
                Question(infrared=image, sentence=query.sentence, infrared_caption=query.infrared_caption)
                for query, image in zip(asked, images, strict=True)
            ]
            return await self._timed("encode", self._backend.encode(questions))

    @asynccontextmanager
    async def _decoded(self, contents: Sequence[bytes | None]) -> AsyncIterator[list[Pixels | None]]:
        """The pictures of a request, if there is room for them beside those of the others."""
        started = time.perf_counter()
        pixels = await asyncio.to_thread(self._count, contents)
        if self._pixels + pixels > ROOM * self._section.max_pixels:
            raise Busy("service: expected room for the pictures of one more request, got none")
        self._pixels += pixels
        try:
            pictures = await asyncio.to_thread(self._decode, contents)
            self._observe("decode", time.perf_counter() - started)
            yield pictures
        finally:
            self._pixels -= pixels

    def _count(self, contents: Sequence[bytes | None]) -> int:
        """Pixels of all pictures: a flat one of few bytes may be large, and all of a request are in memory at once."""
        limit = self._section.max_pixels
        try:
            total = sum(count_pixels(content, name="image", formats=FORMATS) for content in contents if content)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        if total > limit:
            raise HTTPException(
                422,
                f"image: expected at most {limit} pixels in the pictures of a request, got {total}. Send smaller "
                "pictures, or fewer at once.",
            )
        return total

    def _decode(self, contents: Sequence[bytes | None]) -> list[Pixels | None]:
        limits = {"max_pixels": self._section.max_pixels, "min_side": MIN_SIDE, "formats": FORMATS}
        try:
            return [
                decode(content, height=None, width=None, name="image", **limits) if content else None  # type: ignore[arg-type]
                for content in contents
            ]
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

    def _thumbnails(self, pictures: Sequence[Pixels | None]) -> list[bytes | None]:
        height = self._thumbnail_height
        return [None if picture is None else thumbnail(picture, height=height) for picture in pictures]

    async def _encoded_rows(self, rows: Sequence[messages.Row]) -> tuple[list[dict[str, Any]], list[bytes | None]]:
        async with self._decoded([row.image for row in rows]) as pictures:
            shown = [picture for picture in pictures if picture is not None]
            encoded = iter(await self._timed("encode", self._backend.encode_visible(shown)) if shown else ())
            thumbnails = await asyncio.to_thread(self._thumbnails, pictures)
        vectors = [
            {name: getattr(row, name) for name in VECTORS} if thumbnail is None else next(encoded)
            for row, thumbnail in zip(rows, thumbnails, strict=True)
        ]
        return vectors, thumbnails

    async def _write_rows(self, request: Request, ids: Sequence[str], rows: Sequence[messages.Row]) -> Written:
        space = self._backend.facts.space_id
        for row in rows:
            if row.space_id not in (None, space):
                raise HTTPException(
                    409, f"space_id: expected vectors of {space}, got {row.space_id}. Send the picture."
                )
        vectors, thumbnails = await self._encoded_rows(rows)
        dims = {len(one[name]) for one in vectors for name in VECTORS}
        if len(dims) > 1 or 0 in dims:
            raise HTTPException(422, f"{', '.join(VECTORS)}: expected vectors of one length, got {sorted(dims)}.")
        columns: dict[str, Any] = {}
        for name in VECTORS:
            columns[name] = vector_column(np.stack([np.asarray(one[name], dtype=np.float32) for one in vectors]))
        schema = row_schema(dims.pop())
        columns["id"] = list(ids)
        columns |= {name: [getattr(row, name) for row in rows] for name in ("pid", "camid", "time")}
        columns["image"] = [row.reference for row in rows]
        columns["thumbnail"] = thumbnails
        table = pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema})
        try:
            writing = self._backend.upsert(table, space_id=space, by=request.state.key)
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


def _request(query: SearchQuery, weights: messages.Weights) -> search.Request:
    return search.Request(
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


def _answer(query: Query, answer: search.Answer, asked: search.Request) -> SearchAnswer:
    voted = query.parts if len(query.parts) == 1 else [name for name in query.parts if asked.weights[name]]
    return SearchAnswer(
        hits=[messages.HitMessage(**vars(hit)) for hit in answer.hits],
        version=answer.version,
        modalities=list(voted),
        filter_text=query.filter_text_source,
    )


def _guarded(check: Callable[[Request], None]) -> type[APIRoute]:
    """A route that is checked before its body is read; FastAPI's dependencies come after that."""

    class Guarded(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def checked(request: Request) -> Response:
                await asyncio.to_thread(check, request)
                return await handle(request)

            return checked

    return Guarded


def _needs(scope: keys.Scope, key_file: keys.KeyFile | None) -> Callable[[Request], None]:
    """A check that lets nobody past without the right to do that."""
    if key_file is None:

        def anybody(request: Request) -> None:
            if request.method != "GET" and _is_of_another_site(request):
                raise HTTPException(403, "Origin: expected the service's own page or none, got another site's.")
            request.state.key = None

        return anybody

    def check(request: Request) -> None:
        token = request.headers.get(HEADER)
        key = key_file.find(token) if token else None
        if key is None:
            got = "a wrong one" if token else "none"
            raise HTTPException(401, f"{HEADER}: expected an API key, got {got}. Ask an operator for one.")
        if scope not in key.scopes:
            raise HTTPException(403, f"{HEADER}: expected a key with scope {scope}, got one with {list(key.scopes)}.")
        request.state.key = key.name

    return check


def _is_of_another_site(request: Request) -> bool:
    """Whether a browser says that another site's page asks; it asks for that page's user, who knows nothing of it."""
    origin, fetched = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site", "none")
    own = origin is None or origin.partition("://")[2] == request.headers.get("Host")
    return not own or fetched not in ("same-origin", "none")


async def healthz() -> dict[str, str]:
    """Whether the service is up."""
    return {"status": "up"}


async def page() -> HTMLResponse:
    """The page for people."""
    content = files("tvilfm.service").joinpath("page.html").read_text()
    headers = {"Content-Security-Policy": CONTENT_SECURITY, "Referrer-Policy": "no-referrer"}
    return HTMLResponse(content, headers=headers)


class _BodyLimit:
    """Refuses a body above a size before it is in memory, whether it says its length or not."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        length = 0
        with suppress(ValueError):
            length = int(told)
        if length > self._max:
            await _problem(413, self._told())(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max:
                raise HTTPException(413, self._told())
            return message

        await self._app(scope, counted, send)

    def _told(self) -> str:
        return f"body: expected at most {self._max} bytes, got more. Send smaller pictures, or fewer at once."


def _problem(status: int, error: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": error}, status_code=status, headers=headers)


async def _not_understood(request: Request, error: Exception) -> Response:
    """What was sent is not sent back: it may be large, or a person's picture."""
    assert isinstance(error, RequestValidationError)
    faults = []
    for fault in error.errors()[:10]:
        where = ".".join(str(part) for part in fault["loc"] if part != "body") or "body"
        faults.append(f"{where}: {fault['msg']}")
    text = "; ".join(faults) + ". See /openapi.json."
    return _problem(422, text.encode("utf-8", "replace").decode())


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return _problem(error.status_code, str(error.detail), dict(error.headers or {}))


async def _try_again(status: int, request: Request, error: Exception) -> Response:
    return _problem(status, f"{error}. Try again.", {"Retry-After": str(RETRY_S)})


async def _fault(request: Request, error: Exception) -> Response:
    return _problem(500, "service: a fault of ours; it stands in the log.")
