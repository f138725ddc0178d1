"""The learning records of a run while it trains: read from the files that rank 0 of each stage writes.

A file rather than messages, because it is also there after a kill, for a stage that another trial trains, and for one
that was finished long ago: whoever follows a run always sees every epoch, once, in order.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.stages import StageStore
from tvilfm.config import Config

Record = dict[str, float | int | str]

TRAINED = ("base", "text")
INTERVAL_S = 0.5


class Learning:
    """The epochs of a run's training stages, as far as they are written.

    Args:
        store: where the stages lie.
        config: says how many epochs the base stage has, so that `step` counts on over both stages.
    """

    def __init__(self, store: StageStore, config: Config) -> None:
        self._store = store
        self._offset = {"base": 0, "text": config.train.base.epochs}
        self._seen = 0

    def records(self) -> list[Record]:
        """Every record so far: stage, epoch, step (epochs of both stages, from 1), losses, validation metrics."""
        records: list[Record] = []
        for name in TRAINED:
            paths = (self._store.path(name) / "metrics.jsonl", self._store.partial(name) / "metrics.jsonl")
            path = next((path for path in paths if path.exists()), None)
            # Without its newline the last line is still being written.
            lines = path.read_text().splitlines(keepends=True) if path else []
            for line in lines:
                if line.endswith("\n"):
                    record = json.loads(line)
                    step = self._offset[name] + record["epoch"] + 1
                    records.append({"stage": name, "step": step, **record})
        return records

    def new(self) -> list[Record]:
        """Records of steps beyond those returned before; an epoch that is trained again after a kill is not new."""
        found = [record for record in self.records() if int(record["step"]) > self._seen]
        if found:
            self._seen = int(found[-1]["step"])
        return found


@contextmanager
def follow(learning: Learning, listener: Callable[[Record], None]) -> Iterator[None]:
    """Tell the listener of every epoch, from another thread, until the block ends; none is left out at its end.

    Raises:
        Exception: what the listener raised, at the end of the block.
    """
    stop, failures = threading.Event(), []

    def poll() -> None:
        try:
            ended = False
            while not ended:
                ended = stop.wait(INTERVAL_S)
                for record in learning.new():
                    listener(record)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
