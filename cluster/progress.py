"""Progress of work in other processes: a worker replaces a file, and the driver watches it."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tvilfm.place import write_whole

INTERVAL_S = 0.5
NOTE_INTERVAL_S = 2.0
PROGRESS_FILE = "progress.json"  # in the folder of a stage
PLAIN_INTERVAL_S = 15.0


class ProgressFile:
    """A file in which one worker writes how many units are done, and a short note.

    A worker on a machine that does not have the file's folder writes nothing.

    Args:
        path: of the file.
        unit: what is counted, where it is not the unit that the watching process names.
    """

    def __init__(self, path: Path, unit: str | None = None) -> None:
        self._path, self._unit, self._written = path, unit, 0.0
        self._seen = path.parent.is_dir()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Replace the file, at most every half second, and always at the end."""
        now = time.monotonic()
        if not self._seen or (now - self._written < INTERVAL_S and done < total):
            return
        self._written = now
        write_whole(self._path, json.dumps({"done": done, "total": total, "note": note, "unit": self._unit}))


@contextmanager
def noted(path: Path, note: Callable[[], str]) -> Iterator[None]:
    """While the block runs and `note` returns text, show it in the progress line; then no worker writes the file.

    Args:
        path: the file that a `ProgressFile` writes.
        note: asked every two seconds.
    """

    def write() -> None:
        if text := note():
            state = {"done": 0, "total": 0, "unit": None}
            with suppress(OSError, ValueError):  # no worker has written yet
                state = json.loads(path.read_text())
            write_whole(path, json.dumps({**state, "note": text}))

    with _repeated(write, NOTE_INTERVAL_S):
        yield


@contextmanager
def _repeated(call: Callable[[], None], interval_s: float) -> Iterator[None]:
    """Call a function at intervals, in a thread, while the block runs."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(interval_s):
            call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def watch(path: Path, label: str, unit: str) -> Iterator[None]:
    """Show a bar with rate and time left while the block runs; without a terminal, a line every 15 s.

    Args:
        path: the file that a `ProgressFile` writes.
        label: name of the stage.
        unit: what is counted, unless the file names another unit.
    """
    path.unlink(missing_ok=True)
    console = Console(stderr=True)
    display = _Display(path, label, unit, console)
    started = printed = time.monotonic()

    def follow() -> None:
        nonlocal printed
        line = display.update()
        if line and not console.is_terminal and time.monotonic() - printed > PLAIN_INTERVAL_S:
            printed = time.monotonic()
            console.print(line, highlight=False)

    with display.bar:
        try:
            with _repeated(follow, INTERVAL_S):
                yield
        finally:
            display.update()
    if not console.is_terminal:
        console.print(f"{label}: done in {time.monotonic() - started:.1f} s", highlight=False)


@contextmanager
def counted(label: str, unit: str) -> Iterator[ProgressFile]:
    """Show a bar while the block runs, and provide the file that moves it; see `watch`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PROGRESS_FILE
        with watch(path, label, unit):
            yield ProgressFile(path)


class _Display:
    """The bar of a progress file, and the same as a line of text.

    Attributes:
        bar: the bar, which shows nothing without a terminal.
    """

    def __init__(self, path: Path, label: str, unit: str, console: Console) -> None:
        self._path, self._label, self._unit = path, label, unit
        self._first: tuple[float, int] | None = None  # time and count from which the rate is computed
        self.bar = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self.bar.add_task(label, total=None, rate="", note="")

    def update(self) -> str | None:
        """Read the file and move the bar; return the state as a line, or None if nothing was written yet."""
        try:
            state = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None
        now, count, total, unit = time.monotonic(), state["done"], state["total"], state["unit"] or self._unit
        if self._first is None or count < self._first[1]:  # it counts something else now
            self._first = (now, count)
        seconds, done = now - self._first[0], count - self._first[1]
        rate = left = ""
        if seconds > 0 and done:
            rate = f"{done / seconds:.1f} {unit}/s"
            left = f"{(total - count) * seconds / done:.0f} s left"
        self.bar.update(self._task, completed=count, total=total, rate=rate, note=state["note"])
        counted = f" {count}/{total} {unit}" if total else ""
        parts = (f"{self._label}:{counted}", rate, left, state["note"])
        return "  ".join(str(part) for part in parts if part)
