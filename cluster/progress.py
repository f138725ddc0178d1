"""Progress of work in other processes: a worker replaces a file, and the driver watches it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tvilfm.place import write_whole

INTERVAL_S = 0.5
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
def watch(path: Path, label: str, unit: str) -> Iterator[None]:
    """Show a bar with rate and time left while the block runs; without a terminal, a line every 15 s.

    Args:
        path: the file that a `ProgressFile` writes.
        label: name of the stage.
        unit: what is counted, unless the file names another unit.
    """
    path.unlink(missing_ok=True)
    console = Console(stderr=True)
    stop = threading.Event()
    started = time.monotonic()
    bar = Progress(
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
    task = bar.add_task(label, total=None, rate="", note="")
    first: list[tuple[float, int]] = []

    def show() -> dict[str, object] | None:
        try:
            state = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        now = time.monotonic()
        if not first or state["done"] < first[0][1]:  # it counts something else now
            first[:] = [(now, state["done"])]
        seconds, done = now - first[0][0], state["done"] - first[0][1]
        rate = left = ""
        if seconds > 0 and done:
            rate = f"{done / seconds:.1f} {state['unit'] or unit}/s"
            left = f"{(state['total'] - state['done']) * seconds / done:.0f} s left"
        bar.update(task, completed=state["done"], total=state["total"], rate=rate, note=state["note"])
        return {**state, "rate": rate, "left": left}

    def follow() -> None:
        printed = time.monotonic()
        while not stop.wait(INTERVAL_S):
            state = show()
            if state and not console.is_terminal and time.monotonic() - printed > PLAIN_INTERVAL_S:
                printed = time.monotonic()
                parts = (
                    f"{label}: {state['done']}/{state['total']} {state['unit'] or unit}",
                    state["rate"],
                    state["left"],
                    state["note"],
                )
                console.print("  ".join(str(part) for part in parts if part), highlight=False)

    thread = threading.Thread(target=follow, daemon=True)
    with bar:
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            show()
    if not console.is_terminal:
        console.print(f"{label}: done in {time.monotonic() - started:.1f} s", highlight=False)
