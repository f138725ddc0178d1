"""A client of the retrieval service.

    with Client("http://127.0.0.1:8000", key="tvi_...") as client:
        answer = client.search(image=Path("query.jpg").read_bytes(), sentence="a woman in a red coat", k=5)
        print(answer.hits[0].id, answer.hits[0].shares)

The client retries a request if the service asks for it (429, 503) or did not answer. Repeating a request is safe,
because a write names the row that it writes. If the node that handles a request dies, the proxy in front of it answers
instead: Ray Serve's proxy with a bare 500, a load balancer with 502 or 504. The client retries these, too.
"""

from __future__ import annotations

import base64
import ssl
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from tvilfm.service.messages import HEADER, RETRY_S, BatchAnswer, SearchAnswer, Status, Written

AGAIN = (408, 429, 502, 503, 504)


class ServiceError(Exception):
    """The service returned an error; `status` is the HTTP status code."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Client:
    """Client of a retrieval service.

    Args:
        url: URL of the service.
        key: API key; None if the service requires none.
        retries: maximum number of retries per request.
        timeout_s: timeout of a request in seconds.
        verify: how to verify the service's certificate; for your own certificate, pass
            `ssl.create_default_context(cafile=...)`.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        retries: int = 2,
        timeout_s: float = 60.0,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self._retries = retries
        headers = {} if key is None else {HEADER: key}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, trust_env=False, verify=verify)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def search(self, *, image: bytes | None = None, sentence: str | None = None, **options: Any) -> SearchAnswer:
        """Search for a person.

        Args:
            image: infrared image, the content of a JPEG, PNG, WebP or BMP file.
            sentence: description of the person.
            options: other fields of `messages.SearchQuery`.

        Raises:
            ServiceError: the service returned an error.
            httpx.TransportError: the service did not answer, and the retries failed too.
        """
        return SearchAnswer.model_validate(self._post("/v1/search", as_json(image=image, sentence=sentence, **options)))

    def search_batch(self, queries: Sequence[Mapping[str, Any]]) -> list[SearchAnswer]:
        """Search for several people; each query is a `messages.SearchQuery`, converted with `as_json`."""
        response = self._post("/v1/search/batch", {"queries": [dict(one) for one in queries]})
        return BatchAnswer.model_validate(response).answers

    def put(self, id: str, *, image: bytes | None = None, camid: str | int, **facts: Any) -> Written:
        """Add an image to the gallery or replace it. It is on disk when this returns.

        Args:
            id: id of the row.
            image: visible image; None if `facts` has `vector`, `vector_base` and `space_id` instead.
            camid: camera; a number becomes its text.
            facts: other fields of `messages.Row`.
        """
        return Written.model_validate(self._call("PUT", _row_path(id), json=as_json(image=image, camid=camid, **facts)))

    def put_bulk(self, rows: Sequence[Mapping[str, Any]]) -> Written:
        """Add or replace images, all or none; each row is a `messages.NamedRow`, converted with `as_json`."""
        return Written.model_validate(self._post("/v1/gallery/bulk", {"rows": [dict(one) for one in rows]}))

    def delete(self, id: str) -> Written:
        """Remove an image; `count` is 0 if it did not exist."""
        return Written.model_validate(self._call("DELETE", _row_path(id)))

    def delete_person(self, pid: str | int) -> Written:
        """Remove all images of a person."""
        return Written.model_validate(self._call("DELETE", f"/v1/people/{quote(str(pid), safe='')}"))

    def picture(self, id: str) -> bytes:
        """Return the thumbnail of a row as JPEG."""
        return self._send("GET", f"{_row_path(id)}/image").content

    def status(self) -> Status:
        """Return the status of the model and the gallery."""
        return Status.model_validate(self._call("GET", "/v1/status"))

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._call("POST", path, json=body)

    def _call(self, method: str, path: str, **body: Any) -> Any:
        return self._send(method, path, **body).json()

    def _send(self, method: str, path: str, **body: Any) -> httpx.Response:
        """Send a request and return the response, with retries."""
        for tries_left in reversed(range(self._retries + 1)):
            wait_s = float(RETRY_S)
            try:
                response = self._http.request(method, path, **body)
            except httpx.TransportError:
                if not tries_left:
                    raise
            else:
                if response.is_success:
                    return response
                if not _worth_another(response) or not tries_left:
                    raise ServiceError(response.status_code, _said(response))
                retry_after = response.headers.get("Retry-After", "")
                wait_s = float(retry_after if retry_after.isdecimal() else RETRY_S)  # a proxy may send a date
            time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")


def as_json(**fields: Any) -> dict[str, Any]:
    """Convert the fields of a message of `service.messages` to JSON: bytes of an image file to base64, times to ISO."""
    given: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, bytes):
            given[name] = base64.b64encode(value).decode()
        elif isinstance(value, datetime):
            given[name] = value.isoformat()
        elif value is not None:
            given[name] = value
    return given


def _row_path(id: str) -> str:
    return f"/v1/gallery/{quote(id, safe='')}"


def _worth_another(response: httpx.Response) -> bool:
    """Return whether to retry. A 500 with an error message comes from the service itself and would only repeat."""
    return response.status_code in AGAIN or (response.status_code == 500 and _error(response) is None)


def _said(response: httpx.Response) -> str:
    return _error(response) or response.text[:200]


def _error(response: httpx.Response) -> str | None:
    """Return the service's own error message, or None if the response has none."""
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return None
