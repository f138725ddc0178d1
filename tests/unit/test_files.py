"""Digests of files: the bytes decide, and the cache saves reading them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tvilfm import files
from tvilfm.files import content_digests


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read."""
    names: list[str] = []
    digest = files._digest

    def noted(path: Path) -> bytes:
        names.append(path.name)
        return digest(path)

    monkeypatch.setattr(files, "_digest", noted)
    return names


def _files(root: Path, **contents: bytes) -> None:
    root.mkdir(exist_ok=True)
    for name, data in contents.items():
        (root / name).write_bytes(data)


def test_digests_are_those_of_the_bytes_in_the_order_asked_for(tmp_path: Path) -> None:
    _files(tmp_path / "data", a=b"one", b=b"two" * 100_000)
    expected = [hashlib.blake2b(data, digest_size=16).digest() for data in (b"two" * 100_000, b"one")]
    for _ in range(2):
        assert content_digests(tmp_path / "data", ["b", "a"], cache=tmp_path / "cache" / "c.sqlite") == expected


def test_a_second_call_reads_only_the_files_that_changed(tmp_path: Path, read: list[str]) -> None:
    root, cache = tmp_path / "data", tmp_path / "c.sqlite"
    _files(root, a=b"1", b=b"2", c=b"3")
    first = content_digests(root, ["a", "b", "c"], cache=cache)
    assert sorted(read) == ["a", "b", "c"]
    read.clear()
    assert content_digests(root, ["a", "b", "c"], cache=cache) == first and read == []
    _files(root, b=b"4")
    os.utime(root / "b", ns=(1, 1))
    changed = content_digests(root, ["a", "b", "c"], cache=cache)
    assert read == ["b"] and changed[1] != first[1] and changed[::2] == first[::2]


def test_another_folder_with_equal_names_has_its_own_digests(tmp_path: Path) -> None:
    for name, data in (("x", b"1"), ("y", b"2")):
        _files(tmp_path / name, a=data)
        os.utime(tmp_path / name / "a", ns=(1, 1))
    one, other = (content_digests(tmp_path / name, ["a"], cache=tmp_path / "c.sqlite") for name in ("x", "y"))
    assert one != other


@pytest.mark.parametrize("damage", ["garbage", "folder", "other table"])
def test_a_cache_that_cannot_be_used_costs_time_and_nothing_else(tmp_path: Path, damage: str) -> None:
    root, cache = tmp_path / "data", tmp_path / "c.sqlite"
    _files(root, a=b"1")
    expected = content_digests(root, ["a"], cache=tmp_path / "good.sqlite")
    if damage == "garbage":
        cache.write_bytes(b"no database" * 1000)
    elif damage == "folder":
        cache.mkdir()
    else:
        files.sqlite3.connect(cache).execute("CREATE TABLE content (a)").connection.close()
    assert content_digests(root, ["a"], cache=cache) == expected


def test_names_that_are_no_utf8_are_cached_too(tmp_path: Path, read: list[str]) -> None:
    name = os.fsdecode(b"\xe9.png")  # as an archive from another system leaves it
    _files(tmp_path / "data", **{name: b"1"})
    digests = [content_digests(tmp_path / "data", [name], cache=tmp_path / "c.sqlite") for _ in range(2)]
    assert digests[0] == digests[1] and read == [name]


def test_a_dataset_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    _files(tmp_path / "data", a=b"1")
    (tmp_path / "data").chmod(0o555)
    content_digests(tmp_path / "data", ["a"], cache=tmp_path / "c.sqlite")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["a"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        content_digests(tmp_path, ["absent"], cache=tmp_path / "c.sqlite")
