"""Sentences of people: one per identity, written as the dataset writes identities, and drawn for every query."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from tvilfm.config import EvaluateSection, load_config
from tvilfm.data.manifest import CAPTION_SCHEMA, build_manifest
from tvilfm.data.people import with_people
from tvilfm.datasets.human_texts import read_human_texts
from tvilfm.evaluation.protocols import get_protocol, select_query
from tvilfm.evaluation.query_texts import draw_query_texts, select_query_texts

SPLITS = {1: "train", 2: "val", 3: "test", 42: "test"}


@pytest.fixture
def manifest() -> pa.Table:
    return build_manifest(
        {"image": f"{modality}/{pid}.jpg", "pid": pid, "camid": camid, "modality": modality, "split": split}
        for pid, split in SPLITS.items()
        for modality, camid in (("visible", 1), ("infrared", 3))
    )


def write(tmp_path: Path, entries: object) -> Path:
    path = tmp_path / "human.json"
    path.write_text(json.dumps(entries), encoding="utf-8-sig")
    return path


def test_sentences_are_matched_by_identity_however_it_is_written(manifest: pa.Table, tmp_path: Path) -> None:
    path = write(tmp_path, {"0042": " a man ", "3": "a woman", "99": "nobody here", "0002": "a child"})
    assert read_human_texts(path, manifest).to_pylist() == [
        {"pid": 2, "text": "a child"},
        {"pid": 3, "text": "a woman"},
        {"pid": 42, "text": "a man"},
    ]
    named = with_people(manifest, {3: "alice", 42: "0042"})
    path = write(tmp_path, {"42": "a man", "alice": "a woman", "3": "another person"})
    assert read_human_texts(path, named)["text"].to_pylist() == ["a woman", "a man"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"3": "a woman"}, r"got none of 1 of 2, the first 42\. Add them"),
        ({"3": "a woman", "42": "\u200b "}, r"got a blank one of 42"),
        ({"3": "a woman", "42": "a man", "042": "a boy"}, r"got two of 042"),
        ({"3": ["a woman"], "42": "a man"}, r"expected \{identity: sentence\}"),
        ([1], r"expected \{identity: sentence\}"),
    ],
)
def test_what_is_not_one_sentence_per_test_identity_is_refused(
    manifest: pa.Table, tmp_path: Path, entries: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_human_texts(write(tmp_path, entries), manifest)


def test_every_query_gets_the_sentence_of_its_person(manifest: pa.Table) -> None:
    images = manifest["image"].to_pylist()
    rows = [{"image": image, "caption": f"caption of {image}"} for image in images]
    captions = pa.Table.from_pylist(rows, schema=CAPTION_SCHEMA)
    section = EvaluateSection(protocols=("folder/infrared-visible",), text_sources=("witness", "human"))
    human = {3: "a woman", 42: "a man"}
    drawn = draw_query_texts(manifest, captions, section, seed=0, splits=("test", "val"), human=human)
    protocol = get_protocol("folder/infrared-visible")
    query = select_query(manifest, protocol)
    texts = select_query_texts(drawn, query, protocol, "human", split="test")
    assert texts is not None and texts.texts == [human[pid] for pid in query["pid"].to_pylist()]
    assert texts.filter_texts == [f"caption of {image}" for image in query["image"].to_pylist()]
    validated = select_query(manifest, protocol, split="val")
    assert select_query_texts(drawn, validated, protocol, "human", split="val") is None  # it has no sentence


def test_the_description_asks_for_the_file() -> None:
    with pytest.raises(ValueError, match=r"^data\.human_texts: expected a JSON file while evaluate.text_sources has"):
        load_config(None, ["evaluate.text_sources=[witness,human]"])
    config = load_config(None, ["evaluate.text_sources=[witness,human]", "data.human_texts=~/words.json"])
    assert config.data.human_texts == Path.home() / "words.json"
