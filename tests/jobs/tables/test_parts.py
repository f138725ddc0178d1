"""The table that grows part by part: whole parts, each image once, whatever was killed when."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.tables import parts as parts_module
from cluster.tables.parts import Parts, alone, part_name
from tvilfm.place import Place


def rows(first: int, count: int) -> pa.Table:
    places = range(first, first + count)
    columns = {"image": [f"cam1/{i:05d}.jpg" for i in places], "caption": [f"sentence {i}" for i in places]}
    return pa.table(columns, schema=pa.schema({"image": pa.string(), "caption": pa.string()}))


def write(parts: Parts, first: int, count: int) -> str:
    name = part_name(rows(first, count)["image"].to_pylist())
    parts.write(name, rows(first, count))
    return name


def test_an_empty_folder_has_no_image_and_no_column(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path / "nowhere"))
    assert parts.done() == set()
    assert parts.read().num_columns == 0
    parts.compact()
    parts.publish(Place(str(tmp_path / "table.parquet")), rows(0, 1).schema)
    assert pq.read_table(tmp_path / "table.parquet").equals(rows(0, 1).slice(0, 0))


def test_a_part_is_found_by_its_name_and_written_over_itself(tmp_path: Path) -> None:
    parts = Parts(f"file://{tmp_path}", "parts", "captions")
    name = write(parts, 0, 3)
    assert parts.has(name) and not parts.has(part_name(["another"]))
    write(parts, 0, 3)
    assert parts.read().equals(rows(0, 3))
    assert [path.name for path in (tmp_path / "parts" / "captions").iterdir()] == [f"{name}.parquet"]


def test_names_follow_from_the_images_in_their_order() -> None:
    assert part_name(["a", "b"]) == part_name(iter(["a", "b"]))
    assert len({part_name(images) for images in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", "c"], ["a"])}) == 5


def test_an_image_that_two_parts_hold_is_read_once_and_in_order(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path))
    write(parts, 4, 4)
    write(parts, 0, 6)
    assert parts.done() == set(rows(0, 8)["image"].to_pylist())
    assert parts.read().equals(rows(0, 8))


@pytest.mark.parametrize("size", [2, 3, 100])
def test_merging_keeps_every_row_once_and_leaves_few_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(parts_module, "PARTS_A_MERGE", size)
    parts = Parts(str(tmp_path))
    for first in range(0, 28, 4):
        write(parts, first, 5)
    parts.compact()
    assert len(list(tmp_path.iterdir())) == -(-7 // size)
    assert parts.read().equals(rows(0, 29))
    write(parts, 29, 2)
    parts.compact()
    assert parts.read().equals(rows(0, 31))
    parts.publish(Place(str(tmp_path / "all" / "table.parquet")), rows(0, 0).schema)
    assert pq.read_table(tmp_path / "all" / "table.parquet").sort_by("image").equals(rows(0, 31))


def test_of_two_rows_of_an_image_reading_and_publishing_keep_the_same(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path))
    for name in ("b", "a", "c"):
        parts.write(name, rows(0, 2).set_column(1, "caption", [[f"{name} 0", f"{name} 1"]]))
    first = ["a 0", "a 1"]  # of the first part by name
    assert parts.read()["caption"].to_pylist() == first
    parts.publish(Place(str(tmp_path / "all" / "table.parquet")), rows(0, 0).schema)
    assert pq.read_table(tmp_path / "all" / "table.parquet")["caption"].to_pylist() == first
    parts.compact()
    assert parts.read()["caption"].to_pylist() == first


def test_merging_leaves_alone_what_was_merged_and_a_part_without_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "PARTS_A_MERGE", 3)
    parts = Parts(str(tmp_path))
    names = sorted(write(parts, first, 4) for first in range(0, 16, 4))
    parts.compact()
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 2 and f"{names[-1]}.parquet" in files
    parts.compact()
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("deletions", [0, 1, 3])
def test_a_merge_that_dies_at_any_moment_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deletions: int
) -> None:
    parts = Parts(str(tmp_path))
    for first in range(0, 16, 4):
        write(parts, first, 4)
    left = [deletions]

    def dying(self: Parts, path: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        os.unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(parts_module, "DELETERS", 1)
        patch.setattr(Parts, "_delete", dying)
        with pytest.raises(KeyboardInterrupt):
            parts.compact()
    assert parts.read().equals(rows(0, 16))
    parts.compact()
    assert parts.read().equals(rows(0, 16))


@pytest.mark.parametrize("job", ["read", "publish", "compact"])
def test_a_reader_survives_a_merge_between_its_listing_and_its_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    parts, other = Parts(str(tmp_path)), Parts(str(tmp_path))
    for first in range(0, 16, 4):
        write(parts, first, 4)
    listed = Parts._paths
    merged = []

    def then_merge(self: Parts) -> list[str]:
        paths = listed(self)
        if self is parts and not merged:
            merged.append(True)
            other.compact()
        return paths

    monkeypatch.setattr(Parts, "_paths", then_merge)
    if job == "compact":
        parts.compact()
        assert len(list(tmp_path.iterdir())) == 1
    elif job == "publish":
        parts.publish(Place(str(tmp_path / "out" / "table.parquet")), rows(0, 1).schema)
        assert pq.read_table(tmp_path / "out" / "table.parquet").sort_by("image").equals(rows(0, 16))
    else:
        assert parts.read().equals(rows(0, 16))
    assert merged


def _write_for_ever(folder: str) -> None:
    parts = Parts(folder)
    table = rows(0, 20_000)
    while True:
        parts.write("part", table)


def test_a_writer_killed_at_any_moment_leaves_no_part_that_is_half_written(tmp_path: Path) -> None:
    for delay_s in (0.05, 0.08):
        writer = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(str(tmp_path),))
        writer.start()
        while not (tmp_path / "part.parquet").exists():
            time.sleep(0.005)
        time.sleep(delay_s)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert Parts(str(tmp_path)).read().equals(rows(0, 20_000))
        assert pq.read_table(tmp_path / "part.parquet").num_rows == 20_000
        (tmp_path / "part.parquet").unlink()


def test_a_folder_that_a_job_fills_is_refused_to_another_and_free_again_after_it(tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match="expected a folder that no other job fills")
    with alone(str(tmp_path)), refused, alone(str(tmp_path)):
        pass
    with alone(str(tmp_path)), alone(str(tmp_path / "another")):
        pass
    assert Parts(str(tmp_path)).done() == set()  # the lock is no part


def test_a_uri_of_no_known_store_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^ftp://host/x: expected a local path or a URI"):
        Parts("ftp://host/x")
