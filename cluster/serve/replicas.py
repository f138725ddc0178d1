"""What the replicas of the service share: their patience, batches, and threads that survive a failing store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

HEALTH_S = 1.0  # a replica that died is noticed within this time
PATIENCE_S = 40.0  # that a part may take to answer anything but compact, its replacement included
TURN_S = PATIENCE_S / 2  # that a write waits for the change before it: none is made when its client waits no more
T = TypeVar("T")


def in_batches(work: Callable[..., list[T]], size: int, *columns: Sequence[Any]) -> list[T]:
    """What `work` makes of columns, a few rows at a time: Serve counts requests, each of which may bring many."""
    starts = range(0, len(columns[0]), size)
    return [one for start in starts for one in work(*(column[start : start + size] for column in columns))]


@contextmanager
def keep_going(what: str) -> Iterator[None]:
    """Let a thread outlive a store that does not answer: the fault goes to the log, and the next turn tries again."""
    try:
        yield
    except Exception:
        logging.getLogger("ray.serve").exception("%s; trying again", what)
