"""The reader of SYSU-MM01's layout and the manifest it fills."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tvilfm.data.manifest import build_manifest, column, fingerprint, rows_of, select
from tvilfm.datasets.readers import read_dataset
from tvilfm.datasets.sysu_mm01 import read

IDS = {"train": "3,1\n", "val": "20", "test": "104,6,\n"}


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """Identities 1, 3 train, 20 val, 6, 104 test; 6 was not seen by camera 2; 500 is in no split file."""
    root = tmp_path / "sysu"
    (root / "exp").mkdir(parents=True)
    for split, text in IDS.items():
        (root / "exp" / f"{split}_id.txt").write_text(text)
    for pid in (1, 3, 20, 6, 104, 500):
        for camid in range(1, 7):
            if (pid, camid) != (6, 2):
                folder = root / f"cam{camid}" / f"{pid:04d}"
                folder.mkdir(parents=True)
                for name in ("0002.jpg", "0001.JPG", "0010.png", "Thumbs.db"):
                    (folder / name).touch()
    return root


def test_rows_carry_identity_camera_modality_and_split(layout: Path) -> None:
    manifest = read(layout)
    assert manifest.num_rows == 3 * (5 * 6 - 1)
    splits = {1: "train", 3: "train", 20: "val"}
    for row in manifest.to_pylist():
        camera, folder, name = row["image"].split("/")
        assert (camera, folder) == (f"cam{row['camid']}", f"{row['pid']:04d}")
        assert name in ("0001.JPG", "0002.jpg", "0010.png")
        assert row["modality"] == ("infrared" if row["camid"] in (3, 6) else "visible")
        test_part = "query" if row["camid"] in (3, 6) else "gallery"
        assert row["split"] == splits.get(row["pid"], test_part)


def test_rows_are_ordered_by_split_file_identity_camera_and_file(layout: Path) -> None:
    expected = [
        f"cam{camid}/{pid:04d}/{name}"
        for pid in (1, 3, 20, 6, 104)
        for camid in range(1, 7)
        if (pid, camid) != (6, 2)
        for name in ("0001.JPG", "0002.jpg", "0010.png")
    ]
    assert read(layout)["image"].to_pylist() == expected


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_missing_split_file_is_named(layout: Path, split: str) -> None:
    (layout / "exp" / f"{split}_id.txt").unlink()
    with pytest.raises(ValueError, match=rf"data\.root: expected the split file .*exp/{split}_id\.txt"):
        read(layout)


@pytest.mark.parametrize("content", [b"1,two,3", b"\xff\xfe\x00\x01", b"1;2"])
def test_garbage_in_a_split_file_is_named(layout: Path, content: bytes) -> None:
    (layout / "exp" / "val_id.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"val_id\.txt: expected comma-separated identity numbers"):
        read(layout)


@pytest.mark.parametrize(("first", "second"), [("train", "val"), ("train", "test"), ("val", "test")])
def test_an_identity_in_two_splits_is_named(layout: Path, first: str, second: str) -> None:
    (layout / "exp" / f"{first}_id.txt").write_text("77,3" if first == "train" else "77,20")
    (layout / "exp" / f"{second}_id.txt").write_text("77,6")
    with pytest.raises(ValueError, match=rf"exp/{second}_id\.txt: .* not in {first}_id\.txt, got pid 77 in both"):
        read(layout)


def test_a_folder_of_another_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bounding_box_train").mkdir()
    with pytest.raises(ValueError, match=r"data\.root: expected SYSU-MM01's folders cam1 to cam6 in .*none of them"):
        read(tmp_path)


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    for folder in ("cam1/0001", "exp"):
        (tmp_path / folder).mkdir(parents=True)
    for split, text in IDS.items():
        (tmp_path / "exp" / f"{split}_id.txt").write_text(text)
    with pytest.raises(ValueError, match="manifest: expected at least one image, got none"):
        read(tmp_path)


def test_the_door_knows_both_names_and_refuses_others(layout: Path, tmp_path: Path) -> None:
    assert read_dataset("sysu_mm01", layout).equals(read(layout))
    assert read_dataset("synthetic", str(layout)).equals(read(layout))
    with pytest.raises(ValueError, match=r"data\.name: expected one of .*sysu_mm01.*, got 'sysu'"):
        read_dataset("sysu", layout)
    with pytest.raises(ValueError, match=r"data\.root: expected the folder of sysu_mm01, got .*nowhere"):
        read_dataset("sysu_mm01", tmp_path / "nowhere")


def test_the_synthetic_benchmark_is_read_whole(tiny_benchmark: Path) -> None:
    manifest = read(tiny_benchmark)
    counts = {split: select(manifest, split=split).num_rows for split in ("train", "val", "query", "gallery")}
    assert counts == {"train": 6 * 8, "val": 2 * 8, "query": 4 * 4, "gallery": 4 * 4}


def row(image: str, modality: str = "visible", split: str = "train", pid: int = 1) -> dict[str, object]:
    return {"image": image, "pid": pid, "camid": 1, "modality": modality, "split": split}


def test_a_manifest_refuses_copies_and_unknown_modalities() -> None:
    with pytest.raises(ValueError, match=r"manifest\.image: expected each image once, got b more than once"):
        build_manifest([row("a"), row("b"), row("b")])
    with pytest.raises(ValueError, match=r"manifest\.modality: expected visible or infrared, got thermal"):
        build_manifest([row("a"), row("b", "thermal")])


def test_selection_keeps_manifest_order_and_rows_find_their_way_back() -> None:
    manifest = build_manifest(
        [row("d", split="val", pid=9), row("b", "infrared", pid=3), row("c", pid=5), row("a", "infrared", "val", 7)]
    )
    assert select(manifest)["image"].to_pylist() == ["d", "b", "c", "a"]
    assert select(manifest, split="train")["image"].to_pylist() == ["b", "c"]
    assert select(manifest, split=("val", "train"), modality="infrared")["image"].to_pylist() == ["b", "a"]
    shuffled = manifest.take([3, 0, 2])
    np.testing.assert_array_equal(rows_of(manifest, shuffled), [3, 0, 2])
    np.testing.assert_array_equal(column(shuffled, "pid"), [7, 9, 5])
    assert column(manifest, "pid").dtype == np.int64


def test_the_fingerprint_changes_with_a_row_or_a_byte_and_not_with_a_time_or_a_folder(tmp_path: Path) -> None:
    manifest = build_manifest([row("a"), row("b")])
    root = tmp_path / "data"
    root.mkdir()
    for name in ("a", "b"):
        (root / name).write_bytes(b"x")
    first = fingerprint(manifest, root=root)
    os.utime(root / "b", (1000, 1001))
    assert fingerprint(manifest, root=root) == first
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    assert fingerprint(manifest, root=tmp_path / "copy") == first
    assert first == fingerprint(build_manifest([row("a"), row("b")]), root=root)
    assert len(first) == 16 and int(first, 16) >= 0
    seen = {first, fingerprint(manifest), fingerprint(build_manifest([row("a"), row("b", pid=2)]), root=root)}
    (root / "b").write_bytes(b"y")
    seen.add(fingerprint(manifest, root=root))
    (root / "b").write_bytes(b"xy")
    seen.add(fingerprint(manifest, root=root))
    assert len(seen) == 5
