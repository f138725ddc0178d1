"""What can be wrong with the machine is named: a busy machine, a long TMPDIR, a port in use, a proxy."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray
from pydantic import SecretStr

from cluster import session as sessions
from cluster.cli.app import _bypass_proxy
from cluster.session import require_free_port, session
from tvilfm.captioning.engines import EndpointRephraser
from tvilfm.config import ClusterSection, RephraseSection


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Exception | None]:
    """What Ray raises at each start; None = it starts."""
    planned: list[Exception | None] = []

    def init(**options: object) -> None:
        error = planned.pop(0)
        if error is not None:
            raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(sessions, "PAUSES_S", (0.0, 0.0))
    return planned


def slow() -> Exception:
    return Exception("The current node timed out during startup. This could happen because\nmore")


def test_a_busy_machine_gets_more_attempts(starts: list[Exception | None], capsys: pytest.CaptureFixture[str]) -> None:
    starts += [slow(), RuntimeError("Failed to start GCS."), None]
    with session(ClusterSection()):
        assert starts == []
    assert capsys.readouterr().err.count("trying again") == 2


@pytest.mark.parametrize(("store", "told"), [(4.0e9, True), (60e6, False)])
def test_a_small_shared_memory_is_noted_with_the_size_that_it_should_have(
    starts: list[Exception | None],
    store: float,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    starts += [None]
    monkeypatch.setattr(sessions.shutil, "disk_usage", lambda path: SimpleNamespace(free=64_000_000))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"object_store_memory": store})
    with session(ClusterSection()):
        pass
    noted = capsys.readouterr().err
    assert bool(noted) == told
    assert not told or ("has 0.1 GB, less than the object store (4.0 GB)" in noted and "--shm-size=5g" in noted)


def test_a_machine_that_stays_busy_is_named_in_one_sentence(starts: list[Exception | None]) -> None:
    starts += [slow(), slow(), slow()]
    with (
        pytest.raises(OSError, match=r"^ray: expected Ray to start .* in 3 attempts \(The current node .* on \d+ CPUs"),
        session(ClusterSection()),
    ):
        pass
    assert starts == []


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_folder_for_sockets_names_its_variable(
    starts: list[Exception | None], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, "/tmp/" + 85 * "x")
    starts.append(OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /tmp/x"))
    with (
        pytest.raises(OSError, match=rf"^{variable}: expected a folder with a short path, got /tmp/x+ \(90 characters"),
        session(ClusterSection()),
    ):
        pass
    assert starts == []


def test_ray_itself_refuses_a_long_folder_as_the_message_assumes() -> None:
    from ray._private.utils import validate_socket_filepath

    with pytest.raises(OSError, match="AF_UNIX"):
        validate_socket_filepath(f"/tmp/{85 * 'x'}/ray/session_2026-01-01_00-00-00_000000_1/sockets/plasma_store")


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_in_use_is_named_with_a_free_one(taken: int) -> None:
    with pytest.raises(ValueError, match=rf"^serve\.port: expected a free port of 127.0.0.1, got {taken},") as told:
        require_free_port("serve.port", "127.0.0.1", taken)
    free = int(str(told.value).partition("Set serve.port=")[2].partition(",")[0])
    require_free_port("serve.port", "127.0.0.1", free)


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "intranet")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("NO_PROXY", "")
    _bypass_proxy()
    _bypass_proxy()
    assert os.environ["no_proxy"] == "intranet,127.0.0.1,localhost,::1"
    from requests.utils import get_environ_proxies

    for url in ("http://127.0.0.1:8265", "http://localhost:8265"):
        assert get_environ_proxies(url) == {}
    assert get_environ_proxies("http://elsewhere.example")["http"] == "http://proxy.example:3128"


def test_an_endpoint_on_this_machine_is_asked_without_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)

    def proxied(url: str) -> bool:
        section = RephraseSection(engine="openai", url=url)
        client = EndpointRephraser(section, key=SecretStr("k"))._client._client
        return any(transport is not None for transport in client._mounts.values())

    assert not proxied("http://127.0.0.1:8000/v1") and not proxied("http://localhost:8000/v1")
    assert proxied("http://model.example/v1")
