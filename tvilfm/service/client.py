"""A client of the retrieval service.

    with Client("http://127.0.0.1:8000", key="tvi_...") as client:
        answer = client.search(image=Path("query.jpg").read_bytes(), sentence="a woman in a red coat", k=5)
        print(answer.hits[0].id, answer.hits[0].shares)

What the service asks to try again (429, 503), and what got no answer of the service, is tried again: every request may
be repeated without harm, as a write names the row that it writes. Where the machine dies that a request had reached,
whoever stands before it answers with an error of its own: Serve's proxy with a bare 500, a load balancer with 502 or
504.
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
    """The service said no; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Client:
    """Talks to a service.

    Args:
        url: of the service.
        key: API key; None where it asks for none.
        retries: further tries of a request that is worth one.
        timeout_s: that an answer may take.
        verify: who vouches for the service's certificate; of one's own: `ssl.create_default_context(cafile=...)`.
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
        """Find a person.

        Args:
            image: infrared picture, a JPEG, PNG, WebP or BMP file.
            sentence: how somebody describes the person.
            options: further fields of `messages.SearchQuery`.

        Raises:
            ServiceError: the service refused.
            httpx.TransportError: no answer, again and again.
        """
        return SearchAnswer.model_validate(self._post("/v1/search", as_json(image=image, sentence=sentence, **options)))

    def search_batch(self, queries: Sequence[Mapping[str, Any]]) -> list[SearchAnswer]:
        """Find several people; each query a `messages.SearchQuery` by `as_json`."""
        found = self._post("/v1/search/batch", {"queries": [dict(one) for one in queries]})
        return BatchAnswer.model_validate(found).answers

    def put(self, id: str, *, image: bytes | None = None, camid: int, **facts: Any) -> Written:
        """Add a picture to the gallery or replace it; on disk when this returns.

        Args:
            id: of the row.
            image: visible picture; or `vector`, `vector_base` and `space_id` among the facts.
            camid: camera.
            facts: further fields of `messages.Row`.
        """
        return Written.model_validate(self._call("PUT", _row_path(id), json=as_json(image=image, camid=camid, **facts)))

    def put_bulk(self, rows: Sequence[Mapping[str, Any]]) -> Written:
        """Add or replace pictures, all or none; each row a `messages.NamedRow` by `as_json`."""
        return Written.model_validate(self._post("/v1/gallery/bulk", {"rows": [dict(one) for one in rows]}))

    def delete(self, id: str) -> Written:
        """Remove a picture; `count` is 0 where there was none."""
        return Written.model_validate(self._call("DELETE", _row_path(id)))

    def delete_person(self, pid: int) -> Written:
        """Remove all pictures of a person; `compact` then removes them from disk."""
        return Written.model_validate(self._call("DELETE", f"/v1/people/{pid}"))

    def compact(self, *, timeout_s: float = 3600.0) -> Written:
        """Remove from disk what was deleted; of a large gallery that takes its time, and goes on where that is out."""
        return Written.model_validate(self._call("POST", "/v1/gallery/compact", timeout=timeout_s, goes_on=True))

    def picture(self, id: str) -> bytes:
        """The thumbnail of a row, a JPEG."""
        return self._send("GET", f"{_row_path(id)}/image").content

    def status(self) -> Status:
        """What is served."""
        return Status.model_validate(self._call("GET", "/v1/status"))

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._call("POST", path, json=body)

    def _call(self, method: str, path: str, **body: Any) -> Any:
        return self._send(method, path, **body).json()

    def _send(self, method: str, path: str, *, goes_on: bool = False, **body: Any) -> httpx.Response:
        """A request and its answer; what goes on without its client is not begun again when time is out."""
        for tries_left in reversed(range(self._retries + 1)):
            wait_s = float(RETRY_S)
            try:
                response = self._http.request(method, path, **body)
            except httpx.TransportError as error:
                if not tries_left or (goes_on and isinstance(error, httpx.ReadTimeout)):
                    raise
            else:
                if response.is_success:
                    return response
                timed_out = response.status_code == httpx.codes.REQUEST_TIMEOUT
                if not _worth_another(response) or not tries_left or (goes_on and timed_out):
                    raise ServiceError(response.status_code, _said(response))
                told = response.headers.get("Retry-After", "")
                wait_s = float(told if told.isdecimal() else RETRY_S)  # a proxy may tell a date
            time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")


def as_json(**fields: Any) -> dict[str, Any]:
    """A message of `service.messages` as JSON, the picture given as a file's bytes and times as datetimes."""
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
    """A 500 of the service's own says what is wrong, and would again."""
    return response.status_code in AGAIN or (response.status_code == 500 and _error(response) is None)


def _said(response: httpx.Response) -> str:
    return _error(response) or response.text[:200]


def _error(response: httpx.Response) -> str | None:
    """What the service itself says is wrong."""
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return None
