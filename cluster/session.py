"""The Ray session of a command: it joins the cluster at a given address, or starts Ray on this machine."""

from __future__ import annotations

import errno
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc  # type: ignore[import-untyped]
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError
from rich.console import Console

from tvilfm.config import ClusterSection

ANSWER_S = 10.0  # for the head's answer to a call
SHARED_MEMORY = "/dev/shm"  # where Ray's object store is if it fits
PAUSES_S = (5.0, 20.0)  # before the second and the third start of Ray


def address_of(section: ClusterSection) -> str:
    """Return the address of the cluster to join; "local" = start Ray on this machine."""
    # Without an address Ray would join whatever cluster happens to run on this machine.
    return section.address or os.environ.get("RAY_ADDRESS", "local")


def require_free_port(key: str, host: str, port: int) -> None:
    """Check that no other program listens on a port that this machine is about to use.

    Raises:
        ValueError: one does; the message names the key and a free port.
    """
    if not _is_taken(host, port):
        return
    free = next((other for other in range(port + 1, min(port + 1000, 65536)) if not _is_taken(host, other)), None)
    advice = f"Set {key}={free}, which is free, or end that program." if free else "End that program."
    raise ValueError(f"{key}: expected a free port of {host}, got {port}, on which another program listens. {advice}")


def _is_taken(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


@contextmanager
def session(section: ClusterSection) -> Iterator[None]:
    """Provide a Ray session while the block runs. A session that was running before stays open.

    Raises:
        ConnectionError: when no cluster answers at `cluster.address`.
        OSError: Ray does not start on this machine; the message says why.
    """
    # Train collects one report per worker and interval, 2 s by default, which is longer than a short epoch.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    if ray.is_initialized():
        _quiet()
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The uv hook would rebuild the environment of every worker when the command was started by `uv run`.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    address = address_of(section)
    if address == "local":
        # Another process of Ray Train's, which waits for a cloud to take this machine away.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Ray Data's actor pools make the core log a standing warning at error level (ray issue 53727).
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        _start()
    else:
        _join(address, section)
    _quiet()
    try:
        with _stopped_by_signals():
            yield
    finally:
        ray.shutdown()


def _join(address: str, section: ClusterSection) -> None:
    try:
        if not address.startswith("ray://"):
            address = canonicalize_bootstrap_address_or_die(address)
            authenticate(address, section)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConnectionError(
            f"cluster.address: expected a Ray cluster at {address}, got no answer ({error}). "
            "Start it with `ray start --head`, or set cluster.address=null to run on this machine."
        ) from None


def authenticate(address: str, section: ClusterSection) -> None:
    """Let this process send a token if the head of a cluster requires one, and only then.

    A process that has a token refuses calls without one. So a driver with a token hangs on a cluster that has none:
    workers on other machines cannot read the driver's objects.

    Args:
        address: host:port of the head.
        section: its `token_path` is preferred to `RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH` and `~/.ray/auth_token`.

    Raises:
        ValueError: the head requires a token, and the token is missing or wrong.
    """
    _set_authentication("disabled")
    if not _is_refused(address):
        return
    if section.token_path is not None:
        os.environ.pop("RAY_AUTH_TOKEN", None)  # it takes precedence
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(section.token_path.absolute())
    _set_authentication("token")
    if has_token() and not _is_refused(address):
        return
    found = "another" if has_token() else "none"
    raise ValueError(
        f"cluster.token_path: expected the token of the cluster at {address}, got {found}. "
        "Save the token in a file and set cluster.token_path, or set RAY_AUTH_TOKEN."
    )


def has_token() -> bool:
    """Return whether Ray finds a token: in its two environment variables, or in `~/.ray/auth_token`."""
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    try:
        return bool(loader.has_token(ignore_auth_mode=True))
    except AuthenticationError as error:  # RAY_AUTH_TOKEN_PATH names no readable file
        raise ValueError(f"{str(error).partition('. Note')[0]}. Create it or change the path.") from None


def _set_authentication(mode: str) -> None:
    os.environ["RAY_AUTH_MODE"] = mode
    ray._raylet.Config.initialize("")  # type: ignore[attr-defined]  # Ray reads the variable once


def _is_refused(address: str) -> bool:
    """Return whether the head refuses a call with this process's token, or without one if it has none."""
    with init_grpc_channel(address) as channel:
        try:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=ANSWER_S)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def _start() -> None:
    """Start Ray on this machine. On a busy machine Ray gives up after 30 s, so it is started again after a pause.

    Ray's ports execute any code that they receive, so it requires a token. A token of this session alone is not stored.
    """
    if os.environ.get("RAY_AUTH_MODE") != "disabled" and not has_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        AuthenticationTokenLoader.instance().reset_cache()
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else None
    for pause_s in (*PAUSES_S, None):
        try:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            if free is not None:
                _note_small_shared_memory(free)
            return
        except Exception as error:  # Ray raises bare Exceptions here
            ray.shutdown()
            reason = str(error).strip().partition("\n")[0]
            if "AF_UNIX" in reason:
                raise _long_path() from None
            if isinstance(error, ValueError):
                raise
            load = f"the load is {os.getloadavg()[0]:.0f} on {os.cpu_count()} CPUs"
            if pause_s is None:
                raise TimeoutError(
                    f"ray: expected Ray to start on this machine, got no answer in {len(PAUSES_S) + 1} attempts "
                    f"({reason}; {load}). Wait until other programs have ended, then run the command again."
                ) from None
        Console(stderr=True).print(f"ray: not started yet ({load}); trying again", style="dim", highlight=False)
        time.sleep(pause_s)


def _note_small_shared_memory(free: int) -> None:
    """Print a note if Ray's object store did not fit into the shared memory, as in a container with Docker's 64 MB.

    Args:
        free: bytes that were free before Ray started.
    """
    store = ray.cluster_resources().get("object_store_memory", 0.0)
    if free >= store:
        return
    Console(stderr=True).print(
        f"ray: {SHARED_MEMORY} has {free / 1e9:.1f} GB, less than the object store ({store / 1e9:.1f} GB), which is on "
        f"disk in {tempfile.gettempdir()} instead: stages that move many images or vectors are slower. Start the "
        f"container with --shm-size={math.ceil(store / 1e9) + 1}g; on Kubernetes, mount an emptyDir of medium Memory.",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def _long_path() -> OSError:
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "TMPDIR")
    folder = os.environ.get(variable) or tempfile.gettempdir()
    return OSError(
        f"{variable}: expected a folder with a short path, got {folder} ({len(folder)} characters). Ray stores sockets "
        "there, whose paths have at most 107 bytes. Set RAY_TMPDIR=/tmp, or another folder of at most 35 characters."
    )


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP as Ctrl-C. Ray's own handlers print a C++ stack trace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    previous = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise errors about bad input from workers without Ray's traceback.

    Raises:
        ValueError: with the message of the ValueError or OSError that the worker raised.
    """
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError | OSError):
            raise ValueError(str(error.cause)) from None
        raise


def _quiet() -> None:
    """Silence Ray Data's progress; this program shows its own."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # see `plain_errors`
    logging.getLogger("ray.data").setLevel(logging.ERROR)
