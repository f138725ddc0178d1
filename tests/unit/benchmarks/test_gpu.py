"""The GPU benchmarks, in the size that any machine runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import steps
from benchmarks.gpu.captioning import build_blip, crops, main
from tvilfm.data.pixels import decode


def test_it_measures_every_batch_size_and_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--tiny", "--out", str(tmp_path / "results.jsonl")])
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(record["dtype"], record["batch"]) for record in records] == [("float32", 1), ("float32", 2)]
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert records[0]["times_one_at_a_time_float32"] == 1.0
    for record in records:
        assert 0 < record["decode_share"] < 1
        assert 0 < record["images_per_s"] < record["captioner_images_per_s"]


def test_its_sentences_have_every_token_that_is_paid_for() -> None:
    captioner = build_blip("tiny")
    images = [decode(content, height=32, width=32, name="crop") for content in crops(3)]
    assert [len(sentence.split()) for sentence in captioner.caption(images)] == [4, 4, 4]


@pytest.mark.long
def test_each_kind_of_step_is_measured_as_a_loop_and_alone(tmp_path: Path) -> None:
    steps.main(["--tiny", "--out", str(tmp_path / "steps.jsonl")])
    records = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == list(steps.KINDS)
    of = {record["kind"]: record for record in records}
    assert all(record[name] > 0 for record in records for name in ("loop_ms", "step_ms", "kernels"))
    # A text step from pixels runs the backbone too, as a base step does.
    assert of["text, pixels"]["kernels"] > of["text, cached features"]["kernels"] > 100
