"""Odd trees and tables: what is read equals the tree, what is not read is counted, and what is wrong is named."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tvilfm.data.people import people_of
from tvilfm.datasets import read_dataset
from tvilfm.datasets.check_images import file_faults

SUFFIXES = (".jpg", ".JPEG", ".png", ".Bmp", ".tif", ".TIFF", ".webp")
OTHER = (".gif", ".heic", ".xyz")
SYSTEM = ("Thumbs.db", "._a.jpg", ".DS_Store", "desktop.ini")

person = st.sampled_from(["1", "0001", "2", "p2", "p10", "alice", "-1", "Zo\u00eb", "a b", "99999999999999999999"])
place = st.tuples(
    st.sampled_from(["visible", "infrared"]),
    person,
    st.sampled_from(["1", "2", "03"]),
    st.sampled_from([(), ("track",), ("a", "b")]),
    st.sampled_from(["a", "b", "\u00fc #%"]),
    st.sampled_from([*SUFFIXES, *OTHER]),
)
quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextmanager
def silent() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def same(written: str) -> str:
    return str(int(written)) if re.fullmatch(r"-?\d+", written) else written


@quick
@given(places=st.lists(place, min_size=1, max_size=20, unique=True), shallow=st.booleans(), system=st.booleans())
def test_a_tree_is_read_as_it_is_and_everything_else_is_counted(
    tmp_path_factory: pytest.TempPathFactory,
    places: list[tuple[str, str, str, tuple[str, ...], str, str]],
    shallow: bool,
    system: bool,
) -> None:
    root = tmp_path_factory.mktemp("tree")
    expected, deeper, others = {}, set(), set()
    for modality in ("visible", "infrared"):
        (root / modality).mkdir()
    for modality, pid, camera, below, stem, suffix in places:
        path = root.joinpath(modality, pid, camera, *below, stem + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        name = path.relative_to(root).as_posix()
        if suffix in OTHER:
            others.add(name)
        elif below:
            deeper.add(name)
        else:
            expected[name] = modality, same(pid), int(camera)
        if system:
            for junk in SYSTEM:
                (path.parent / junk).touch()
    if shallow:
        (root / "visible" / "loose.jpg").touch()
        deeper.add("visible/loose.jpg")
    people = {pid for _, pid, _ in expected.values() if not pid.startswith("-")}
    if not people:
        with silent(), pytest.raises(ValueError, match=r"expected (images in visible/|at least one image)"):
            read_dataset("folder", root)
        return
    with silent():
        manifest = read_dataset("folder", root)
    names = people_of(manifest)
    found = {
        row["image"]: (row["modality"], same(names.get(row["pid"], str(row["pid"]))), row["camid"])
        for row in manifest.to_pylist()
    }
    assert found == {name: facts for name, facts in expected.items() if not facts[1].startswith("-")}
    unread = deeper | (expected.keys() - found.keys())
    counts = {True: 0, False: 0}
    for fault in file_faults(root, manifest):
        counts["suffix" in fault.what] += sum(int(line.split(" x ")[0]) for line in fault.where)
    assert counts == {False: len(unread), True: len(others)}


value = st.sampled_from(["", " ", "nan", "1", "0042", "x", "-1", "visible", "train", "2.5", "\u200b", "a,b", 'q"'])


@quick
@given(rows=st.lists(st.tuples(person, st.integers(0, 3), st.sampled_from(["visible", "infrared"])), min_size=1),
       column=st.sampled_from(["image", "pid", "camid", "modality", "split"]), odd=value,
       encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), end=st.sampled_from(["\n", "\r\n"]))  # fmt: skip
def test_a_table_with_an_odd_value_is_read_as_written_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, int, str]],
    column: str,
    odd: str,
    encoding: str,
    end: str,
) -> None:
    root = tmp_path_factory.mktemp("table")
    table = [
        {"image": f"{n}.png", "pid": pid, "camid": str(camid), "modality": modality, "split": "train"}
        for n, (pid, camid, modality) in enumerate(rows)
    ]
    for row in table:
        (root / row["image"]).touch()
    table[0][column] = odd
    with (root / "manifest.csv").open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]), lineterminator=end)
        writer.writeheader()
        writer.writerows(table)
    try:
        manifest = read_dataset("folder", root)
    except ValueError as error:
        assert str(root) in str(error) or "manifest: expected at least one image" in str(error)
        assert column != "pid" or not odd.strip() or all(row["pid"] == "-1" for row in table)
        return
    names = people_of(manifest)
    found = {row["image"]: same(names.get(row["pid"], str(row["pid"]))) for row in manifest.to_pylist()}
    assert found == {row["image"]: same(row["pid"].strip()) for row in table if same(row["pid"].strip()) != "-1"}


def test_a_missing_person_of_pandas_is_not_a_person_called_nan(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    columns = {"image": ["a.png", "b.png"], "pid": [1.0, float("nan")], "camid": [1, 1], "modality": ["visible"] * 2}
    pq.write_table(pa.table({**columns, "split": ["train"] * 2}), tmp_path / "manifest.parquet")
    with pytest.raises(ValueError, match=r"manifest.parquet: expected a value in every row of pid, .* in row 2"):
        read_dataset("folder", tmp_path)
