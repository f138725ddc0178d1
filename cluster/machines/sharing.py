"""Check that a folder which all machines should share is one folder with one lock, and that their clocks agree.

The driver writes a marker into each folder and holds its lock. Every machine then looks for the markers, and fails to
take the locks.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tvilfm.config import Config
from tvilfm.place import Place, lock

MARKER, LOCK = ".shared-{}", ".shared-{}.lock"


def shared_places(config: Config) -> list[str]:
    """Return the folders or URIs that all machines share: `cluster.storage`, and `run.dir` if that is no URI."""
    storage = config.cluster.storage
    if storage is not None and Place(storage).is_uri:
        return [storage]
    return [str(place) for place in dict.fromkeys((storage, config.run.dir)) if place is not None]


@contextmanager
def marked(places: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """Write a marker into each place and hold its lock; yield the places that could be written, and the marker's id."""
    name = uuid.uuid4().hex
    written = []
    with ExitStack() as held:
        for uri in places:
            place = Place(uri)
            with suppress(OSError, ValueError):  # what is wrong with the place is another check
                marker = place / MARKER.format(name)
                marker.write(name.encode())
                held.callback(_delete, marker)
                written.append(uri)
                if place.is_local:
                    path = Path(place.path) / LOCK.format(name)
                    held.callback(path.unlink, missing_ok=True)
                    held.enter_context(lock(path))
        yield written, name


def _delete(marker: Place) -> None:
    with suppress(OSError):
        marker.filesystem.delete_file(marker.path)


@ray.remote(num_cpus=0, max_retries=0)
def _clock() -> float:
    return time.time()


def clock_difference(place: NodeAffinitySchedulingStrategy, timeout_s: float) -> float:
    """Return by how many seconds a machine's clock is ahead of the driver's, to half of the time that it answered in.

    The first call may have to start a process; the second call finds it.
    """
    for _ in range(2):
        asked = time.time()
        there: float = ray.get(_clock.options(scheduling_strategy=place).remote(), timeout=timeout_s)
        answered = time.time()
    return there - (asked + answered) / 2


def unshared(places: Sequence[str], name: str) -> list[str]:
    """Return the places in which this machine does not find the driver's marker."""
    return [uri for uri in places if not _holds_marker(Place(uri), name)]


def _holds_marker(place: Place, name: str) -> bool:
    try:
        return (place / MARKER.format(name)).is_file()
    except (OSError, ValueError):
        return False


def without_locks(places: Sequence[str], name: str) -> list[str]:
    """Return the shared folders in which this machine does not see the driver's lock."""
    return [uri for uri in places if _holds_marker(Place(uri), name) and not _is_locked(Place(uri), name)]


def _is_locked(place: Place, name: str) -> bool:
    if not place.is_local:
        return True
    try:
        lock(Path(place.path) / LOCK.format(name), wait=False).close()
    except BlockingIOError:
        return True
    except OSError:  # the file system has no locks
        return False
    return False
