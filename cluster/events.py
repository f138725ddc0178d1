"""Events of a job as JSON lines with the ids of the run, the sweep and the Ray job.

Progress lines are for people; events are for a log collector, which receives lines of many runs, trials and jobs. Each
line has all ids, so it can be read without the lines before it.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray


class Events:
    """A file of events; several processes may append to it.

    Args:
        path: path of the file.
        ids: fields of every line, such as the run and the sweep that it is a trial of.
    """

    def __init__(self, path: Path, **ids: str | None) -> None:
        self._path, self._ids = path, ids

    def write(self, event: str, **fields: Any) -> None:
        """Append a line with the time, the ids, `event` and the fields."""
        line = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "event": event,
            **self._ids,
            **_place(),
            **fields,
        }
        with self._path.open("a") as file:
            file.write(
                json.dumps(line, default=str) + "\n"
            )  # a single write, so that lines of two processes do not mix

    @contextmanager
    def around(self, what: str, **fields: Any) -> Iterator[None]:
        """Write an event when the block starts, and one with its duration when it is done or has failed."""
        started = time.monotonic()
        self.write(f"{what} started", **fields)
        try:
            yield
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
            self.write(f"{what} failed", **fields, seconds=round(time.monotonic() - started, 3), error=message)
            raise
        self.write(f"{what} done", **fields, seconds=round(time.monotonic() - started, 3))


def _place() -> dict[str, Any]:
    """Return the machine and the process and, inside a Ray job, its id and its submission id."""
    place: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    if ray.is_initialized():
        place["ray_job"] = ray.get_runtime_context().get_job_id()
    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata") or {}
    if "job_submission_id" in metadata:
        place["job"] = metadata["job_submission_id"]
    return place
