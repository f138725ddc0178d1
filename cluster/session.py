"""The Ray session of a command: it joins the cluster at a given address, or starts Ray on this machine."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from tvilfm.config import ClusterSection


def address_of(section: ClusterSection) -> str:
    """Return the address of the cluster to join; "local" = start Ray on this machine."""
    # Without an address Ray would join whatever cluster happens to run on this machine.
    return section.address or os.environ.get("RAY_ADDRESS", "local")


@contextmanager
def session(section: ClusterSection) -> Iterator[None]:
    """Provide a Ray session while the block runs. A session that was running before stays open.

    Raises:
        ConnectionError: when no cluster answers at `cluster.address`.
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
        # Ray Data's actor pools make the core log a standing warning at error level (ray issue 53727).
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except ConnectionError as error:
        raise ConnectionError(
            f"cluster.address: expected a Ray cluster at {address}, got no answer ({error}). "
            "Start it with `ray start --head`, or set cluster.address=null to run on this machine."
        ) from None
    _quiet()
    try:
        with _stopped_by_signals():
            yield
    finally:
        ray.shutdown()


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
