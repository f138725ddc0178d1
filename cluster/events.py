"""What a job did and when, as JSON lines that say of which run, sweep and Ray job they are.

Progress is for people; these lines are for a log collector, which meets the lines of many runs, trials and jobs in one
place: each carries all the ids, and none has to be understood from the one before.
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
        path: of the file.
        ids: on every line, such as the run and the sweep that it is a trial of.
    """

    def __init__(self, path: Path, **ids: str | None) -> None:
        self._path, self._ids = path, ids

    def write(self, event: str, **fields: Any) -> None:
        """Append a line: time, ids, `event`, and the fields."""
        line = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "event": event,
            **self._ids,
            **_place(),
            **fields,
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")  # one write: lines of two processes do not mix

    @contextmanager
    def around(self, what: str, **fields: Any) -> Iterator[None]:
        """Say that something started, and that it was done or how it failed, with its seconds."""
        started = time.monotonic()
        self.write(f"{what} started", **fields)
        try:
            yield
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
            self.write(f"{what} failed", **fields, seconds=round(time.monotonic() - started, 3), error=said)
            raise
        self.write(f"{what} done", **fields, seconds=round(time.monotonic() - started, 3))


def _place() -> dict[str, Any]:
    """Machine and process, the Ray job where there is one, and the id under which it was submitted."""
    found: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    if ray.is_initialized():
        found["ray_job"] = ray.get_runtime_context().get_job_id()
    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata") or {}
    if "job_submission_id" in metadata:
        found["job"] = metadata["job_submission_id"]
    return found
