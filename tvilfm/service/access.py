"""Checks before a request reaches its handler: API key and scope, pages of other sites, and the size of the body."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tvilfm.service.errors import problem
from tvilfm.service.key_checker import KeyChecker
from tvilfm.service.keys import Scope as KeyScope
from tvilfm.service.messages import HEADER


def guarded(check: Callable[[Request], None]) -> type[APIRoute]:
    """Return a route class that runs `check` before the body is read. FastAPI runs dependencies only after that."""

    class Guarded(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def checked(request: Request) -> Response:
                check(request)
                return await handle(request)

            return checked

    return Guarded


def needs(scope: KeyScope, checker: KeyChecker | None) -> Callable[[Request], None]:
    """Return a check that rejects requests without the scope, and those above the limit of their key.

    Requests with GET do not count: a page gets a thumbnail with each.
    """
    if checker is None:

        def anybody(request: Request) -> None:
            if request.method != "GET" and _is_of_another_site(request):
                raise HTTPException(403, "Origin: expected the service's own page or none, got another site's.")
            request.state.key = None

        return anybody

    def check(request: Request) -> None:
        token = request.headers.get(HEADER)
        key = checker.find(token) if token else None
        if key is None:
            got = "a wrong or an expired one" if token else "none"
            raise HTTPException(401, f"{HEADER}: expected an API key, got {got}. Ask an operator for one.")
        if scope not in key.scopes:
            raise HTTPException(403, f"{HEADER}: expected a key with scope {scope}, got one with {list(key.scopes)}.")
        if request.method != "GET" and (wait_s := checker.wait_s(key)):
            raise HTTPException(
                429,
                f"{HEADER}: expected at most {key.per_minute} searches and writes in a minute, got more. Retry later.",
                {"Retry-After": str(wait_s)},
            )
        request.state.key = key.name

    return check


def _is_of_another_site(request: Request) -> bool:
    """Return whether the browser's headers say that a page of another site sent the request (cross-site forgery)."""
    origin, fetched = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site", "none")
    own = origin is None or origin.partition("://")[2] == request.headers.get("Host")
    return not own or fetched not in ("same-origin", "none")


class BodyLimit:
    """Reject a body above the size limit before it is in memory, with or without a Content-Length header."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        length = 0
        with suppress(ValueError):
            length = int(declared)
        if length > self._max:
            await problem(413, self._told())(scope, receive, send)
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
        return f"body: expected at most {self._max} bytes, got more. Send smaller images, or fewer per request."
