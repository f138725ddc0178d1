"""Errors as responses: `{"error": "..."}` with a status code."""

from __future__ import annotations

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from tvilfm.service.messages import RETRY_S


def problem(status: int, error: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": error}, status_code=status, headers=headers)


async def not_understood(request: Request, error: Exception) -> Response:
    """Describe validation errors without the invalid input, which may be large or an image of a person."""
    assert isinstance(error, RequestValidationError)
    faults = []
    for fault in error.errors()[:10]:
        where = ".".join(str(part) for part in fault["loc"] if part != "body") or "body"
        faults.append(f"{where}: {fault['msg']}")
    text = "; ".join(faults) + ". See /openapi.json."
    return problem(422, text.encode("utf-8", "replace").decode())


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return problem(error.status_code, str(error.detail), dict(error.headers or {}))


async def try_again(status: int, request: Request, error: Exception) -> Response:
    return problem(status, str(error), {"Retry-After": str(RETRY_S)})


async def fault(request: Request, error: Exception) -> Response:
    return problem(500, "service: expected an answer, got an internal error. See the log of the service.")
