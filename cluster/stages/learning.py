"""The learning records of a run during training: one file per stage, replaced after every epoch.

A file has advantages over messages: it survives a kill, and it exists too for stages that another trial trains or that
were finished earlier. So a follower of a run always sees every epoch once, in order.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.stages.store import StageStore
from tvilfm.config import Config
from tvilfm.place import write_whole
from tvilfm.terms import Record

METRICS_FILE = "metrics.jsonl"  # one line per epoch, of a stage or of a whole run
TRAINED = ("base", "text")
INTERVAL_S = 0.5


def read_records(path: Path) -> list[Record]:
    """Return the records of a file, without a last line that is still being written."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write records as JSON lines. The file is replaced atomically, so that no reader sees a part of them."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


def numbered(records: Mapping[str, Sequence[Record]], *, base_epochs: int) -> list[Record]:
    """Return the records of both training stages in one list.

    Args:
        records: stage name -> its records.
        base_epochs: epochs of the base stage.

    Returns:
        Records with stage, epoch, step (epochs of both stages, from 1), losses and validation metrics.
    """
    offset = {"base": 0, "text": base_epochs}
    return [
        {"stage": name, "step": offset[name] + int(record["epoch"]) + 1, **record}
        for name in TRAINED
        for record in records.get(name, ())
    ]


class Learning:
    """The epochs of a run's training stages that have been written so far.

    Args:
        store: store of the stages.
        config: the run; the number of base epochs is needed to count `step` over both stages.
    """

    def __init__(self, store: StageStore, config: Config) -> None:
        self._store, self._base_epochs = store, config.train.base.epochs
        self._seen = 0

    def records(self) -> list[Record]:
        """Return all records so far, numbered as in `numbered`."""
        records = {name: self._written(name) for name in TRAINED if name in self._store}
        return numbered(records, base_epochs=self._base_epochs)

    def _written(self, name: str) -> list[Record]:
        finished, partial = self._store.path(name), self._store.partial(name)
        for folder in (finished, partial, finished):  # the stage may be renamed between two reads
            with suppress(FileNotFoundError):
                return read_records(folder / METRICS_FILE)
        return []

    def new(self) -> list[Record]:
        """Return records of steps after those returned before. An epoch that is repeated after a kill is not new."""
        records = [record for record in self.records() if int(record["step"]) > self._seen]
        if records:
            self._seen = int(records[-1]["step"])
        return records


@contextmanager
def follow(learning: Learning, listener: Callable[[Record], None]) -> Iterator[None]:
    """Call the listener with every epoch, from another thread, until the block ends; no epoch is left out.

    Raises:
        Exception: the first error of the listener, at the end of the block.
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
