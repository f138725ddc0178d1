"""`caption_memory`: peak memory of the captioning job's processes at 20,000 images over that at 1,000.

Each size runs in a fresh driver on a fresh local Ray, with a small captioner and small pictures: what could grow with
the number of images is names, chunks, reports, and Ray's own books, not pixels. A thread of the driver looks at every
process five times a second. `own` is anonymous memory; the rest of RSS is code and mapped pages of the object store,
which all processes share. What the driver has more at 20,000 it takes in the first 300 chunks (Ray's books, which are
bounded) and at the end, where parts are merged a hundred at a time; neither grows further.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.claim import Claim
from cluster.tables.captioning import caption
from tvilfm.captioning.conv_captioner import build_conv_captioner
from tvilfm.config import load_config

SIZES = (1_000, 20_000)
HEIGHT, WIDTH, BATCH, WORKERS = 32, 16, 32, 1
EVERY_S = 0.2
ROLES = {"CaptionActor": "captioning actor", "decode_batch": "decoding task"}


def caption_memory() -> Claim:
    """Peaks at both sizes, by role; the ratio is that of the role that grows most."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = ["a man in a coat", "a woman with a bag"]
        build_conv_captioner(folder / "captioner", texts, height=HEIGHT, width=WIDTH, seed=0)
        peaks = []
        for size in SIZES:
            _draw(folder / f"images-{size}", size)
            command = [sys.executable, "-m", "benchmarks.caption_memory", str(folder), str(size)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peaks.append(json.loads(done.stdout.splitlines()[-1]))
    small, large = peaks
    lines = [
        "; ".join(f"{role} {peak['rss']:.0f} MB (own {peak['own']:.0f})" for role, peak in of_size.items())
        for of_size in peaks
    ]
    return Claim(
        name="caption_memory",
        ratio=max(large[role]["rss"] / small[role]["rss"] for role in small),
        goal=1.1,
        higher_is_better=False,
        ours=f"{SIZES[1]} images: {lines[1]}",
        baseline=f"{SIZES[0]} images: {lines[0]}",
    )


def _draw(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.png")


class Peaks:
    """Peak memory of this process and of those below it, by role, while the block runs."""

    def __init__(self) -> None:
        self.of_role: dict[str, dict[str, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(EVERY_S):
            self._look(os.getpid(), "driver")
            for pid in _descendants(os.getpid()):
                title = _read(pid, "cmdline")
                role = next((role for word, role in ROLES.items() if word in title), None)
                if role:
                    self._look(pid, role)

    def _look(self, pid: int, role: str) -> None:
        status = dict(line.split(":", 1) for line in _read(pid, "status").splitlines())
        if "VmRSS" not in status:
            return
        peak = self.of_role.setdefault(role, {"rss": 0.0, "own": 0.0})
        for name, key in (("rss", "VmRSS"), ("own", "RssAnon")):
            peak[name] = max(peak[name], int(status[key].split()[0]) / 1024)


def _descendants(pid: int) -> list[int]:
    parents = {}
    for entry in os.listdir("/proc"):
        stat = _read(int(entry), "stat") if entry.isdigit() else ""
        if stat:
            parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    found, fresh = [], [pid]
    while fresh:
        fresh = [child for child, parent in parents.items() if parent in fresh]
        found += fresh
    return found


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (OSError, ProcessLookupError):  # it ended meanwhile
        return ""


def _run(folder: Path, size: int) -> None:
    model = f"caption.visible={{model: {folder / 'captioner'}, max_new_tokens: 2}}"
    config = load_config(overrides=[model, f"caption.batch={BATCH}", f"caption.workers={WORKERS}"])
    with Peaks() as peaks:
        images = str(folder / f"images-{size}")
        summary = caption(config, out=str(folder / f"out-{size}"), images=images, modality="visible")
    assert summary.captioned == size
    print(json.dumps(peaks.of_role))


CLAIMS = {"caption_memory": caption_memory}

if __name__ == "__main__":
    _run(Path(sys.argv[1]), int(sys.argv[2]))
