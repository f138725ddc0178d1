"""Database server and writer are killed at any moment: acknowledged writes are kept, once, and none is half there."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.processes import kill_server, until
from tvilfm.retrieval.exact import ExactIndex
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.rows import Where, vector_column, vectors_of
from tvilfm.retrieval.spaces import Heads

SPACE, DIM, KILLS = "feed-96x48", 4, 20
State = dict[str, int]


def vector(stamps: list[int]) -> np.ndarray:
    """A unit vector that only one stamp has."""
    angle = np.array(stamps, dtype=np.float64) * 1e-4
    zero = np.zeros_like(angle)
    return np.stack([np.cos(angle), np.sin(angle), zero, zero], axis=1).astype(np.float32)


def rows(stamps: State) -> pa.Table:
    """Every column says which write the row is of."""
    column = vector_column(vector(list(stamps.values())))
    return pa.table(
        {
            "id": list(stamps),
            "vector": column,
            "vector_base": column,
            "camid": list(stamps.values()),
            "image": [str(stamp) for stamp in stamps.values()],
            "thumbnail": [f"{id}:{stamp}".encode() for id, stamp in stamps.items()],
        }
    )


def write(url: str, seed: int) -> None:
    """Until killed: say what is about to be written, write it, say that it is acknowledged."""
    if not sys.stdin.readline():  # the test is over
        return
    gallery = Gallery.open(url)
    draw, stamp = random.Random(seed), seed * 10_000
    while True:
        ids = draw.sample([f"person-{n}" for n in range(60)], draw.randint(1, 20))
        what = draw.choices(("upsert", "delete"), (2, 1))[0]
        stamps = {id: (stamp := stamp + 1) for id in ids} if what == "upsert" else dict.fromkeys(ids, 0)
        os.write(1, (json.dumps({"what": what, "stamps": stamps}) + "\n").encode())
        if what == "upsert":
            gallery.upsert(rows(stamps), space_id=SPACE)
        else:
            gallery.delete(ids)
        os.write(1, b"done\n")


def after(state: State, write: dict[str, object]) -> State:
    stamps: State = write["stamps"]  # type: ignore[assignment]
    if write["what"] == "upsert":
        return state | stamps
    return {id: stamp for id, stamp in state.items() if id not in stamps}


def read(gallery: Gallery) -> State:
    """Return what the gallery holds; every row is whole and there once."""
    table = gallery.changes(None).rows
    ids, stamps = table["id"].to_pylist(), [int(camid) for camid in table["camid"].to_pylist()]
    assert len(set(ids)) == len(ids)
    for column in ("vector", "vector_base"):
        np.testing.assert_array_equal(vectors_of(table[column]), vector(stamps))
    assert table["image"].to_pylist() == [str(stamp) for stamp in stamps]
    for id, stamp in zip(ids, stamps, strict=True):
        assert gallery.picture(id) == (str(stamp), f"{id}:{stamp}".encode())
    return dict(zip(ids, stamps, strict=True))


class Writer:
    """A process that writes; its lines are read as they come."""

    def __init__(self, url: str, seed: int) -> None:
        code = f"from tests.jobs.serve.test_gallery_kill import write; write({url!r}, {seed})"
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def await_more(self, count: int) -> None:
        """Wait until more than `count` writes are acknowledged."""

        def enough() -> bool:
            assert self.process.poll() is None, f"the writer ended by itself: {self.told()}"
            return self.acknowledged > count

        until(enough)

    def told(self) -> str:
        """What the process wrote to its standard error."""
        self.errors.seek(0)
        return self.errors.read()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.strip())

    @property
    def acknowledged(self) -> int:
        return self.lines.count("done")

    @property
    def writes(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.lines if line not in ("done", "")]

    def begin(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()


@pytest.mark.long
@pytest.mark.timeout(500)
def test_no_acknowledged_write_is_lost_or_doubled_whatever_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "gallery"
    head_4D = np.ones((4, DIM), dtype=np.float32)
    heads = Heads(current_4D=head_4D, base_4D=head_4D, eps=1e-5, width=DIM)
    gallery = Gallery.prepare(str(folder), space_id=SPACE, heads=heads, encoder="none")
    gallery.publish()
    changes = gallery.changes(None)
    device = torch.device("cpu")
    copy, seen = ExactIndex.load(changes, device=device, half=False), changes.snapshot
    draw, state, acknowledged, cut_short = random.Random(0), {}, 0, 0
    coming = Writer(str(folder), 1)
    for seed in range(1, KILLS + 1):
        writer, coming = coming, Writer(str(folder), seed + 1)  # importing takes longer than dying
        writer.begin()
        writer.await_more(0)
        time.sleep(draw.uniform(0.0, 0.3))
        if seed % 3:  # 1: the server, and the writer continues; 2: both at once; 0: the writer
            kill_server(folder)
        if seed % 3 == 1:
            writer.await_more(writer.acknowledged + 2)
        writer.kill()
        assert len(writer.writes) - 1 <= writer.acknowledged <= len(writer.writes)
        for done in writer.writes[: writer.acknowledged]:
            state = after(state, done)
        acknowledged += writer.acknowledged
        found = read(gallery)
        if found != state:
            assert writer.acknowledged < len(writer.writes), "acknowledged, and missing"
            assert found == after(state, writer.writes[-1]), "neither before nor after the write that was cut short"
            cut_short += 1
            state = found
        changes = gallery.changes(seen)
        copy, seen = ExactIndex.load(changes, device=device, half=False, before=copy), changes.snapshot
        (ranked,) = copy.rank(torch.eye(DIM)[:1], [Where()], 100, base=False)
        assert {row["id"]: int(row["camid"]) for row in ranked.facts.to_pylist()} == state
    coming.kill()
    assert acknowledged > KILLS, "the writers were killed before they wrote"
    print(f"{acknowledged} acknowledged, {cut_short} kept although the writer died before it said so")
