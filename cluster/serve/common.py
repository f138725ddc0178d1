"""Shared by the parts of the service: timeouts, batches, and background threads that survive a failing store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

HEALTH_S = 1.0  # period of health checks: a dead replica is detected within this time
PATIENCE_S = 40.0  # timeout of a call to a replica, including its replacement
T = TypeVar("T")


def in_batches(work: Callable[..., list[T]], size: int, *columns: Sequence[Any]) -> list[T]:
    """Apply `work` to batches of rows and join the results. Serve limits requests, and a request may have many rows."""
    starts = range(0, len(columns[0]), size)
    return [one for start in starts for one in work(*(column[start : start + size] for column in columns))]


@contextmanager
def keep_going(what: str) -> Iterator[None]:
    """Keep a background thread alive when the store fails: log the error; the next iteration retries."""
    try:
        yield
    except Exception:
        logging.getLogger("ray.serve").exception("%s; retrying", what)
