"""The published caption files: any root in their keys, the rephrased file preferred, faults by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tvilfm.data.captions import texts_of
from tvilfm.data.manifest import CAPTION_SCHEMA, build_manifest
from tvilfm.datasets.caption_files import read_published
from tvilfm.datasets.sysu_mm01 import read

IMAGES = {"cam1/0001/0001.jpg": "visible", "cam3/0001/0001.jpg": "infrared", "cam1/0002/0001.jpg": "visible"}


@pytest.fixture
def manifest() -> pa.Table:
    return build_manifest(
        {"image": image, "pid": int(image[5:9]), "camid": int(image[3]), "modality": modality, "split": "train"}
        for image, modality in IMAGES.items()
    )


def write(root: Path, sensor: str, entries: Any, name: str = "caption_llm_dict") -> Path:
    folder = root / "Text" / f"Blip_{sensor}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_Blip_{sensor}.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


def entries(sensor: str, prefix: str, **extra: str) -> dict[str, dict[str, str]]:
    modality = {"RGB": "visible", "IR": "infrared"}[sensor]
    return {
        f"{prefix}{image}": {"description": f"of {image}", **extra} for image, of in IMAGES.items() if of == modality
    }


@pytest.mark.parametrize(
    "prefix", ["", "datasets/x/", "/data0/somebody/SYSU-MM01/", "./", "cam1/0001/", "C:\\data\\sysu\\"]
)
def test_captions_are_matched_whatever_root_their_keys_have(tmp_path: Path, manifest: pa.Table, prefix: str) -> None:
    for sensor in ("RGB", "IR"):
        write(tmp_path, sensor, entries(sensor, prefix, aug_description="rephrased"))
    captions = read_published(tmp_path, manifest)
    assert captions.schema.equals(CAPTION_SCHEMA)
    assert captions["image"].to_pylist() == list(IMAGES)
    assert captions["caption"].to_pylist() == [f"of {image}" for image in IMAGES]
    assert captions["rephrased"].to_pylist() == ["rephrased"] * 3
    assert set(captions["captioner"].to_pylist()) == {"published"}


def test_a_tail_that_is_no_whole_path_component_does_not_match(tmp_path: Path, manifest: pa.Table) -> None:
    write(tmp_path, "RGB", entries("RGB", "other"))
    write(tmp_path, "IR", entries("IR", ""))
    with pytest.raises(ValueError, match=r"got none for 2 of 3, the first cam1/0001/0001\.jpg"):
        read_published(tmp_path, manifest)


def test_the_rephrased_file_is_preferred_and_the_plain_one_serves_without_it(
    tmp_path: Path, manifest: pa.Table
) -> None:
    for sensor in ("RGB", "IR"):
        write(tmp_path, sensor, entries(sensor, "a/"), name="caption_dict")
    plain = read_published(tmp_path, manifest)
    assert plain["rephrased"].to_pylist() == [None] * 3
    write(tmp_path, "RGB", entries("RGB", "b/", aug_description="again"))
    assert read_published(tmp_path, manifest)["rephrased"].to_pylist() == ["again", None, "again"]


def test_a_missing_caption_file_is_named(tmp_path: Path, manifest: pa.Table) -> None:
    write(tmp_path, "RGB", entries("RGB", ""))
    with pytest.raises(ValueError, match=r"captions: expected .*Blip_IR/caption_llm_dict_\*\.json or caption_dict"):
        read_published(tmp_path, manifest)


def test_images_without_a_caption_are_counted_and_the_first_named(tmp_path: Path, manifest: pa.Table) -> None:
    write(tmp_path, "RGB", {"x/cam1/0001/0001.jpg": {"description": "a man"}})
    write(tmp_path, "IR", entries("IR", ""))
    with pytest.raises(ValueError, match=r"got none for 1 of 3, the first cam1/0002/0001\.jpg"):
        read_published(tmp_path, manifest)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "expected JSON"),
        ("[1, 2]", "got another format"),
        ('{"cam1/0001/0001.jpg": "a man"}', "got another format"),
        ('{"cam1/0001/0001.jpg": {"caption": "a man"}}', "got another format"),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path: Path, manifest: pa.Table, content: str, message: str) -> None:
    path = write(tmp_path, "RGB", content)
    with pytest.raises(ValueError, match=message) as caught:
        read_published(tmp_path, manifest)
    assert str(caught.value).startswith(f"{path}: ")


def test_texts_follow_the_images_asked_for_and_a_missing_rephrase_is_the_caption(manifest: pa.Table) -> None:
    table = pa.Table.from_pylist(
        [
            {"image": "a", "caption": "one", "rephrased": "eins"},
            {"image": "b", "caption": "two", "rephrased": None},
            {"image": "c", "caption": "three", "rephrased": ""},
        ],
        schema=CAPTION_SCHEMA,
    )
    assert texts_of(table, ["c", "a", "b", "a"]) == (["three", "one", "two", "one"], ["three", "eins", "two", "eins"])
    with pytest.raises(KeyError):
        texts_of(table, ["d"])


def test_the_synthetic_caption_files_are_read_by_the_real_reader(tiny_benchmark: Path) -> None:
    manifest = read(tiny_benchmark)
    captions = read_published(tiny_benchmark, manifest)
    assert captions["image"].to_pylist() == manifest["image"].to_pylist()
    assert all(captions["rephrased"].to_pylist())
