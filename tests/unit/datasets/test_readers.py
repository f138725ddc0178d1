"""Readers on rendered datasets in each layout, on broken ones, and under the protocols."""

from __future__ import annotations

import hashlib
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from tvilfm.config import load_config
from tvilfm.data.manifest import MANIFEST_SCHEMA, column, select
from tvilfm.data.people import people_of
from tvilfm.data.splits import held_out
from tvilfm.data.tri_modal import TrainingRows
from tvilfm.datasets import read_dataset
from tvilfm.datasets.caption_files import read_captions
from tvilfm.datasets.folder import split_rule
from tvilfm.datasets.synthetic.layouts import Layout, Size, write_layout
from tvilfm.evaluation.metrics import ranking_metrics
from tvilfm.evaluation.protocols import get_protocol, select_gallery, select_query, witness_captions

SIZE = Size(train=9, val=2, test=5, images_per_camera=1)
SIZES: dict[Layout, Size] = {"regdb": replace(SIZE, images_per_camera=3), "llcm": SIZE, "folder": SIZE}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    top = tmp_path_factory.mktemp("layouts")
    for layout, size in SIZES.items():
        write_layout(top / layout, size, seed=5, layout=layout)
    return {layout: top / layout for layout in SIZES}


@pytest.fixture
def regdb(rendered: dict[Layout, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered["regdb"], tmp_path / "regdb"))


@pytest.fixture
def llcm(rendered: dict[Layout, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered["llcm"], tmp_path / "llcm"))


@pytest.fixture
def own(rendered: dict[Layout, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered["folder"], tmp_path / "own"))


def pids(manifest: pa.Table, *splits: str) -> set[int]:
    return set(select(manifest, split=splits)["pid"].to_pylist())


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("count", [1, 2, 9, 10, 206, 713])
def test_every_tenth_training_identity_is_held_out_and_at_least_one(count: int) -> None:
    shuffled = np.random.default_rng(0).permutation(np.arange(100, 100 + 3 * count, 3)).tolist()
    expected = {pid for position, pid in enumerate(sorted(shuffled), start=1) if position % 10 == 0}
    if not expected and count > 1:
        expected = {max(shuffled)}
    assert held_out(shuffled) == expected


@pytest.mark.parametrize("layout", ["regdb", "llcm", "folder"])
def test_a_manifest_has_the_columns_and_only_images_that_are_there(
    rendered: dict[Layout, Path], layout: Layout
) -> None:
    manifest = read_dataset(layout, rendered[layout])
    assert manifest.schema.equals(MANIFEST_SCHEMA)
    assert all((rendered[layout] / image).is_file() for image in manifest["image"].to_pylist())
    train, val, test = pids(manifest, "train"), pids(manifest, "val"), pids(manifest, "test")
    assert not (train & test or train & val or val & test)
    assert len(train | val) == SIZE.train + SIZE.val and len(test) == SIZE.test
    assert TrainingRows.from_manifest(manifest, use_val=False).num_classes == len(train)
    captions = read_captions(manifest, rendered[layout])
    assert captions["image"].to_pylist() == manifest["image"].to_pylist()


@pytest.mark.parametrize("layout", ["regdb", "llcm", "folder"])
def test_the_same_seed_renders_the_same_bytes(rendered: dict[Layout, Path], layout: Layout, tmp_path: Path) -> None:
    write_layout(tmp_path / "again", SIZES[layout], seed=5, layout=layout)
    assert digests(tmp_path / "again") == digests(rendered[layout])
    with pytest.raises(FileExistsError, match="out: expected a folder that does not exist"):
        write_layout(tmp_path / "again", SIZES[layout], seed=5, layout=layout)


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_regdb_pids_are_the_folders_whatever_the_labels_say(rendered: dict[Layout, Path]) -> None:
    for split in range(1, 11):
        manifest = read_dataset("regdb", rendered["regdb"], split=split)
        assert manifest["pid"].to_pylist() == [int(image.split("/")[1]) for image in manifest["image"].to_pylist()]
        assert set(select(manifest, modality="visible")["camid"].to_pylist()) == {1}
        assert set(select(manifest, modality="infrared")["camid"].to_pylist()) == {2}
        lists = rendered["regdb"] / "idx"
        listed = [line.split()[0] for line in (lists / f"test_thermal_{split}.txt").read_text().splitlines()]
        assert select(manifest, split="test", modality="infrared")["image"].to_pylist() == listed
        trained = {int(line.split("/")[1]) for line in (lists / f"train_visible_{split}.txt").read_text().splitlines()}
        assert pids(manifest, "val") == {sorted(trained)[9]}  # 11 training identities: the tenth
        assert pids(manifest, "train", "val") == trained


def test_regdb_splits_share_identities(rendered: dict[Layout, Path]) -> None:
    tested = [pids(read_dataset("regdb", rendered["regdb"], split=split), "test") for split in range(1, 11)]
    assert len({frozenset(one) for one in tested}) > 1
    trained = pids(read_dataset("regdb", rendered["regdb"], split=1), "train", "val")
    assert any(trained & one for one in tested[1:])


def test_regdb_refuses_a_split_it_does_not_have(regdb: Path) -> None:
    with pytest.raises(ValueError, match=r"data.split: expected 1 to 10, got 11"):
        read_dataset("regdb", regdb, split=11)


def test_regdb_names_a_missing_list(regdb: Path) -> None:
    (regdb / "idx" / "test_thermal_4.txt").unlink()
    read_dataset("regdb", regdb, split=3)
    with pytest.raises(ValueError, match=r"data.root: expected the split file .*test_thermal_4.txt"):
        read_dataset("regdb", regdb, split=4)


def test_regdb_names_a_missing_folder(regdb: Path) -> None:
    (regdb / "Thermal").rename(regdb / "thermal2")
    with pytest.raises(ValueError, match=r"data.root: expected RegDB's folders Visible and Thermal .* got no Thermal"):
        read_dataset("regdb", regdb)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Thermal/", "Visible/", r"train_thermal_1.txt: expected Thermal/<identity>/<file>, got 'Visible/"),
        (" 0\n", "\n", r"train_thermal_1.txt:1: expected 'image label', got"),
        (" 0\n", " zero\n", r"train_thermal_1.txt:1: expected 'image label', got"),
    ],
)
def test_regdb_names_a_malformed_line(regdb: Path, old: str, new: str, message: str) -> None:
    edit(regdb / "idx" / "train_thermal_1.txt", old, new)
    with pytest.raises(ValueError, match=message):
        read_dataset("regdb", regdb)


def test_regdb_refuses_lists_whose_modalities_differ(regdb: Path) -> None:
    path = regdb / "idx" / "test_visible_1.txt"
    lines = path.read_text().splitlines()
    pid = lines[0].split("/")[1]
    path.write_text("\n".join(line for line in lines if line.split("/")[1] != pid))
    with pytest.raises(ValueError, match=rf"same identities in both modalities, got pid {pid} in one"):
        read_dataset("regdb", regdb)


def test_an_identity_in_two_splits_is_named(regdb: Path) -> None:
    train, test = regdb / "idx" / "train_visible_1.txt", regdb / "idx" / "test_visible_1.txt"
    first = train.read_text().splitlines()[0]
    other = (regdb / first.split()[0]).with_name("copy.bmp")
    shutil.copy(regdb / first.split()[0], other)
    pid = first.split("/")[1]
    for path, folder in ((test, "Visible"), (regdb / "idx" / "test_thermal_1.txt", "Thermal")):
        image = other if folder == "Visible" else regdb / "Thermal" / pid / "copy.bmp"
        shutil.copy(other, image) if image != other else None
        path.write_text(path.read_text() + f"{folder}/{pid}/copy.bmp 99\n")
    with pytest.raises(ValueError, match=rf"each identity in one split, got pid {pid} in (train|val) and test"):
        read_dataset("regdb", regdb)
    assert read_dataset("regdb", regdb, strict=False).num_rows


def test_a_listed_image_that_is_not_there_is_named(regdb: Path) -> None:
    image = read_dataset("regdb", regdb)["image"][3].as_py()
    (regdb / image).unlink()
    with pytest.raises(ValueError, match=rf"got 1 of \d+ missing, the first {image}"):
        read_dataset("regdb", regdb)


def test_llcm_test_images_are_those_that_the_protocol_walks(rendered: dict[Layout, Path]) -> None:
    manifest = read_dataset("llcm", rendered["llcm"])
    for row in manifest.to_pylist():
        parts = row["image"].split("/")
        if row["split"] == "test":
            assert parts[0] == {"visible": "test_vis", "infrared": "test_nir"}[row["modality"]]
            assert parts[1] == f"cam{row['camid']}"
        else:
            assert parts[0] == {"visible": "vis", "infrared": "nir"}[row["modality"]]
        assert parts[-2] == f"{row['pid']:04d}"
        assert f"_c{row['camid']:02d}_" in parts[-1]
    assert set(select(manifest, modality="infrared")["camid"].to_pylist()) == {1, 2, 4, 5, 6, 7, 8, 9}
    assert set(select(manifest, modality="visible")["camid"].to_pylist()) == set(range(1, 10))
    assert len(pids(manifest, "val")) == 1


def test_llcm_reads_its_test_lists_where_the_test_folders_are_not_there(llcm: Path) -> None:
    walked = read_dataset("llcm", llcm)
    shutil.rmtree(llcm / "test_nir")
    listed = read_dataset("llcm", llcm)
    key = ("pid", "camid", "modality", "split")
    names = [[(row["image"].split("/")[-1], *(row[k] for k in key)) for row in m.to_pylist()] for m in (walked, listed)]
    assert sorted(names[0]) == sorted(names[1])
    assert read_captions(listed, llcm).num_rows == listed.num_rows


@pytest.mark.parametrize("name", ["train_vis.txt", "train_nir.txt", "test_id.txt"])
def test_llcm_names_a_missing_list(llcm: Path, name: str) -> None:
    (llcm / "idx" / name).unlink()
    with pytest.raises(ValueError, match=rf"data.root: expected the split file .*{name}"):
        read_dataset("llcm", llcm)


def test_llcm_names_a_wrong_layout(llcm: Path) -> None:
    edit(llcm / "idx" / "train_nir.txt", "_c01_", "_cam_")
    with pytest.raises(ValueError, match=r"train_nir.txt: expected nir/<identity>/<identity>_c<camera>_\*.jpg"):
        read_dataset("llcm", llcm)
    shutil.rmtree(llcm / "nir")
    with pytest.raises(ValueError, match=r"data.root: expected LLCM's folders vis and nir .* got no nir"):
        read_dataset("llcm", llcm)


def test_llcm_names_a_list_that_holds_other_text(llcm: Path) -> None:
    (llcm / "idx" / "test_id.txt").write_text("1,2,three\n")
    with pytest.raises(ValueError, match=r"test_id.txt: expected comma-separated identity numbers"):
        read_dataset("llcm", llcm)


def test_a_folder_goes_by_its_splits_file(own: Path) -> None:
    manifest = read_dataset("folder", own)
    assert len(pids(manifest, "val")) == SIZE.val
    assert {int(image.split("/")[2]) for image in manifest["image"].to_pylist()} == {1, 2, 3, 4, 5, 6}
    pid = min(pids(manifest, "train"))
    edit(own / "splits.csv", f"\n{pid},train\n", f"\n{pid},test\n")
    assert pid in pids(read_dataset("folder", own), "test")
    edit(own / "splits.csv", f"\n{pid},test\n", "\n")
    with pytest.raises(ValueError, match=rf"splits.csv: expected a line for every identity, got none for pid {pid}"):
        read_dataset("folder", own)


def test_a_folder_without_splits_is_split_by_a_rule_that_is_said(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    (own / "splits.csv").unlink()
    with caplog.at_level(logging.WARNING):
        manifest = read_dataset("folder", own)
    assert "split by rule: 8 train, 2 val, 6 test" in caplog.text
    assert read_dataset("folder", own).equals(manifest)
    assert len(pids(manifest, "test")) == 6


@pytest.mark.parametrize(("count", "train", "val"), [(3, 2, 1), (10, 5, 1), (100, 50, 10), (412, 206, 41)])
def test_the_rule_gives_half_a_tenth_and_the_rest(count: int, train: int, val: int) -> None:
    split_of = split_rule(list(range(7, 7 + count)))
    counts = [list(split_of.values()).count(split) for split in ("train", "val", "test")]
    assert counts == [train, val, count - train - val]
    assert split_of == split_rule(list(reversed(range(7, 7 + count))))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_gives_the_same_manifest_as_the_tree(own: Path, tmp_path: Path, suffix: str) -> None:
    manifest = read_dataset("folder", own)
    path = own / f"manifest{suffix}"
    write(manifest, path)
    assert read_dataset("folder", own).equals(manifest)
    elsewhere = tmp_path / f"list{suffix}"
    path.rename(elsewhere)
    (own / "splits.csv").unlink()
    assert read_dataset("folder", own, table=elsewhere).equals(manifest)


def renamed(own: Path, names: dict[int, str]) -> pa.Table:
    """The dataset as a table whose identities are written as given, read again."""
    manifest = read_dataset("folder", own)
    column = pa.array([names[pid] for pid in manifest["pid"].to_pylist()])
    write(manifest.set_column(1, "pid", column), own / "manifest.csv")
    return read_dataset("folder", own)


def test_identities_may_be_text_whose_original_is_kept(own: Path) -> None:
    manifest = read_dataset("folder", own)
    pids_of = sorted(set(manifest["pid"].to_pylist()))
    names = {pid: f"{'pq'[place % 2]}{place:d}" for place, pid in enumerate(pids_of)} | {pids_of[0]: "alice"}
    found = renamed(own, names)
    people = people_of(found)
    assert [people[pid] for pid in found["pid"].to_pylist()] == [names[pid] for pid in manifest["pid"].to_pylist()]
    assert sorted(people) == list(range(1, len(pids_of) + 1))
    for name in ("image", "camid", "modality", "split"):
        assert found[name].equals(manifest[name])
    (own / "manifest.csv").unlink()
    pid = pids_of[1]
    for modality in ("visible", "infrared"):
        (folder,) = [path for path in (own / modality).iterdir() if int(path.name) == pid]
        folder.rename(folder.with_name("99999999999999999999"))
    edit(own / "splits.csv", f"\n{pid},", "\n99999999999999999999,")
    tree = read_dataset("folder", own)
    assert "99999999999999999999" in people_of(tree).values() and tree.num_rows == manifest.num_rows


def test_nobody_is_left_out_or_kept_in_the_gallery(own: Path) -> None:
    manifest = read_dataset("folder", own)
    nobody = min(pids(manifest, "test"))
    found = renamed(own, {pid: "-1" if pid == nobody else str(pid) for pid in manifest["pid"].to_pylist()})
    assert found.equals(manifest.filter(pc.not_equal(manifest["pid"], nobody)))
    kept = read_dataset("folder", own, distractors=True)
    strangers = kept.filter(pc.less(kept["pid"], 0))
    shown = select(manifest.filter(pc.equal(manifest["pid"], nobody)), modality="visible")
    assert strangers["image"].equals(shown["image"]) and set(strangers["split"].to_pylist()) == {"gallery"}
    protocol = get_protocol("folder/infrared-visible")
    query, gallery = select_query(kept, protocol), select_gallery(kept, protocol, trial=0)
    assert min(query["pid"].to_pylist()) >= 0
    assert gallery.num_rows == select_gallery(found, protocol, trial=0).num_rows + shown.num_rows


def test_query_and_gallery_of_a_table_take_part_as_they_say(own: Path) -> None:
    manifest = read_dataset("folder", own)
    splits = [
        row["split"] if row["split"] != "test" else {"visible": "gallery", "infrared": "query"}[row["modality"]]
        for row in manifest.to_pylist()
    ]
    written = manifest.set_column(4, "split", pa.array(splits))
    write(written, own / "manifest.csv")
    found, protocol = read_dataset("folder", own), get_protocol("folder/infrared-visible")
    for one in (manifest, found):
        assert set(select_query(one, protocol)["image"].to_pylist()) == set(
            select(manifest, split="test", modality="infrared")["image"].to_pylist()
        )
        assert set(select_gallery(one, protocol, trial=0)["image"].to_pylist()) == set(
            select(manifest, split="test", modality="visible")["image"].to_pylist()
        )
    # Half of the gallery as "test", half as "gallery": all of it is ranked.
    mixed = [split if row % 2 or split != "gallery" else "test" for row, split in enumerate(splits)]
    write(manifest.set_column(4, "split", pa.array(mixed)), own / "manifest.csv")
    half = select_gallery(read_dataset("folder", own), protocol, trial=0)
    assert half.num_rows == select(manifest, split="test", modality="visible").num_rows
    write(written.set_column(4, "split", pa.array(["query"] * len(splits))), own / "manifest.csv")
    with pytest.raises(ValueError, match=r"got the visible image .* \(row \d+\) in query. Write test instead"):
        read_dataset("folder", own)


def test_a_table_that_contradicts_itself_is_refused_with_both_rows(own: Path) -> None:
    manifest = read_dataset("folder", own)
    write(pa.concat_tables([manifest, manifest.slice(0, 1)]), own / "manifest.csv")
    assert read_dataset("folder", own).equals(manifest)  # the same row twice says nothing new
    other = changed(manifest, "camid", 9).slice(0, 1)
    write(pa.concat_tables([manifest, other.cast(manifest.schema)]), own / "manifest.csv")
    with pytest.raises(ValueError, match=rf"camid {manifest['camid'][0]} \(row 2\) and 9 \(row {len(manifest) + 2}\)"):
        read_dataset("folder", own)
    (own / "manifest.csv").unlink()
    pid, path = min(pids(manifest, "train")), own / "splits.csv"
    path.write_text(f"{path.read_text().rstrip()}\n0{pid},test\n")
    with pytest.raises(ValueError, match=rf"got 0{pid} in train \(line \d+\) and in test \(line {SIZE.train + 9}\)"):
        read_dataset("folder", own)


def test_a_table_from_windows_is_read(own: Path) -> None:
    manifest = read_dataset("folder", own)
    images = [f"D:\\data\\crops\\{image}".replace("/", "\\") for image in manifest["image"].to_pylist()]
    for written in (images, [image.removeprefix("D:\\data\\crops\\") for image in images]):
        write(manifest.set_column(0, "image", pa.array(written)), own / "manifest.csv")
        text = (own / "manifest.csv").read_text()
        for content in (text.encode(), text.replace("\n", "\r\n").encode("utf-8-sig"), text.encode("utf-16")):
            (own / "manifest.csv").write_bytes(content)
            assert read_dataset("folder", own).equals(manifest)
    (own / manifest["image"][0].as_py()).unlink()
    with pytest.raises(ValueError, match=r"manifest.csv: .* got 'visible.* no end of this path is a file"):
        read_dataset("folder", own)


@pytest.mark.parametrize(("encoding", "likely"), [("gbk", "GBK"), ("latin-1", "ISO-8859-1")])
def test_a_table_of_another_encoding_is_named_with_its_line(own: Path, encoding: str, likely: str) -> None:
    write(read_dataset("folder", own), own / "manifest.csv")
    lines = (own / "manifest.csv").read_text().splitlines()
    lines[4] = lines[4].replace("visible", {"gbk": "\u53ef\u89c1\u5149", "latin-1": "gr\xfcn"}[encoding])
    (own / "manifest.csv").write_bytes("\n".join(lines).encode(encoding))
    with pytest.raises(ValueError, match=rf"manifest.csv:5: expected UTF-8, got .* \(likely {likely}\)"):
        read_dataset("folder", own)


@pytest.mark.parametrize("prefix", ["C:\\RegDB\\", "/home/somebody/regdb/", ".\\", "./"])
def test_lists_of_regdb_and_llcm_from_other_machines_are_read(regdb: Path, llcm: Path, prefix: str) -> None:
    before = read_dataset("regdb", regdb), read_dataset("llcm", llcm)
    for path in (*(regdb / "idx").glob("*.txt"), *(llcm / "idx").glob("t*_[vn]i*.txt")):
        lines = [
            prefix + (line.replace("/", "\\") if "\\" in prefix else line) for line in path.read_text().splitlines()
        ]
        path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    (llcm / "idx/test_id.txt").write_bytes((llcm / "idx/test_id.txt").read_text().encode("utf-8-sig"))
    assert read_dataset("regdb", regdb).equals(before[0]) and read_dataset("llcm", llcm).equals(before[1])


def write(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path) if path.suffix == ".parquet" else pyarrow.csv.write_csv(table, path)


def changed(table: pa.Table, name: str, value: object) -> pa.Table:
    values = table[name].to_pylist()
    values[0] = value
    if isinstance(value, str):
        values = [str(each) for each in values]
    return table.set_column(table.column_names.index(name), name, pa.array(values))


@pytest.mark.parametrize(
    ("column_name", "value", "message"),
    [
        ("modality", "thermal", r"expected modality among visible, infrared, got 'thermal'"),
        ("split", "training", r"expected split among train, val, query, gallery, test, got 'training'"),
        ("camid", "left", r"expected integers in camid"),
        ("image", "  ", r"expected a value in every row of image, got an empty one in row 2"),
        ("image", "/etc/passwd", r"expected image paths relative to data.root, got '/etc/passwd'"),
        ("image", "../secret.jpg", r"expected image paths relative to data.root"),
        ("image", "visible/nobody.jpg", r"1 of \d+ missing, the first visible/nobody.jpg"),
        ("camid", None, r"expected a value in every row of camid"),
    ],
)
def test_a_table_with_a_bad_value_is_refused_by_name(own: Path, column_name: str, value: object, message: str) -> None:
    write(changed(read_dataset("folder", own), column_name, value), own / "manifest.csv")
    with pytest.raises(ValueError, match=message):
        read_dataset("folder", own)


def test_a_table_without_a_column_or_without_table_form_is_refused(own: Path) -> None:
    write(read_dataset("folder", own).drop_columns(["camid"]), own / "manifest.csv")
    with pytest.raises(ValueError, match=r"manifest.csv: expected the columns image, .*, got no camid among"):
        read_dataset("folder", own)
    (own / "manifest.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"manifest.parquet: expected a CSV or Parquet table"):
        read_dataset("folder", own)


def test_a_camera_without_a_number_is_named(own: Path) -> None:
    (own / "visible/7/left").mkdir(parents=True)
    (own / "visible/7/left/a.JPG").touch()
    with pytest.raises(ValueError, match=r"with a number for camid, got visible/7/left in"):
        read_dataset("folder", own)


def test_images_at_another_depth_are_described(own: Path) -> None:
    for modality in ("visible", "infrared"):
        for camera in (own / modality).glob("*/*"):
            files = list(camera.iterdir())
            (camera / "track").mkdir()
            for file in files:
                file.rename(camera / "track" / file.name)
    count = len(list((own / "visible").rglob("*.jpg")))
    with pytest.raises(ValueError, match=rf"got .*{count} in visible/\*/\*/\*/\*.jpg, such as infrared/.*track"):
        read_dataset("folder", own)


def test_system_files_are_ignored_and_every_suffix_is_read(own: Path) -> None:
    manifest = read_dataset("folder", own)
    first = own / manifest["image"][0].as_py()
    person = first.parents[1]
    for stray in (person / "Thumbs.db", first.with_name(f"._{first.name}"), first.with_name("desktop.ini")):
        stray.write_bytes(b"system")
    (own / "visible/__MACOSX/1").mkdir(parents=True)
    shutil.copy(first, own / "visible/__MACOSX/1/a.jpg")
    first.rename(first.with_suffix(".TIF"))
    found = read_dataset("folder", own)
    assert sorted(found["image"].to_pylist()) == sorted(
        image.replace(".jpg", ".TIF") if row == 0 else image for row, image in enumerate(manifest["image"].to_pylist())
    )


@pytest.mark.parametrize("suffix", [".jpeg", ".JPEG", ".tif", ".TIFF", ".webp", ".PNG", ".bmp"])
def test_a_camera_of_sysu_or_llcm_may_use_any_suffix(llcm: Path, tmp_path: Path, suffix: str) -> None:
    sysu = tmp_path / "sysu"
    write_layout(sysu, SIZE, seed=5, layout="sysu_mm01")
    before = read_dataset("sysu_mm01", sysu), read_dataset("llcm", llcm)
    for camera in (sysu / "cam2", llcm / "test_vis/cam2"):
        for file in list(camera.rglob("*.jpg")):
            file.rename(file.with_suffix(suffix))
    after = read_dataset("sysu_mm01", sysu), read_dataset("llcm", llcm)
    for one, other in zip(before, after, strict=True):
        assert one.num_rows == other.num_rows and one["pid"].equals(other["pid"])


def test_a_link_adds_no_second_row_and_a_loop_ends(own: Path) -> None:
    manifest = read_dataset("folder", own)
    pid = manifest["pid"][0].as_py()
    (own / "visible" / "latest").symlink_to(own / "visible" / str(manifest["image"][0].as_py()).split("/")[1])
    (own / "visible" / "up").symlink_to("..")
    (own / "loop").symlink_to(".")
    assert read_dataset("folder", own).equals(manifest) and pid >= 0


def test_a_folder_of_one_modality_is_refused(own: Path) -> None:
    shutil.rmtree(own / "infrared")
    with pytest.raises(ValueError, match=r"data.root: expected folders visible and infrared, .* got no infrared"):
        read_dataset("folder", own)


def test_unknown_names_options_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.name: expected one of \['folder', 'llcm', 'regdb'"):
        read_dataset("market", tmp_path)
    with pytest.raises(ValueError, match=r"expected options of llcm among \['strict'\], got split"):
        read_dataset("llcm", tmp_path, split=2)
    with pytest.raises(ValueError, match=r"expected the folder of regdb, got .*nowhere, which is not a folder"):
        read_dataset("regdb", tmp_path / "nowhere")


def test_the_configuration_carries_the_split_to_the_reader(rendered: dict[Layout, Path]) -> None:
    data = load_config(None, ["data.name=regdb", f"data.root={rendered['regdb']}", "data.split=7"]).data
    assert data.root is not None
    manifest = read_dataset(data.name, data.root, **data.reader_options)
    assert manifest.equals(read_dataset("regdb", rendered["regdb"], split=7))
    assert load_config(None, ["data.name=llcm", "data.root=/x", "data.split=7"]).data.reader_options == {}
    with pytest.raises(ValueError, match=r"data.split"):
        load_config(None, ["data.split=11"])


@pytest.mark.parametrize(
    ("layout", "name", "split"),
    [
        ("regdb", "regdb/infrared-visible", "test"),
        ("regdb", "regdb/visible-infrared", "test"),
        ("regdb", "regdb/infrared-visible", "val"),
        ("llcm", "llcm/infrared-visible", "test"),
        ("llcm", "llcm/visible-infrared", "test"),
        ("llcm", "llcm/infrared-visible", "val"),
        ("folder", "regdb/infrared-visible", "test"),
    ],
)
def test_protocols_run_on_the_manifest(rendered: dict[Layout, Path], layout: Layout, name: str, split: Any) -> None:
    manifest, protocol = read_dataset(layout, rendered[layout]), get_protocol(name)
    query, gallery = (
        select_query(manifest, protocol, split=split),
        select_gallery(manifest, protocol, trial=0, split=split),
    )
    wanted = pids(manifest, split)
    assert set(query["pid"].to_pylist()) == set(gallery["pid"].to_pylist()) == wanted
    if layout == "llcm":
        cameras = 9 if protocol.gallery_modality == "visible" else 8
        assert gallery.num_rows == len(wanted) * cameras  # one image an identity and camera
    rule: dict[str, Any] = {"protocol": protocol.dataset}
    labels = [column(table, key) for key in ("pid", "camid") for table in (query, gallery)]
    same = (labels[0][:, None] == labels[1][None, :]).astype(np.float32)
    noise = np.random.default_rng(0).random(same.shape, dtype=np.float32)
    perfect = ranking_metrics(same + 0.5 * noise, *labels, **rule)
    assert perfect.rank1 == perfect.mAP == perfect.mINP == 1.0
    assert perfect.num_valid_queries == query.num_rows
    if len(wanted) > 1:
        assert ranking_metrics(noise, *labels, **rule).mAP < 1.0
    captions = read_captions(manifest, rendered[layout])
    texts = witness_captions(manifest, captions, query, protocol, seed=0, held_out=False, split=split)
    assert len(texts) == query.num_rows and all(texts)
