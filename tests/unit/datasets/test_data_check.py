"""`tvilfm data check`: a sound dataset passes, and each fault is found, named, and given a remedy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from cluster.cli.data import app
from tvilfm.config import DataSection, load_config, to_yaml
from tvilfm.data.manifest import CAPTION_SCHEMA, select
from tvilfm.data.pixels import decode
from tvilfm.datasets import read_dataset
from tvilfm.datasets.caption_files import read_captions
from tvilfm.datasets.check import SYNTHETIC_MARK, check_dataset
from tvilfm.datasets.findings import Fault, Findings
from tvilfm.datasets.readers import DATASETS
from tvilfm.datasets.synthetic.layouts import Layout, Size, write_layout
from tvilfm.evaluation.features import FeatureTable

SIZE = Size(train=10, val=1, test=5, images_per_camera=1)
LAYOUTS: tuple[Layout, ...] = ("sysu_mm01", "regdb", "llcm", "folder")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    top = tmp_path_factory.mktemp("checked")
    for layout in LAYOUTS:
        write_layout(top / layout, SIZE, seed=2, layout=layout)
    return {layout: top / layout for layout in LAYOUTS}


@pytest.fixture
def regdb(rendered: dict[Layout, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered["regdb"], tmp_path / "regdb"))


def section(name: str, **values: object) -> DataSection:
    return DataSection.model_validate({"name": name, **values})


def fault(findings: Findings, part: str) -> Fault:
    (found,) = [each for each in findings.faults if part in each.what]
    assert found.fix and found.where
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rendered_dataset_is_sound(rendered: dict[Layout, Path], layout: Layout) -> None:
    findings = check_dataset(section(layout), rendered[layout])
    assert findings.sound and not findings.faults
    manifest = read_dataset(layout, rendered[layout])
    found = {count.what: count.found for count in findings.counts}
    assert found["train identities"] == SIZE.train + SIZE.val and found["test identities"] == SIZE.test
    for modality in ("visible", "infrared"):
        images = select(manifest, modality=modality)
        assert found[f"{modality} train images"] + found[f"{modality} test images"] == images.num_rows
        assert found[f"{modality} captions"] == found[f"{modality} rephrases"] == images.num_rows
        assert found[f"{modality} cameras"] == len(set(images["camid"].to_pylist()))


@pytest.mark.parametrize("layout", ["sysu_mm01", "regdb", "llcm"])
def test_counts_are_held_against_the_published_ones(
    rendered: dict[Layout, Path], layout: Layout, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(rendered[layout], tmp_path / layout))
    (root / SYNTHETIC_MARK).unlink()
    findings = check_dataset(section(layout), root, images=False)
    expected = {count.what: count.expected for count in findings.counts if "captions" not in count.what}
    assert {what: number for what, number in expected.items() if number is not None} == DATASETS[layout].counts
    number = DATASETS[layout].counts["train identities"]
    serious, *unsure = [each for each in findings.faults if "counts that differ" in each.what]
    assert f"11 train identities, published {number}" in serious.where
    assert serious.serious and not findings.sound
    assert len(unsure) == (layout == "llcm")  # the paper contradicts itself on LLCM's test images
    assert all(not each.serious and "published 8680" in each.where[0] for each in unsure)


def test_the_published_counts_add_up() -> None:
    llcm = DATASETS["llcm"].counts
    assert sum(number for what, number in llcm.items() if what.endswith("images")) == 46767
    regdb = DATASETS["regdb"].counts
    assert sum(number for what, number in regdb.items() if what.endswith("images")) == 2 * 4120
    assert regdb["train identities"] + regdb["test identities"] == 412
    assert DATASETS["sysu_mm01"].counts["train identities"] + DATASETS["sysu_mm01"].counts["test identities"] == 491


def test_images_that_cannot_be_read_are_listed(regdb: Path) -> None:
    images = read_dataset("regdb", regdb)["image"].to_pylist()
    (regdb / images[0]).write_bytes(b"")
    (regdb / images[1]).write_bytes(b"no picture at all")
    (regdb / images[2]).write_bytes((regdb / images[2]).read_bytes()[:2000])
    findings = check_dataset(section("regdb"), regdb)
    where = fault(findings, "images that cannot be read").where
    assert [text.split(":")[0] for text in where] == images[:3]
    assert "expected an image, got zero bytes" in where[0]
    assert not findings.sound
    assert check_dataset(section("regdb"), regdb, images=False).sound
    with pytest.raises(ValueError, match=rf"{images[0]}: expected an image, got zero bytes"):
        decode((regdb / images[0]).read_bytes(), height=8, width=4, name=images[0])


def test_missing_images_and_identities_in_two_splits_are_counted_together(regdb: Path) -> None:
    manifest = read_dataset("regdb", regdb)
    (regdb / manifest["image"][0].as_py()).unlink()
    pid = select(manifest, split="train")["pid"][0].as_py()
    shutil.copy(regdb / manifest["image"][1].as_py(), regdb / "Visible" / str(pid) / "more.bmp")
    path = regdb / "idx" / "test_visible_1.txt"
    path.write_text(path.read_text() + f"Visible/{pid}/more.bmp 9\n")
    findings = check_dataset(section("regdb"), regdb)
    assert fault(findings, "listed images that are missing").where == (manifest["image"][0].as_py(),)
    assert fault(findings, "identities in two splits").where == (f"pid {pid}: train and test",)
    assert fault(findings, "test identities with images of one modality only").where == (f"pid {pid}",)
    assert fault(findings, "without a caption whose identity has captions").where == (f"Visible/{pid}/more.bmp",)


def test_captions_without_an_image_and_images_without_a_caption_are_found(regdb: Path) -> None:
    manifest = read_dataset("regdb", regdb)
    image = select(manifest, modality="infrared")["image"][0].as_py()
    for name in ("caption_dict_Blip_IR.json", "caption_llm_dict_Blip_IR.json"):
        path = regdb / "Text" / "Blip_IR" / name
        entries = json.loads(path.read_text())
        entries["datasets/regdb/Thermal/999/x.bmp"] = entries.pop(f"datasets/regdb/{image}")
        path.write_text(json.dumps(entries))
    findings = check_dataset(section("regdb"), regdb)
    assert fault(findings, "images without a caption").where == (image,)
    assert fault(findings, "in caption_llm_dict_Blip_IR.json").where == ("datasets/regdb/Thermal/999/x.bmp",)
    (count,) = [count for count in findings.counts if count.what == "infrared captions"]
    assert (count.found, count.expected) == (manifest.num_rows // 2 - 1, manifest.num_rows // 2)


def test_caption_files_that_are_missing_or_disagree_are_found(regdb: Path) -> None:
    folder = regdb / "Text" / "Blip_RGB"
    path = folder / "id_caption_map_Blip_RGB.json"
    texts = json.loads(path.read_text())
    texts["3"] = ["a man who is not there."]
    path.write_text(json.dumps(texts))
    plain = folder / "caption_dict_Blip_RGB.json"
    entries = json.loads(plain.read_text())
    key = next(iter(entries))
    entries[key] = {"description": "a stranger."}
    plain.write_text(json.dumps(entries))
    findings = check_dataset(section("regdb"), regdb)
    assert fault(findings, "differ from id_caption_map").where == ("pid 3",)
    assert fault(findings, "differs between caption_dict").where == (key.removeprefix("datasets/regdb/"),)
    assert findings.sound  # a run survives both
    shutil.rmtree(folder)
    assert "Blip_RGB/caption_llm_dict" in fault(check_dataset(section("regdb"), regdb), "captions: expected").what


def test_captions_elsewhere_are_found(rendered: dict[Layout, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(rendered["regdb"], tmp_path / "regdb"))
    (root / "Text").rename(tmp_path / "Texts")
    assert not check_dataset(section("regdb"), root).sound
    assert check_dataset(section("regdb", captions=tmp_path / "Texts"), root).sound


def test_a_model_of_another_regdb_split_is_found(rendered: dict[Layout, Path]) -> None:
    root = rendered["regdb"]
    same = check_dataset(section("regdb", split=3), root, images=False, trained=section("regdb", split=3))
    assert same.sound
    findings = check_dataset(section("regdb", split=3), root, images=False, trained=section("regdb", split=5))
    learnt = select(read_dataset("regdb", root, split=5), split=("train", "val"))["pid"].to_pylist()
    tested = select(read_dataset("regdb", root, split=3), split="test")["pid"].to_pylist()
    found = fault(findings, "a RegDB model of split 5 tested on split 3")
    assert found.where == tuple(f"pid {pid}" for pid in sorted(set(learnt) & set(tested)))
    assert "data.split=5" in found.fix and not findings.sound


def test_a_split_by_rule_is_said(rendered: dict[Layout, Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(rendered["folder"], tmp_path / "own"))
    (root / "splits.csv").unlink()
    findings = check_dataset(section("folder"), root, images=False)
    assert len(fault(findings, "split by rule").where) == SIZE.train + SIZE.val + SIZE.test
    assert findings.sound


def test_a_folder_that_no_reader_reads_is_one_fault(rendered: dict[Layout, Path], tmp_path: Path) -> None:
    findings = check_dataset(section("llcm"), rendered["regdb"])
    assert "expected LLCM's folders vis and nir" in findings.faults[0].what
    assert not findings.sound and not findings.counts
    assert not check_dataset(section("regdb"), tmp_path / "nowhere").sound


def test_features_with_nan_are_refused_by_name() -> None:
    vectors = np.zeros((3, 4), dtype=np.float32)
    vectors[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"features: expected finite numbers, got NaN or infinity for 'b.jpg'"):
        FeatureTable(keys=("a.jpg", "b.jpg", "c.jpg"), vectors_ND=vectors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_commands_make_and_check_every_layout(layout: Layout, tmp_path: Path) -> None:
    runner, root = CliRunner(), tmp_path / layout
    made = runner.invoke(
        app, ["synth", str(root), "--identities", "2,1,2", "--layout", layout, "--images-per-camera", "1"]
    )
    assert made.exit_code == 0 and f"2 + 1 + 2 identities, layout {layout}, seed 0" in made.output
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    dataset = [f"data.name={layout}", f"data.root={root}"]
    checked = runner.invoke(app, ["check", "--config", str(config), *dataset, "train.p=2"])
    assert checked.exit_code == 0 and "no problems found" in checked.output


@pytest.fixture
def own(rendered: dict[Layout, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered["folder"], tmp_path / "own"))


def deepen(source: Path, root: Path, images: list[str], counts: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write gray images of another folder as 16-bit PNG files of the same name."""
    for image in images:
        gray = np.asarray(Image.open(source / image).convert("L")).astype(np.uint16)
        Image.fromarray(counts(gray).astype(np.uint16)).save(root / image, "PNG")


def test_radiometric_images_are_found_with_their_window(rendered: dict[Layout, Path], own: Path) -> None:
    images = select(read_dataset("folder", own), modality="infrared")["image"].to_pylist()
    deepen(rendered["folder"], own, images, lambda gray: 7000 + 8 * gray)
    findings = check_dataset(section("folder"), own)
    found = fault(findings, "deep images whose pixels are all between")
    assert set(found.where) == set(images) and not findings.sound
    (window,) = re.findall(r"data.depth_range=(\[\d+,\d+\])", found.fix)
    low, high = json.loads(window)
    assert 7000 <= low < high <= 7000 + 8 * 255
    assert not check_dataset(section("folder", depth_range=(low, high)), own).faults
    assert not check_dataset(section("folder", depth_range="percentiles"), own).faults
    deepen(rendered["folder"], own, images, lambda gray: gray * 257)
    assert not check_dataset(section("folder"), own).faults


def test_images_of_one_value_and_several_pages_are_found(own: Path) -> None:
    images = select(read_dataset("folder", own), modality="infrared")["image"].to_pylist()
    Image.new("RGB", (20, 40), (255, 255, 255)).save(own / images[0])
    findings = check_dataset(section("folder"), own)
    assert fault(findings, f"1 of {len(images)} infrared images have one single value").where == (images[0],)
    assert findings.sound
    for image in images:
        Image.new("RGB", (20, 40), (255, 255, 255)).save(own / image)
    assert not check_dataset(section("folder"), own).sound
    shutil.rmtree(own)
    pages = [Image.effect_noise((20, 40), 50) for _ in range(2)]
    image = "visible/1/1/a.tif"
    (own / image).parent.mkdir(parents=True)
    pages[0].save(own / image, save_all=True, append_images=pages[1:])
    (own / "infrared/1/4").mkdir(parents=True)
    pages[0].save(own / "infrared/1/4/a.png")
    assert fault(check_dataset(section("folder"), own), "1 files with several pages").where == (image,)


def test_files_that_are_not_read_are_counted_by_place_and_suffix(own: Path) -> None:
    manifest = read_dataset("folder", own)
    first = manifest["image"][0].as_py()
    for name in ("visible/1/loose.jpg", "visible/1/1/track/x.jpg", "visible/1/1/track/y.JPG", "visible/1/1/a.gif"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(own / first, own / name)
    for system in ("visible/1/1/._a.jpg", "visible/1/Thumbs.db", "visible/1/1/notes.txt"):
        (own / system).write_bytes(b"x")
    (own / "visible/latest").symlink_to("1")
    findings = check_dataset(section("folder"), own)
    assert fault(findings, "3 images that are not read").where == (
        "2 x visible/*/*/*/*.jpg, such as visible/1/1/track/x.jpg",
        "1 x visible/*/*.jpg, such as visible/1/loose.jpg",
    )
    assert fault(findings, "1 files that are skipped because of their suffix").where == (
        "1 x visible/*/*/*.gif, such as visible/1/1/a.gif",
    )
    assert findings.sound and len(findings.faults) == 2


def test_a_camera_whose_suffix_is_not_read_is_counted(tmp_path: Path) -> None:
    root = tmp_path / "sysu"
    write_layout(root, SIZE, seed=2, layout="sysu_mm01")
    files = list((root / "cam2").rglob("*.jpg"))
    for file in files:
        file.rename(file.with_suffix(".gif"))
    found = fault(check_dataset(section("sysu_mm01"), root, images=False), "files that are skipped because of their")
    assert found.where[0].startswith(f"{len(files)} x cam2/*/*.gif, such as cam2/")


def as_table(own: Path, change: Callable[[str, str], object], keys: Callable[[str], str] = str) -> DataSection:
    """The captions of the folder as a Parquet table with changed texts or keys, and the section that reads it."""
    captions = read_captions(read_dataset("folder", own), own)
    rows = [{**row, "caption": change(row["image"], row["caption"])} for row in captions.to_pylist()]
    rows = [{**row, "image": keys(row["image"])} for row in rows]
    path = own.parent / "captions.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return section("folder", captions=path)


def test_captions_without_words_are_counted_in_every_format(own: Path) -> None:
    images = read_dataset("folder", own)["image"].to_pylist()
    holes = dict(zip(images, ["", "  ", "nan", "NaN", None, "\u200b", "null"], strict=False))
    table = as_table(own, lambda image, text: holes.get(image, text))
    found = fault(check_dataset(table, own, images=False), "7 captions without words")
    assert found.where == tuple(holes) and found.serious
    for path in (own / "Text").rglob("caption*.json"):
        entries = json.loads(path.read_text())
        for key, entry in entries.items():
            hole = next((text for image, text in holes.items() if key.endswith(image)), entry["description"])
            entry["description"] = hole or ""
        path.write_text(json.dumps(entries))
    assert fault(check_dataset(section("folder"), own, images=False), "captions without words").where == tuple(holes)


@pytest.mark.parametrize("prefix", ["D:\\data\\crops\\", "/home/somebody/crops/", "./", ""])
def test_keys_of_a_caption_table_are_matched_as_those_of_json(own: Path, prefix: str) -> None:
    expected = read_captions(read_dataset("folder", own), own)
    table = as_table(
        own, lambda _, text: text, lambda image: prefix + (image.replace("/", "\\") if "\\" in prefix else image)
    )
    assert table.captions is not None
    assert not check_dataset(table, own, images=False).faults
    found = read_captions(read_dataset("folder", own), own, table.captions)
    assert found["image"].equals(expected["image"]) and found["caption"].equals(expected["caption"])


def test_a_caption_table_with_stray_missing_or_contradicting_rows_is_found(own: Path) -> None:
    images = read_dataset("folder", own)["image"].to_pylist()
    table = as_table(own, lambda _, text: text, lambda image: "stray.jpg" if image == images[3] else image)
    findings = check_dataset(table, own, images=False)
    assert fault(findings, "images without a caption").where == (images[3],)
    assert fault(findings, "captions without an image, in captions.parquet").where == ("stray.jpg",)
    assert not findings.sound
    table = as_table(own, lambda _, text: text, lambda image: images[0] if image == images[3] else image)
    (found,) = [one for one in check_dataset(table, own, images=False).faults if "one caption per image" in one.what]
    assert f"got two of {images[0]}" in found.what and "(row 1)" in found.what and "(row 4)" in found.what


def test_keys_of_this_machine_are_not_matched_by_their_end(tmp_path: Path) -> None:
    images = ["a.jpg", "1/a.jpg", "2/1/a.jpg"]
    rows = [{"image": image, "caption": f"caption of {image}"} for image in images]
    pq.write_table(pa.Table.from_pylist(rows, schema=CAPTION_SCHEMA), tmp_path / "captions.parquet")
    for kept in (images, images[:1], images[1:2]):
        found = read_captions(pa.table({"image": kept}), tmp_path, tmp_path / "captions.parquet")
        assert found["caption"].to_pylist() == [f"caption of {image}" for image in kept]


def test_captions_that_differ_beyond_the_towers_end_are_a_fault(own: Path) -> None:
    images = read_dataset("folder", own)["image"].to_pylist()
    table = as_table(own, lambda image, text: "word " * 90 + text if image in images[:5] else text)
    found = fault(check_dataset(table, own, images=False), "5 captions longer than the text tower's 77 tokens")
    assert found.where == tuple(images[:5]) and found.serious and "different sentences become 1" in found.what
    table = as_table(own, lambda image, text: text + " word" * 90 if image == images[0] else text)
    assert not fault(check_dataset(table, own, images=False), "1 captions longer than").serious
    table = as_table(own, lambda image, text: "\u4e00\u4e2a\u7537\u4eba" if image == images[0] else text)
    assert not fault(check_dataset(table, own, images=False), "in a script other than Latin").serious


def test_the_check_command_fails_with_a_table_of_faults(regdb: Path, tmp_path: Path) -> None:
    (regdb / read_dataset("regdb", regdb)["image"][0].as_py()).write_bytes(b"")
    run = tmp_path / "run"
    run.mkdir()
    overrides = ["data.name=regdb", f"data.root={regdb}"]
    (run / "config.yaml").write_text(to_yaml(load_config(None, [*overrides, "data.split=2"])))
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    arguments = ["check", "--config", str(config), "--run", str(run), "--every", *overrides, "data.split=1"]
    checked = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert checked.exit_code == 1
    for part in ("images that cannot be read", "zero bytes", "a RegDB model of split 2 tested", "data.split=2"):
        assert part in checked.output
