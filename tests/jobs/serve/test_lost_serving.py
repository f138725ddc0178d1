"""Machines that go under the service: the one with all of its parts, and the head whose state a Redis keeps.

Several nodes on this machine, each a `ray start` as on a machine of its own. They share an address and so the service's
port, over which the kernel spreads connections as a load balancer would.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.machines.render import render
from cluster.tables.indexing import index
from tests.jobs.machines.test_submit import TOKEN, plain_environment, wait_for
from tests.jobs.test_lost_nodes import named
from tests.paths import REPOSITORY
from tests.processes import command_line, descendants, free_ports, kill_tree, listens
from tests.untrained_run import UntrainedRun
from tvilfm.config import Config
from tvilfm.data.manifest import select
from tvilfm.retrieval.gallery import Gallery
from tvilfm.service.client import Client, as_json

BINARIES = Path(sys.executable).parent
REDIS = shutil.which("redis-server")
PROXY = b"ray::ProxyActor"
RECONNECT_S = 60  # that workers wait for a head; Ray's own
GRPC_BYTES = 4 * 2**20  # the largest message that gRPC takes unless told otherwise
ADDRESS = "127.0.0.2"  # Ray takes another one of this machine where it reads 127.0.0.1
RETRIES = 2  # the client's default


def replicas(machine: subprocess.Popen[bytes]) -> set[int]:
    """Processes of the service that a machine runs."""
    return {pid for pid in descendants(machine.pid) if b"ServeReplica:tvilfm:" in command_line(pid)}


class Machines:
    """A head, workers and a Redis: each a tree of processes."""

    def __init__(self, folder: Path, temporary: str) -> None:
        self.gcs, self._dashboard, self._agent, self._client, self._redis = free_ports(5)
        self._folder, self._temporary = folder, temporary
        self._started: list[subprocess.Popen[bytes]] = []
        self._environment = {
            **plain_environment(),
            "PATH": f"{BINARIES}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "SERVE_SOCKET_REUSE_PORT_ENABLED": "1",  # of the proxies, which machines do not share elsewhere
            **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"},
        }

    def start_redis(self) -> None:
        """Have what heads write down from now on outlive them."""
        assert REDIS is not None
        where = ["--port", str(self._redis), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        self._start([REDIS, *where, "--save", ""])
        wait_for(lambda: listens(self._redis), "the Redis does not start")
        self._environment["RAY_REDIS_ADDRESS"] = f"127.0.0.1:{self._redis}"

    def start_head(self) -> subprocess.Popen[bytes]:
        """A head without room for work, always at the same address."""
        # Ray refuses to start a head where it finds this file and, of the workers beside it, nodes of that cluster.
        (Path(self._temporary) / "ray_current_cluster").unlink(missing_ok=True)
        options = {"port": self.gcs, "dashboard-port": self._dashboard, "dashboard-agent-listen-port": self._agent}
        options |= {"ray-client-server-port": self._client, "temp-dir": self._temporary, "num-cpus": 0}
        head = self._start_ray("--head", *(f"--{key}={value}" for key, value in options.items()))
        wait_for(lambda: self.api("/api/version") is not None, "the head does not start")
        return head

    def start_worker(self) -> subprocess.Popen[bytes]:
        """A machine that has room for all parts of the service."""
        agent, metrics = free_ports(2)
        options = {"address": f"{ADDRESS}:{self.gcs}", "dashboard-agent-listen-port": agent}
        options |= {"metrics-export-port": metrics, "num-cpus": 2}
        before = len(self.nodes())
        worker = self._start_ray(*(f"--{key}={value}" for key, value in options.items()))
        # Two that start at once on one machine would take the same socket.
        wait_for(lambda: len(self.nodes()) > before, "the worker does not join")
        return worker

    def deploy(self, config: Config) -> None:
        """The service, as a platform team starts it on a cluster that runs."""
        file = self._folder / "serve.yaml"
        file.write_text(render("serve-config", config))
        command = [BINARIES / "serve", "deploy", file, "--address", f"http://127.0.0.1:{self._dashboard}"]
        subprocess.run(command, env=self._environment, check=True, capture_output=True, timeout=120)

    def api(self, path: str) -> Any:
        """What Ray's own server on the head says; None if nothing."""
        url, headers = f"http://127.0.0.1:{self._dashboard}{path}", {"Authorization": f"Bearer {TOKEN}"}
        try:
            answer = httpx.get(url, headers=headers, trust_env=False, timeout=20)
        except httpx.TransportError:
            return None
        return answer.json() if answer.is_success else None

    def nodes(self) -> list[str]:
        """Ids of the nodes that are alive."""
        found = self.api("/nodes?view=summary") or {"data": {"summary": []}}
        return [node["raylet"]["nodeId"] for node in found["data"]["summary"] if node["raylet"]["state"] == "ALIVE"]

    def states(self) -> set[str]:
        """States of the service and of its proxies, one on every machine; empty where nobody knows."""
        found = self.api("/api/serve/applications/")
        if found is None or len(found["proxies"]) != len(self.nodes()):
            return set()
        return {one["status"] for kind in ("applications", "proxies") for one in found[kind].values()}

    def end(self) -> None:
        """Kill whatever was started."""
        for process in reversed(self._started):
            if process.poll() is None:
                kill_tree(process)

    def _start_ray(self, *options: str) -> subprocess.Popen[bytes]:
        few = (f"--node-ip-address={ADDRESS}", "--min-worker-port=0", "--max-worker-port=0")
        few = (*few, f"--object-store-memory={100 * 2**20}")
        return self._start([str(BINARIES / "ray"), "start", "--block", *few, *options])

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPOSITORY
        )
        self._started.append(process)
        return process


def answers(url: str) -> Callable[[], bool]:
    """Whether a new connection gets what it asks for."""

    def asked() -> bool:
        try:
            return httpx.get(url, trust_env=False, timeout=10).is_success
        except httpx.TransportError:
            return False

    return asked


def to_serve(run: UntrainedRun, url: str) -> Config:
    """The run's service, with a gallery of its own."""
    changes = {
        "gallery": run.config.gallery.model_copy(update={"url": url}),
        "serve": run.config.serve.model_copy(update={"port": free_ports(1)[0]}),
    }
    config = run.config.model_copy(update=changes)
    index(config)
    return config


class Load:
    """Clients that write and search without end, and what came of it."""

    def __init__(self, run: UntrainedRun, address: str, *, retries: int) -> None:
        names = select(run.manifest, split="gallery", modality="visible")["image"].to_pylist()
        self._picture, self._address, self._retries = (run.root / names[0]).read_bytes(), address, retries
        self.indexed, self.acknowledged, self.searches, self.errors = names, list[str](), 0, list[Exception]()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(n,)) for n in range(2)]
        # So many that some talk to the proxy that goes.
        self._threads += [threading.Thread(target=self._search) for _ in range(3)]
        for thread in self._threads:
            thread.start()

    def _write(self, worker: int) -> None:
        with Client(self._address, retries=self._retries) as client:
            number = 0
            while not self._stop.is_set():
                number += 1
                try:
                    client.put(f"{worker}-{number}", image=self._picture, camid=1)
                    self.acknowledged.append(f"{worker}-{number}")
                except Exception as error:
                    self.errors.append(error)
                    time.sleep(0.5)

    def _search(self) -> None:
        with Client(self._address, retries=self._retries) as client:
            while not self._stop.is_set():
                try:
                    client.search(image=self._picture, sentence="a coat", k=3)
                    self.searches += 1
                except Exception as error:
                    self.errors.append(error)
                    time.sleep(0.5)

    def goes_on(self) -> Callable[[], bool]:
        """Whether some writes and searches were answered from now on."""
        writes, searches = len(self.acknowledged), self.searches
        return lambda: len(self.acknowledged) > writes + 10 and self.searches > searches + 5

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(200)

    def check(self, gallery: str) -> None:
        """Every write that was acknowledged is there, once."""
        assert Gallery.open(gallery).contains([*self.acknowledged, *self.indexed]).all()


def large_answer(address: str, run: UntrainedRun) -> int:
    """Bytes of an answer that is as large as one may become."""
    names = select(run.manifest, split="gallery", modality="visible")["image"].to_pylist()
    picture, most = (run.root / names[0]).read_bytes(), run.config.serve.max_batch
    with Client(address, retries=RETRIES) as client:
        for start in range(0, 3 * most, most):
            rows = [as_json(id=f"{start + n:0400}", image=picture, camid=1) for n in range(most)]
            version = client.put_bulk(rows).version
        query = as_json(sentence="a coat", k=1000, min_version=version)
        return sum(len(answer.model_dump_json()) for answer in client.search_batch([query] * most))


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:  # a short path
        machines = Machines(tmp_path, temporary)
        try:
            yield machines
        finally:
            machines.end()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_machine_with_every_part_of_the_service_goes_and_no_client_sees_an_error(
    untrained_run: UntrainedRun, ray_session: None, machines: Machines, database: str
) -> None:
    config = to_serve(untrained_run, database)
    address = f"http://127.0.0.1:{config.serve.port}"
    machines.start_head()
    busy = machines.start_worker()
    machines.deploy(config)
    wait_for(answers(f"{address}/readyz"), "the service does not start", seconds=240)
    assert len(replicas(busy)) == config.serve.replicas
    spare = machines.start_worker()
    load = Load(untrained_run, address, retries=RETRIES)
    try:
        wait_for(load.goes_on(), "nobody is served")
        kill_tree(busy)
        wait_for(load.goes_on(), "the service does not answer again", seconds=240)
        wait_for(lambda: len(replicas(spare)) == config.serve.replicas, "a replica is not replaced")
    finally:
        load.end()
    assert load.errors == []
    load.check(config.gallery_url)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(REDIS is None, reason="needs a Redis (Debian: apt-get install redis-server)")
def test_workers_serve_on_without_a_head_and_the_next_head_takes_up_the_service(
    untrained_run: UntrainedRun, ray_session: None, machines: Machines, database: str
) -> None:
    config = to_serve(untrained_run, database)
    address = f"http://127.0.0.1:{config.serve.port}"
    machines.start_redis()
    head = machines.start_head()
    workers = [machines.start_worker() for _ in range(2)]
    machines.deploy(config)
    wait_for(answers(f"{address}/readyz"), "the service does not start", seconds=240)
    wait_for(lambda: machines.states() == {"RUNNING", "HEALTHY"}, "a machine does not serve")
    assert large_answer(address, untrained_run) > GRPC_BYTES
    before = set.union(*map(replicas, workers))
    load = Load(untrained_run, address, retries=RETRIES)
    try:
        wait_for(load.goes_on(), "nobody is served")
        kill_tree(head)
        # Without the head nobody finds out which requests its proxy had under way.
        wait_for(load.goes_on(), "workers do not serve without a head", seconds=RECONNECT_S / 2)
        head = machines.start_head()
        wait_for(lambda: named(head.pid, PROXY), "the new head does not serve", seconds=240)
        wait_for(lambda: machines.states() == {"RUNNING", "HEALTHY"}, "the new head does not know the service")
        wait_for(load.goes_on(), "the service does not continue with a new head")
    finally:
        load.end()
    assert load.errors == []
    load.check(config.gallery_url)
    assert set.union(*map(replicas, workers)) == before  # none was started again
