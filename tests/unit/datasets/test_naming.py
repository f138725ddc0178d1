"""Layouts that no reader reads are recognized, and the table that the command writes is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.data import app
from tvilfm.config import DataSection
from tvilfm.data.people import people_of
from tvilfm.datasets import read_dataset
from tvilfm.datasets.check import check_dataset
from tvilfm.datasets.naming import write_table
from tvilfm.datasets.synthetic.layouts import Size, write_layout


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("naming") / "own"
    write_layout(root, Size(train=4, val=1, test=5, images_per_camera=1), seed=2, layout="folder")
    return root


def relaid(rendered: Path, root: Path, layout: str) -> dict[str, tuple[str, str, str]]:
    """Copy the images into another layout; return new path -> modality, person, camera."""
    placed = {}
    for path in sorted(rendered.glob("*/*/*/*.jpg")):
        modality, person, camera, file = path.relative_to(rendered).parts
        name = layout.format(modality=modality, person=person, padded=f"{int(person):04d}", camera=camera, file=file)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / name)
        placed[name] = modality, person, camera
    return placed


@pytest.mark.parametrize(
    "layout",
    [
        "{padded}_c{camera}s1_000451_{file}",
        "bounding_box_train/{padded}_c{camera}_{file}",
        "p{person}_cam{camera}_{file}",
        "cam{camera}/{padded}/{file}",
        "{modality}/p{person}/{camera}/track7/{file}",
    ],
)
def test_the_proposed_command_reads_what_the_check_recognizes(rendered: Path, tmp_path: Path, layout: str) -> None:
    placed = relaid(rendered, tmp_path / "own", layout)
    section = DataSection(name="folder", root=tmp_path / "own")
    first, note = check_dataset(section, tmp_path / "own").faults
    assert first.serious and f"{len(placed)} of {len(placed)} images are organized by" in note.what
    assert note.fix.startswith(f"Write manifest.csv with `tvilfm data table {tmp_path / 'own'}")
    assert ("--infrared-cameras" in note.fix) == ("{modality}" not in layout)
    made = CliRunner().invoke(app, ["table", str(tmp_path / "own"), "--infrared-cameras", "3,6"])
    assert made.exit_code == 0 and f"{len(placed)} images of 10 people" in made.output
    manifest = read_dataset("folder", tmp_path / "own")
    people = people_of(manifest)
    found = {
        row["image"]: (row["modality"], people.get(row["pid"], str(row["pid"])).lstrip("p0"), str(row["camid"]))
        for row in manifest.to_pylist()
    }
    assert found == placed
    splits = {row["pid"]: row["split"] for row in manifest.to_pylist()}
    assert [list(splits.values()).count(split) for split in ("train", "val", "test")] == [5, 1, 4]


def test_a_layout_of_another_reader_is_recognized(tmp_path: Path) -> None:
    for layout in ("sysu_mm01", "regdb", "llcm"):
        root = tmp_path / layout
        write_layout(root, Size(train=2, val=1, test=2, images_per_camera=1), seed=0, layout=layout)  # type: ignore[arg-type]
        _, note = check_dataset(DataSection(name="folder", root=root), root).faults
        assert f"looks like {layout}" in note.what and note.fix == f"Set data.name={layout}."


def test_no_table_is_proposed_for_the_layout_that_the_reader_reads(tmp_path: Path) -> None:
    root = tmp_path / "people"
    write_layout(root, Size(train=2, val=1, test=2, images_per_camera=1), seed=0, layout="folder")
    with (root / "splits.csv").open("a") as file:
        file.write("1,test\n")
    (fault,) = check_dataset(DataSection(name="folder", root=root), root).faults
    assert "expected each identity in one split, got 1 in train (line 2) and in test (line 7)" in fault.what


def test_the_cameras_of_each_modality_must_be_told(rendered: Path, tmp_path: Path) -> None:
    relaid(rendered, tmp_path, "{padded}_c{camera}s1_{file}")
    with pytest.raises(ValueError, match=r"expected some of the cameras 1, 2, 3, 4, 5, 6, got none"):
        write_table(tmp_path, [])
    write_table(tmp_path, [3, 6])
    with pytest.raises(ValueError, match=r"manifest.csv: expected no table yet"):
        write_table(tmp_path, [3, 6])
    with pytest.raises(ValueError, match=r"expected images organized by one of: .*; got \['visible/"):
        write_table(_flat(rendered, tmp_path / "flat"), [3])


def _flat(rendered: Path, root: Path) -> Path:
    relaid(rendered, root, "visible/{person}{camera}{file}")
    return root
