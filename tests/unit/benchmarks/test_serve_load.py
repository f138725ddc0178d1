"""The load benchmark waits for the service as long as it is not ready."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import pytest

from benchmarks import serve_load


def test_a_service_that_is_not_ready_is_asked_again_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[int | None] = [None, 404, 503, 200]
    paused: list[float] = []

    def get(url: str, **options: object) -> httpx.Response:
        if (status := answers.pop(0)) is None:
            raise httpx.ConnectError("nobody listens")
        return httpx.Response(status)

    process = SimpleNamespace(poll=lambda: None, send_signal=lambda number: None, wait=lambda seconds: None)
    monkeypatch.setattr(serve_load.subprocess, "Popen", lambda *command, **options: process)
    monkeypatch.setattr(serve_load.httpx, "get", get)
    monkeypatch.setattr(serve_load, "time", SimpleNamespace(sleep=paused.append))
    with serve_load._served("tiny", "serve.batch=1"):
        assert answers == [] and len(paused) == 3
