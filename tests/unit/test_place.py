"""Local files, object stores and locks through one class."""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tvilfm.place import Place, lock, write_whole


def test_a_local_place_is_absolute_and_its_children_are_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = Place("out")
    assert place.is_relative and place.is_local and not place.is_uri
    assert place.path == place.absolute == str(tmp_path / "out")
    below = place / "a" / "b.json"
    below.write(b"content")
    assert (tmp_path / "out" / "a" / "b.json").read_bytes() == below.read() == b"content"
    assert below.is_file() and not (place / "a").is_file() and not (place / "c").is_file()
    with pytest.raises(FileNotFoundError):
        (place / "c").read()


@pytest.mark.parametrize(
    ("uri", "below", "shown"),
    [
        ("s3://key:secret@bucket/out?scheme=http", "s3://key:secret@bucket/out/x?scheme=http", "s3://bucket/out"),
        ("gs://bucket/out/", "gs://bucket/out/x", "gs://bucket/out/"),
        ("runs/a", "runs/a/x", "runs/a"),
    ],
)
def test_a_child_keeps_the_options_and_str_hides_them(uri: str, below: str, shown: str) -> None:
    place = Place(uri)
    assert (place / "x").uri == below and str(place) == shown


def test_names_below_a_uri_need_no_escapes(tmp_path: Path) -> None:
    folder = Place(f"file://{tmp_path}")
    assert folder.is_uri and folder.is_local
    (folder / "day 2 #1?.txt").write(b"x")
    again: Place = pickle.loads(pickle.dumps(folder / "day 2 #1?.txt"))
    assert (tmp_path / "day 2 #1?.txt").read_bytes() == again.read() == b"x"


@pytest.mark.parametrize("mode", [None, 0o600])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int | None
) -> None:
    path = tmp_path / "file"
    write_whole(path, "old", mode=mode)
    if mode is not None:
        assert stat.S_IMODE(path.stat().st_mode) == mode

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new", durable=True)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("file", "old")]


def test_a_lock_is_held_against_other_processes_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "one"
    code = f"from pathlib import Path; from tvilfm.place import lock; lock(Path({str(path)!r}), wait=False)"
    command = [sys.executable, "-c", code]
    with lock(path):
        with pytest.raises(BlockingIOError):
            lock(path, wait=False)
        assert subprocess.run(command, capture_output=True).returncode == 1
    assert subprocess.run(command, capture_output=True).returncode == 0
