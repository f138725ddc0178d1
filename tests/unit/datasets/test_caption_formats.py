"""Every published caption format: the real RegDB files, LLCM's test keys, SYSU-MM01's arrays, and the way back."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.paths import REGDB_CAPTIONS, needs_regdb_captions
from tvilfm.captioning.colors import find_colors
from tvilfm.data.captions import identity_map
from tvilfm.data.manifest import CAPTION_SCHEMA, build_manifest, fingerprint, select
from tvilfm.datasets.caption_files import (
    collect,
    read_caption_dict,
    read_captions,
    read_identity_map,
    read_published,
    read_sysu_arrays,
)
from tvilfm.datasets.caption_writing import write_published
from tvilfm.datasets.sysu_mm01 import read as read_sysu
from tvilfm.evaluation.protocols import get_protocol, select_query, witness_captions


def manifest_of(images: list[str]) -> pa.Table:
    """RegDB rows from caption keys, in their order."""
    return build_manifest(
        {
            "image": image,
            "pid": int(image.split("/")[1]),
            "camid": 1 if image.startswith("Visible") else 2,
            "modality": "visible" if image.startswith("Visible") else "infrared",
            "split": "train",
        }
        for image in images
    )


@pytest.fixture(scope="module")
def real() -> pa.Table:
    """The published RegDB captions as a table, visible first, in the files' order."""
    visible = read_caption_dict(REGDB_CAPTIONS / "caption_llm_dict_Blip_RGB.json")
    return pa.concat_tables([visible, read_caption_dict(REGDB_CAPTIONS / "caption_llm_dict_Blip_IR.json")])


@needs_regdb_captions
def test_the_published_regdb_captions_import(real: pa.Table) -> None:
    manifest = manifest_of(real["image"].to_pylist())
    assert real.schema.equals(CAPTION_SCHEMA)
    for modality in ("visible", "infrared"):
        rows = select(manifest, modality=modality)
        assert rows.num_rows == 4120
        assert Counter(Counter(rows["pid"].to_pylist()).values()) == {10: 412}
    assert all(real["caption"].to_pylist()) and all(real["rephrased"].to_pylist())
    # The same through the door that a run uses, from the files as they lie in one folder.
    captions = read_published(Path("/nowhere"), manifest, text_dir=REGDB_CAPTIONS)
    assert captions.equals(real)
    assert read_captions(manifest, Path("/nowhere"), REGDB_CAPTIONS).equals(real)


@needs_regdb_captions
def test_published_captions_and_colour_words(real: pa.Table) -> None:
    """A colour in every visible text, none in an infrared one but "crimson": the published filter did not know it."""
    for column in ("caption", "rephrased"):
        visible, infrared = real[column].to_pylist()[:4120], real[column].to_pylist()[4120:]
        assert all(find_colors(text) for text in visible)
        named = Counter(word for text in infrared for word in find_colors(text))
        assert named == {"crimson": {"caption": 12, "rephrased": 7}[column]}


@needs_regdb_captions
def test_the_published_identity_map_is_the_captions_by_folder_number(real: pa.Table) -> None:
    texts = read_identity_map(REGDB_CAPTIONS / "id_caption_map_Blip_RGB.json")
    expected: dict[int, set[str]] = {}
    for image, caption in zip(real["image"].to_pylist()[:4120], real["caption"].to_pylist()[:4120], strict=True):
        expected.setdefault(int(image.split("/")[1]), set()).add(caption)
    assert {pid: set(pool) for pid, pool in texts.items()} == expected
    assert all(len(pool) == len(set(pool)) for pool in texts.values())
    assert not collect(REGDB_CAPTIONS, manifest_of(real["image"].to_pylist())).unknown


@needs_regdb_captions
def test_the_published_regdb_files_are_written_back_byte_for_byte(real: pa.Table, tmp_path: Path) -> None:
    """All but the identity map's order within an identity, which is that of a Python set on the authors' machine."""
    manifest = manifest_of(real["image"].to_pylist())
    write_published(tmp_path, real, manifest, key_root="datasets/regdb/")
    written = {path.name: path for path in tmp_path.rglob("*.json")}
    for path in sorted(REGDB_CAPTIONS.glob("caption_*.json")):
        assert written[path.name].read_bytes() == path.read_bytes(), path.name
    name = "id_caption_map_Blip_RGB.json"
    ours, theirs = (json.loads(path.read_text()) for path in (written[name], REGDB_CAPTIONS / name))
    assert list(ours) == list(theirs)
    assert {pid: sorted(pool) for pid, pool in ours.items()} == {pid: sorted(pool) for pid, pool in theirs.items()}
    theirs_reordered = json.dumps({pid: ours[pid] for pid in theirs}, indent=4)
    assert written[name].read_text() == theirs_reordered
    assert len(theirs_reordered) == len((REGDB_CAPTIONS / name).read_text())


@pytest.mark.parametrize(
    ("key", "image"),
    [
        ("datasets/regdb/Thermal/193/x.bmp", "Thermal/193/x.bmp"),
        ("/data0/someone/RegDB/Visible/193/x.bmp", "Visible/193/x.bmp"),
        ("C:\\RegDB\\Visible\\193\\x.bmp", "Visible/193/x.bmp"),
        ("/vis/LLCM/nir/0351/0351_c06_nir.jpg", "nir/0351/0351_c06_nir.jpg"),
        ("x/test_nir/cam5/0351/y.jpg", "test_nir/cam5/0351/y.jpg"),
        ("../SYSU-MM01/cam3/0002/0001.jpg", "cam3/0002/0001.jpg"),
        ("visible/7/1/0001.jpg", "visible/7/1/0001.jpg"),
    ],
)
def test_a_key_begins_at_the_datasets_top_folder(tmp_path: Path, key: str, image: str) -> None:
    path = tmp_path / "caption_dict_Blip_RGB.json"
    path.write_text(json.dumps({key: {"description": "a man"}}))
    assert read_caption_dict(path)["image"].to_pylist() == [image]
    assert read_caption_dict(path, [image, "other.jpg"])["image"].to_pylist() == [image]


def test_unknown_keys_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "caption_dict_Blip_RGB.json"
    path.write_text(json.dumps({"a/Visible/1/x.bmp": {"description": "a"}, "a/Visible/2/y.bmp": {"description": "b"}}))
    with pytest.raises(ValueError, match=r"got 'a/Visible/2/y.bmp' \(1 of 2 keys unknown\)"):
        read_caption_dict(path, ["Visible/1/x.bmp"])


def test_keys_of_another_dataset_are_named_where_captions_are_missing(tmp_path: Path) -> None:
    for sensor in ("RGB", "IR"):
        folder = tmp_path / "Text" / f"Blip_{sensor}"
        folder.mkdir(parents=True)
        (folder / f"caption_dict_Blip_{sensor}.json").write_text('{"cam1/0001/1.jpg": {"description": "a man"}}')
    manifest = manifest_of(["Visible/1/x.bmp", "Thermal/1/x.bmp"])
    with pytest.raises(ValueError, match=r"got none for 2 of 2, .* 1 keys of .* no image, the first 'cam1/0001/1.jpg'"):
        read_published(tmp_path, manifest)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"description": "a man", "aug": "again"},
            r"expected description and aug_description, got the key 'aug' at 'k'",
        ),
        ({"description": 3}, r"got another format at 'k'"),
        (["a man"], r"got another format at 'k'"),
    ],
)
def test_an_entry_of_another_form_is_named(tmp_path: Path, entry: object, message: str) -> None:
    path = tmp_path / "caption_llm_dict_Blip_RGB.json"
    path.write_text(json.dumps({"k": entry}))
    with pytest.raises(ValueError, match=message):
        read_caption_dict(path)


@pytest.mark.parametrize("content", ["[]", '{"anna": ["a"]}', '{"1": "a"}', '{"1": [2]}'])
def test_an_identity_map_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "id_caption_map_Blip_RGB.json").write_text(content)
    with pytest.raises(ValueError, match=r"id_caption_map_Blip_RGB.json: expected {identity number: \[captions\]}"):
        read_identity_map(tmp_path / "id_caption_map_Blip_RGB.json")


def test_llcm_test_images_have_the_caption_of_their_first_place(tmp_path: Path) -> None:
    images = {
        "test_nir/cam6/0351/0351_c06_s1_f2_nir.jpg": "nir/0351/0351_c06_s1_f2_nir.jpg",
        "test_vis/cam3/0351/0351_c03_s1_f2_vis.jpg": "vis/0351/0351_c03_s1_f2_vis.jpg",
        "nir/0002/0002_c01_s1_f2_nir.jpg": "nir/0002/0002_c01_s1_f2_nir.jpg",
        "vis/0002/0002_c01_s1_f2_vis.jpg": "vis/0002/0002_c01_s1_f2_vis.jpg",
    }
    rows = [
        {
            "image": image,
            "pid": int(image.split("/")[-2]),
            "camid": int(image.split("_c")[1][:2]),
            "modality": "infrared" if "nir/" in key else "visible",
            "split": "test" if "test" in image else "train",
        }
        for image, key in images.items()
    ]
    manifest = build_manifest(rows)
    for sensor, folder in (("RGB", "vis"), ("IR", "nir")):
        entries = {f"/data0/LLCM/{k}": {"description": f"of {k}"} for k in images.values() if k.startswith(folder)}
        target = tmp_path / "Text" / f"Blip_{sensor}"
        target.mkdir(parents=True)
        (target / f"caption_dict_Blip_{sensor}.json").write_text(json.dumps(entries))
    captions = read_published(tmp_path, manifest)
    assert captions["caption"].to_pylist() == [f"of {key}" for key in images.values()]
    write_published(tmp_path / "again", captions, manifest, key_root="/data0/LLCM/")
    for sensor in ("RGB", "IR"):
        name = f"Blip_{sensor}/caption_dict_Blip_{sensor}.json"
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "Text" / name).read_bytes()


@pytest.fixture
def sysu(tiny_benchmark: Path) -> tuple[pa.Table, pa.Table]:
    manifest = read_sysu(tiny_benchmark)
    return manifest, read_published(tiny_benchmark, manifest)


def test_sysu_arrays_round_trip_in_the_released_order(sysu: tuple[pa.Table, pa.Table], tmp_path: Path) -> None:
    manifest, captions = sysu
    write_published(tmp_path, captions, manifest, arrays=True)
    caption_of = dict(zip(captions["image"].to_pylist(), captions["caption"].to_pylist(), strict=True))
    for modality, sensor, cameras in (("visible", "RGB", (1, 2, 4, 5)), ("infrared", "IR", (3, 6))):
        # The released loop: training identities ascending, then cameras, then sorted files.
        trained = select(manifest, split=("train", "val"), modality=modality).to_pylist()
        looped = [
            row
            for pid in sorted({row["pid"] for row in trained})
            for camid in cameras
            for row in sorted(trained, key=lambda row: str(row["image"]))
            if (row["pid"], row["camid"]) == (pid, camid)
        ]
        texts = np.load(tmp_path / f"Blip_{sensor}" / f"train_text_Blip_{sensor}.npy")
        assert texts.tolist() == [caption_of[row["image"]] for row in looped]
        labels = np.load(tmp_path / f"Blip_{sensor}" / f"train_text_label_Blip_{sensor}.npy")
        assert [sorted({row["pid"] for row in trained})[label] for label in labels] == [row["pid"] for row in looped]
        found = read_sysu_arrays(tmp_path / f"Blip_{sensor}", manifest, modality)
        assert {image: entry.caption for image, entry in found.items()} == {
            row["image"]: caption_of[row["image"]] for row in looped
        }
        assert all(entry.rephrased for entry in found.values())


def test_sysu_training_texts_come_from_the_arrays_where_no_json_names_them(
    sysu: tuple[pa.Table, pa.Table], tmp_path: Path
) -> None:
    manifest, captions = sysu
    write_published(tmp_path / "Text", captions, manifest, arrays=True)
    tested = set(select(manifest, split=("query", "gallery"))["image"].to_pylist())
    for sensor in ("RGB", "IR"):
        folder = tmp_path / "Text" / f"Blip_{sensor}"
        (folder / f"caption_llm_dict_Blip_{sensor}.json").unlink()
        path = folder / f"caption_dict_Blip_{sensor}.json"
        entries = json.loads(path.read_text())
        path.write_text(json.dumps({image: entry for image, entry in entries.items() if image in tested}))
    again = read_published(tmp_path, manifest)
    assert again["caption"].to_pylist() == captions["caption"].to_pylist()
    trained = [image not in tested for image in manifest["image"].to_pylist()]
    assert [text is not None for text in again["rephrased"].to_pylist()] == trained


def test_sysu_arrays_of_other_images_are_refused(sysu: tuple[pa.Table, pa.Table], tmp_path: Path) -> None:
    manifest, captions = sysu
    write_published(tmp_path, captions, manifest, arrays=True)
    folder = tmp_path / "Blip_RGB"
    label_path, text_path = folder / "train_text_label_Blip_RGB.npy", folder / "train_text_Blip_RGB.npy"
    labels = np.load(label_path)
    np.save(label_path, np.roll(labels, 1))
    with pytest.raises(ValueError, match=r"train_text_label_Blip_RGB.npy: expected one label per identity"):
        read_sysu_arrays(folder, manifest, "visible")
    np.save(label_path, labels)
    np.save(text_path, np.load(text_path)[:-1])
    with pytest.raises(ValueError, match=rf"train_text_Blip_RGB.npy: expected {len(labels)} entries"):
        read_sysu_arrays(folder, manifest, "visible")
    np.save(text_path, np.array(["a", 1], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"train_text_Blip_RGB.npy: expected an array of text or labels, got pickled"):
        read_sysu_arrays(folder, manifest, "visible")


def test_captions_known_by_identity_alone_keep_the_witness_pool_and_say_so(
    sysu: tuple[pa.Table, pa.Table], tmp_path: Path
) -> None:
    manifest, captions = sysu
    write_published(tmp_path / "Text", captions, manifest)
    gallery = select(manifest, split="gallery")
    for name in ("caption_dict_Blip_RGB.json", "caption_llm_dict_Blip_RGB.json"):
        path = tmp_path / "Text" / "Blip_RGB" / name
        entries = json.loads(path.read_text())
        for image in gallery["image"].to_pylist():
            del entries[image]
        path.write_text(json.dumps(entries))
    spread = read_published(tmp_path, manifest)
    for pid in set(gallery["pid"].to_pylist()):
        images = set(gallery.filter(pa.compute.equal(gallery["pid"], pid))["image"].to_pylist())
        pools = [
            {row["caption"] for row in table.to_pylist() if row["image"] in images} for table in (captions, spread)
        ]
        assert pools[0] == pools[1]
    marked = {row["image"] for row in spread.to_pylist() if row["captioner"] == "published, by identity"}
    assert marked == set(gallery["image"].to_pylist())

    protocol = get_protocol("sysu_mm01/indoor/single")
    query = select_query(manifest, protocol)
    draw = {"seed": 0, "held_out": True}
    assert any(witness_captions(manifest, captions, query, protocol, **draw))
    assert not any(witness_captions(manifest, spread, query, protocol, **draw))

    # The lists travel with the table, in their order, through a file too.
    path = tmp_path / "Text" / "Blip_RGB" / "id_caption_map_Blip_RGB.json"
    pq.write_table(spread, tmp_path / "captions.parquet")
    for table in (spread, read_captions(manifest, tmp_path, tmp_path / "captions.parquet")):
        assert identity_map(table) == read_identity_map(path)
    assert identity_map(table.replace_schema_metadata(None)) == {}
    lists = {pid: texts[::-1] for pid, texts in read_identity_map(path).items()}
    before = fingerprint(read_published(tmp_path, manifest))
    path.write_text(json.dumps(lists))
    assert fingerprint(read_published(tmp_path, manifest)) != before

    path.unlink()
    with pytest.raises(ValueError, match=rf"got none for {gallery.num_rows} of"):
        read_published(tmp_path, manifest)


def test_the_plain_file_completes_the_rephrased_one_and_differences_are_told(tmp_path: Path) -> None:
    images = ["Visible/1/a.bmp", "Visible/1/b.bmp"]
    folder = tmp_path / "Blip_RGB"
    folder.mkdir()
    plain = {f"x/{image}": {"description": f"plain {image}"} for image in images}
    (folder / "caption_dict_Blip_RGB.json").write_text(json.dumps(plain))
    entry = {"description": "other", "aug_description": "again"}
    (folder / "caption_llm_dict_Blip_RGB.json").write_text(json.dumps({f"y/{images[0]}": entry}))
    collected = collect(tmp_path, manifest_of(images))
    assert collected.differing == images[:1]
    assert [collected.found[image].caption for image in images] == ["other", f"plain {images[1]}"]
    assert [collected.found[image].rephrased for image in images] == ["again", None]


def test_a_caption_table_of_our_own_is_read_in_manifest_order(sysu: tuple[pa.Table, pa.Table], tmp_path: Path) -> None:
    manifest, captions = sysu
    path = tmp_path / "captions.parquet"
    pq.write_table(captions.take(list(reversed(range(captions.num_rows)))), path)
    assert read_captions(manifest, tmp_path, path).equals(captions)
    pq.write_table(captions.slice(1), path)
    with pytest.raises(ValueError, match=rf"got none for 1 of {manifest.num_rows}, the first {captions['image'][0]}"):
        read_captions(manifest, tmp_path, path)
    pq.write_table(captions.drop_columns(["caption"]), path)
    with pytest.raises(ValueError, match=r"data.captions: expected the columns image and caption, got no caption"):
        read_captions(manifest, tmp_path, path)
    with pytest.raises(ValueError, match=r"data.captions: expected a caption table, got no file"):
        read_captions(manifest, tmp_path, tmp_path / "no.parquet")


def test_a_caption_table_needs_only_images_and_captions(sysu: tuple[pa.Table, pa.Table], tmp_path: Path) -> None:
    manifest, captions = sysu
    needed = captions.select(["image", "caption"])
    pq.write_table(needed, tmp_path / "captions.parquet")
    rows = zip(*needed.to_pydict().values(), strict=True)
    lines = ["image,caption,mood", *(f'{image},"{caption}, ""as said""",good' for image, caption in rows)]
    (tmp_path / "captions.csv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    read = read_captions(manifest, tmp_path, tmp_path / "captions.parquet")
    assert read["caption"].equals(captions["caption"]) and read["rephrased"].null_count == captions.num_rows
    from_csv = read_captions(manifest, tmp_path, tmp_path / "captions.csv")
    assert from_csv["caption"].to_pylist() == [f'{text}, "as said"' for text in captions["caption"].to_pylist()]
    assert from_csv.schema.equals(captions.schema, check_metadata=False)


def test_writing_and_reading_is_the_identity(sysu: tuple[pa.Table, pa.Table], tmp_path: Path) -> None:
    manifest, captions = sysu
    write_published(tmp_path / "Text", captions, manifest, key_root="/anywhere/SYSU-MM01/")
    assert read_published(tmp_path, manifest).equals(captions)


def test_caption_files_of_other_encodings_are_read_or_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "caption_dict_x.json"
    text = json.dumps(
        {"a.jpg": {"description": "a man"}, "b.jpg": {"description": "\u7ea2\u8272"}}, indent=1, ensure_ascii=False
    )
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(text.replace("\n", "\r\n").encode(encoding))
        assert read_caption_dict(path)["caption"].to_pylist() == ["a man", "\u7ea2\u8272"]
    path.write_bytes(text.encode("gbk"))
    with pytest.raises(ValueError, match=r"caption_dict_x.json:6: expected UTF-8, got .* \(likely GBK\)"):
        read_caption_dict(path)
