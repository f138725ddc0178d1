"""The settings of Ray Serve, and HAProxy started by a real process with the configuration that Serve writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ray.serve._private import constants

from cluster.serve.environment import local_environment, serve_environment
from tests.processes import free_ports, listens, until
from tvilfm.config import ServeSection

TLS = ServeSection(tls_cert=Path("cert.pem"), tls_key=Path("key.pem"))


def test_ray_knows_every_variable(tmp_path: Path) -> None:
    for environment in (local_environment(ServeSection(), tmp_path), serve_environment(TLS)):
        for name in environment:  # no other release has to know them
            assert hasattr(constants, name)


def test_every_service_of_a_machine_has_its_own_ports_and_files(tmp_path: Path) -> None:
    environment = local_environment(ServeSection(), tmp_path)
    ports = [int(value) for name, value in environment.items() if name.endswith("_PORT")]
    assert len(set(ports)) == 3
    defaults = {name: getattr(constants, name) for name in environment}
    shared = [name for name, value in defaults.items() if str(value).startswith("/tmp")]
    assert shared and all(environment[name].startswith(str(tmp_path)) for name in shared)


def test_tls_goes_through_serves_own_proxy(tmp_path: Path) -> None:
    environment = local_environment(TLS, tmp_path)
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in environment
    assert environment["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0"


def test_statistics_are_open_to_this_machine_only(tmp_path: Path) -> None:
    statistics, service = free_ports(2)
    text = "defaults\n  mode http\n  timeout client 1s\n  timeout server 1s\n  timeout connect 1s\n"
    text += f"frontend f\n  bind 0.0.0.0:{service}\n  http-request return status 200\n"
    text += f"listen stats\n  bind *:{statistics}\n  stats enable\n"
    (tmp_path / "haproxy.cfg").write_text(text)
    program = Path(sys.executable).with_name("tvilfm-haproxy")
    process = subprocess.Popen([program, "-db", "-f", tmp_path / "haproxy.cfg"])
    try:
        until(lambda: process.poll() is not None or listens(statistics), 30)
        assert process.poll() is None
        assert listens(statistics) and listens(service, "127.0.0.2")
        assert not listens(statistics, "127.0.0.2")  # an address of this machine that is not the loopback's first
    finally:
        process.kill()
        process.wait()
