"""Which files are images: every suffix, no system file, and each real file once however links are laid."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.tables.images import list_images as images_to_caption
from cluster.tables.images import reference
from tvilfm.data.image_files import images_in, list_files, list_images, patterns, require_text_names
from tvilfm.place import Place
from tvilfm.retrieval.find import list_images as images_to_find


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def test_images_of_every_suffix_are_listed_without_system_files(tmp_path: Path) -> None:
    wanted = ["a.jpg", "b.JPEG", "c.png", "d.bmp", "e.tif", "f.TIFF", "g.webp", "deep/er/h.jpg"]
    system = ["._a.jpg", "Thumbs.db", "thumbs.db", "Desktop.ini", ".DS_Store", "__MACOSX/a.jpg", "x/@eaDir/a.jpg"]
    make(tmp_path, *wanted, *system, "notes.txt", "movie.gif")
    assert list_images(tmp_path) == sorted(wanted)
    assert list_files(tmp_path) == sorted([*wanted, "notes.txt", "movie.gif"])
    assert [path.name for path in images_in(tmp_path)] == [name for name in sorted(wanted) if "/" not in name]
    assert images_to_find(tmp_path) == images_to_caption(str(tmp_path), "visible")["image"].to_pylist()
    assert list_images(tmp_path / "nowhere") == []


def test_each_real_file_is_listed_once_and_loops_end(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    make(root, "day1/a.jpg", "day1/b.jpg", "day2/c.jpg", "day2/d.jpg")
    make(elsewhere, "e.jpg")
    (root / "latest").symlink_to("day2")
    (root / "Alatest").symlink_to(".")
    (root / "day1/up").symlink_to("..")
    (root / "day2/top").symlink_to("../..")
    (root / "a.jpg").symlink_to("day1/a.jpg")
    (root / "other").symlink_to(elsewhere)
    (root / "other2").symlink_to(elsewhere)
    (root / "x").symlink_to("y")
    (root / "y").symlink_to("x")
    assert list_images(root) == ["day1/a.jpg", "day1/b.jpg", "day2/c.jpg", "day2/d.jpg", "other/e.jpg"]
    link = tmp_path / "link"
    link.symlink_to(root)
    assert list_images(link) == list_images(root)
    (root / "day1/gone.jpg").symlink_to("nowhere")
    assert "day1/gone.jpg" in list_images(root)  # it is reported when it is opened
    (root / "day1/z.jpg").symlink_to("b.jpg")
    assert [path.name for path in images_in(root / "day1")] == ["a.jpg", "b.jpg", "gone.jpg"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_random_tree_with_links_lists_the_real_files(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("tree")
    folders = [root]
    for number in range(data.draw(st.integers(1, 5))):
        folder = data.draw(st.sampled_from(folders)) / f"f{number}"
        folder.mkdir()
        folders.append(folder)
    for number in range(data.draw(st.integers(0, 6))):
        (data.draw(st.sampled_from(folders)) / f"{number}.jpg").touch()
    expected = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.jpg"))
    targets = [*folders, *root.rglob("*.jpg"), root.parent]
    for number in range(data.draw(st.integers(0, 5))):
        (data.draw(st.sampled_from(folders)) / f"l{number}.jpg").symlink_to(data.draw(st.sampled_from(targets)))
    assert list_images(root) == expected


def test_an_image_has_one_id_however_its_folder_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "b/a.jpg", "c/x")
    (tmp_path / "link").symlink_to("b")
    monkeypatch.chdir(tmp_path)
    written = ["b", "b/", "./b", "c/../b", str(tmp_path / "b"), f"file://{tmp_path}/b", f"file://{tmp_path}/b/", "link"]
    assert {reference(Place(folder), "a.jpg") for folder in written} == {str(tmp_path / "b/a.jpg")}


def test_names_that_are_not_text_are_shown(tmp_path: Path) -> None:
    make(tmp_path, "good.jpg")
    (tmp_path / os.fsdecode(b"gr\xfcn.jpg")).touch()
    assert len(list_images(tmp_path)) == 2
    with pytest.raises(ValueError, match=r"expected file names in UTF-8, got 'gr\\xfcn.jpg' \(often Latin-1\)"):
        require_text_names(tmp_path, list_images(tmp_path))
    with pytest.raises(ValueError, match=rf"{tmp_path}: expected file names in UTF-8"):
        images_to_caption(str(tmp_path), "visible")


def test_names_are_grouped_by_pattern() -> None:
    assert patterns(["a.JPG", "visible/1/2/x.jpg", "visible/3/4/y.jpg", "visible/3/4/z"]) == {
        "*.jpg": ["a.JPG"],
        "visible/*/*/*.jpg": ["visible/1/2/x.jpg", "visible/3/4/y.jpg"],
        "visible/*/*/*": ["visible/3/4/z"],
    }
