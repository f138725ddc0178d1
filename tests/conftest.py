"""What the tests share: one thread, a skip for missing GPUs, a tiny benchmark on disk, one local Ray."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import torch

from tests.paths import temporary_folder
from tests.untrained_run import UntrainedRun, write_untrained_run
from tvilfm.datasets.synthetic.layouts import Size, write_sysu_layout
from tvilfm.retrieval.embedded import start_server

TINY = Size(train=6, val=2, test=4, images_per_camera=1)


def pytest_configure(config: pytest.Config) -> None:
    # More threads than cores make tiny tensors slower, and sums of floats depend on their number.
    torch.set_num_threads(1)
    # Processes that tests start share it.
    if "TVILFM_CACHE" not in os.environ:
        os.environ["TVILFM_CACHE"] = str(temporary_folder("tvilfm-cache-"))
    # Of the S3 server of the tests, which takes any; Ray's workers inherit them.
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a synthetic benchmark in SYSU-MM01's layout: 6 + 2 + 4 identities, 8 images each."""
    root = tmp_path_factory.mktemp("benchmark") / "tiny"
    write_sysu_layout(root, TINY, seed=0)
    return root


@pytest.fixture(scope="session")
def untrained_run(tiny_benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> UntrainedRun:
    """A finished run of a network that nobody trained."""
    return write_untrained_run(tmp_path_factory.mktemp("runs"), tiny_benchmark)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """host:port of an S3 server of this process, as other processes reach it; a test file makes its own bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(scope="session")
def database_server() -> str:
    """URL of an embedded PostgreSQL server."""
    # Not below pytest's folder: if root runs the tests, another user runs the server.
    url = start_server(temporary_folder("tvilfm-postgres-"))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")  # each new database is 300 files
        connection.execute("SELECT pg_reload_conf()")
    return url


@pytest.fixture(scope="session")
def new_database(database_server: str) -> Callable[[], str]:
    """Return the URL of a new database."""

    def create() -> str:
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(database_server, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return database_server.replace("/postgres?", f"/{name}?")

    return create


@pytest.fixture
def database(new_database: Callable[[], str]) -> str:
    """URL of a database of one test."""
    return new_database()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of four (virtual) CPUs, shut down after the last test."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # As `cluster.session` sets them.
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.25"
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
