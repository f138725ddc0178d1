"""A gallery's writer is killed at any moment: what it acknowledged is there, once, and nothing by halves."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.rows import vector_column, vectors_of

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


def write(uri: str, seed: int) -> None:
    """Until killed: say what is about to be written, write it, say that it is acknowledged."""
    if not sys.stdin.readline():  # the test is over
        return
    gallery = Gallery.open(uri, write=True)
    draw, stamp = random.Random(seed), seed * 10_000
    while True:
        ids = draw.sample([f"person-{n}" for n in range(60)], draw.randint(1, 20))
        what = draw.choices(("upsert", "delete", "compact"), (6, 3, 1))[0]
        stamps = {id: (stamp := stamp + 1) for id in ids} if what == "upsert" else dict.fromkeys(ids, 0)
        os.write(1, (json.dumps({"what": what, "stamps": stamps}) + "\n").encode())
        if what == "upsert":
            gallery.upsert(rows(stamps), space_id=SPACE)
        elif what == "delete":
            gallery.delete(ids)
        else:
            gallery.compact()
        os.write(1, b"done\n")


def after(state: State, write: dict[str, object]) -> State:
    stamps: State = write["stamps"]  # type: ignore[assignment]
    if write["what"] == "upsert":
        return state | stamps
    if write["what"] == "delete":
        return {id: stamp for id, stamp in state.items() if id not in stamps}
    return state


def read(uri: str) -> State:
    """What the gallery holds, every row whole and once."""
    table = Gallery.open(uri).load(None, ["id", "vector", "vector_base", "camid", "image", "thumbnail"])
    ids, stamps = table["id"].to_pylist(), table["camid"].to_pylist()
    assert len(set(ids)) == len(ids)
    for column in ("vector", "vector_base"):
        np.testing.assert_array_equal(vectors_of(table[column]), vector(stamps))
    assert table["image"].to_pylist() == [str(stamp) for stamp in stamps]
    assert table["thumbnail"].to_pylist() == [f"{id}:{stamp}".encode() for id, stamp in zip(ids, stamps, strict=True)]
    return dict(zip(ids, stamps, strict=True))


def start(uri: str, seed: int) -> subprocess.Popen[str]:
    code = f"from tests.jobs.serve.test_gallery_kill import write; write({uri!r}, {seed})"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_acknowledged_write_is_lost_or_doubled_however_the_writer_ends(tmp_path: Path) -> None:
    uri = str(tmp_path / "gallery")
    gallery = Gallery.prepare(uri, space_id=SPACE, dim=DIM)
    gallery.publish()
    gallery.close()
    draw, state, acknowledged, cut_short = random.Random(0), {}, 0, 0
    coming = start(uri, 1)
    for seed in range(1, KILLS + 1):
        writer, coming = coming, start(uri, seed + 1)  # importing takes longer than dying
        assert writer.stdin and writer.stdout and writer.stderr
        writer.stdin.write("go\n")
        writer.stdin.flush()
        first = writer.stdout.readline()
        assert first, writer.stderr.read()
        time.sleep(draw.uniform(0.0, 0.3))
        writer.kill()
        # Not communicate(), which skips what readline() has read ahead.
        said = (first + writer.stdout.read()).splitlines()
        writer.communicate()
        writes = [json.loads(line) for line in said if line != "done"]
        assert len(writes) - 1 <= said.count("done") <= len(writes)
        for done in writes[: said.count("done")]:
            state = after(state, done)
        acknowledged += said.count("done")
        found = read(uri)
        if found != state:
            assert said.count("done") < len(writes), "acknowledged, and not there"
            assert found == after(state, writes[-1]), "neither before nor after the write that was cut short"
            cut_short += 1
            state = found
    coming.kill()
    coming.communicate()
    assert acknowledged > KILLS, "the writers were killed before they wrote"
    Gallery.open(uri, write=True).compact()
    assert read(uri) == state
    print(f"{acknowledged} acknowledged, {cut_short} kept although the writer died before it said so")
