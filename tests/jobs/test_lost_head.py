"""The head of a cluster dies under the service: with its state in a Redis, a new head takes up where it was."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from cluster.deploy.render import serve_config
from tests.jobs.test_lost_nodes import Load, to_serve
from tests.jobs.test_submit import free_ports, plain_environment, wait_for
from tests.processes import descendants
from tests.untrained_run import UntrainedRun

REPOSITORY = Path(__file__).parents[2]
BINARIES = Path(sys.executable).parent
REDIS = shutil.which("redis-server")


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """A process and all that it started, at once."""
    for pid in [process.pid, *descendants(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


class Machines:
    """A Redis, a head that keeps its state there, and a worker: each a tree of processes."""

    def __init__(self, folder: Path, temporary: str) -> None:
        self._redis_port, self._gcs, self.dashboard, *self._others = free_ports(7)
        self._folder, self._temporary = folder, temporary
        self._started: list[subprocess.Popen[bytes]] = []
        self._environment = {
            **plain_environment(),
            "PATH": f"{BINARIES}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{self._redis_port}",
        }
        assert REDIS is not None
        self._start([REDIS, "--port", str(self._redis_port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)])
        wait_for(self._redis_answers, "the Redis does not start")

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPOSITORY
        )
        self._started.append(process)
        return process

    def _redis_answers(self) -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self._redis_port)) == 0

    def start_head(self) -> subprocess.Popen[bytes]:
        agent, client, _, _ = self._others
        options = {"port": self._gcs, "dashboard-port": self.dashboard, "dashboard-agent-listen-port": agent}
        options |= {"ray-client-server-port": client, "temp-dir": self._temporary, "num-cpus": 0}
        return self._start_ray(["--head", *(f"--{key}={value}" for key, value in options.items())])

    def start_worker(self) -> subprocess.Popen[bytes]:
        _, _, agent, metrics = self._others
        options = {"address": f"127.0.0.1:{self._gcs}", "dashboard-agent-listen-port": agent}
        options |= {"metrics-export-port": metrics, "num-cpus": 2}
        return self._start_ray([f"--{key}={value}" for key, value in options.items()])

    def _start_ray(self, options: list[str]) -> subprocess.Popen[bytes]:
        ports = ["--min-worker-port=0", "--max-worker-port=0"]
        return self._start([str(BINARIES / "ray"), "start", "--block", *ports, *options])

    def deploy(self, description: dict[str, object]) -> None:
        """As a platform team does it."""
        file = self._folder / "serve.yaml"
        file.write_text(yaml.safe_dump(description))
        command = [BINARIES / "serve", "deploy", file, "--address", f"http://127.0.0.1:{self.dashboard}"]
        subprocess.run(command, env=self._environment, check=True, capture_output=True, timeout=120)

    def answers(self, url: str) -> Callable[[], bool]:
        def asked() -> bool:
            try:
                return httpx.get(url, trust_env=False, timeout=10).is_success
            except httpx.TransportError:
                return False

        return asked

    def end(self) -> None:
        for process in reversed(self._started):
            if process.poll() is None:
                kill_tree(process)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:  # a short path
        machines = Machines(tmp_path, temporary)
        yield machines
        machines.end()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(REDIS is None, reason="needs a Redis (Debian: apt-get install redis-server)")
def test_a_head_lost_under_serving_comes_back_and_no_acknowledged_write_is_lost(
    untrained_run: UntrainedRun, ray_session: None, machines: Machines, tmp_path: Path
) -> None:
    config = to_serve(untrained_run, tmp_path)
    address = f"http://127.0.0.1:{config.serve.port}"
    head = machines.start_head()
    wait_for(machines.answers(f"http://127.0.0.1:{machines.dashboard}/api/version"), "the head does not start")
    machines.start_worker()
    machines.deploy(serve_config(config))
    wait_for(machines.answers(f"{address}/readyz"), "the service does not start", seconds=180)
    load = Load(untrained_run, address, retries=0)
    try:
        wait_for(load.goes_on(), "nobody is served")
        kill_tree(head)
        time.sleep(3)  # a head does not come back at once
        machines.start_head()
        wait_for(machines.answers(f"http://127.0.0.1:{machines.dashboard}/api/version"), "the head does not come back")
        wait_for(load.goes_on(), "the service does not answer again", seconds=240)
    finally:
        load.end()
    load.check(str(config.gallery.uri))
