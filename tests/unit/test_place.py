"""Local files, object stores and locks through one class."""

from __future__ import annotations

import errno
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tvilfm.data.pixels import create
from tvilfm.place import Place, full_disk_named, lock, write_whole


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


def test_a_full_disk_is_named_with_its_folder_and_the_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=rf"{tmp_path}: expected 1.2 GB for 10000 images of 288 x 144, got a full disk"):
        create(tmp_path / "pixels.npy", 10_000, height=288, width=144)
    with pytest.raises(OSError, match="expected 1 MB for 10 images"), full_disk_named(tmp_path, "the stage pixels"):
        create(tmp_path / "pixels.npy", 10, height=288, width=144)  # the first that names it is right
    # As workers and libraries report it: another type, or text only.
    for error in (ValueError("worker: [Errno 28] No space left on device"), OSError(errno.EDQUOT, "quota")):
        with (
            pytest.raises(OSError, match=rf"{tmp_path}: expected more space for the stage text, got a full disk"),
            full_disk_named(tmp_path, "the stage text"),
        ):
            raise error
    with pytest.raises(OSError, match=rf"B free in {tmp_path},"), full_disk_named(tmp_path / "a/b", "it"):
        raise RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/1: file write failed")
    with pytest.raises(ValueError, match="another"), full_disk_named(tmp_path, "the stage text"):
        raise ValueError("another")


def test_the_space_of_pixels_is_reserved(tmp_path: Path) -> None:
    create(tmp_path / "pixels.npy", 100, height=288, width=144)
    assert (tmp_path / "pixels.npy").stat().st_blocks * 512 >= 100 * 288 * 144 * 3
