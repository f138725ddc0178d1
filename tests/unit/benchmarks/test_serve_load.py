"""The load benchmark waits for the service as long as it is not ready."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from benchmarks import serve_load
from tvilfm.config import load_config


def test_a_service_that_is_not_ready_is_asked_again_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[int | None] = [None, 404, 503, 200]
    paused: list[float] = []

    def get(url: str, **options: object) -> httpx.Response:
        if (status := answers.pop(0)) is None:
            raise httpx.ConnectError("nobody listens")
        return httpx.Response(status)

    process = SimpleNamespace(pid=os.getpid(), poll=lambda: None, send_signal=lambda number: None, wait=lambda _: None)
    monkeypatch.setattr(serve_load.subprocess, "Popen", lambda *command, **options: process)
    monkeypatch.setattr(serve_load.httpx, "get", get)
    monkeypatch.setattr(serve_load, "time", SimpleNamespace(sleep=paused.append, perf_counter=time.perf_counter))
    config = load_config(Path("ray_config.yaml"), size="tiny")
    with serve_load._served(config, ["serve.batch=1"]) as (_, facts):
        assert facts["memory_gb"] > 0
        assert answers == [] and len(paused) == 3
