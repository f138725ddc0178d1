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
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from tvilfm.config import load_config
from tvilfm.data.manifest import MANIFEST_SCHEMA, column, select
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
        ("pid", "anna", r"expected integers in pid and camid"),
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


@pytest.mark.parametrize("name", ["visible/anna", "visible/7/left", "visible/7/loose.jpg"])
def test_a_wrong_folder_layout_is_named(own: Path, name: str) -> None:
    path = own / name
    if path.suffix:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    else:
        path.mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"<modality>/<pid>/<camid>/<image> with numbers .* got {name}"):
        read_dataset("folder", own)


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
