"""`tvilfm index`: from a finished run, or anybody's pictures, to a gallery that ranks as the evaluation does."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from cluster.cli.app import main
from cluster.tables.indexing import index
from tests.untrained_run import UntrainedRun, evaluated_rankings
from tvilfm.config import Config, resolve
from tvilfm.data.images import resized
from tvilfm.data.manifest import select
from tvilfm.data.pixels import decode
from tvilfm.models.encode import encode_pixels
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.query import QueryEncoder, Question
from tvilfm.retrieval.rows import Where
from tvilfm.retrieval.search import Request, Searcher


def rows(gallery: Gallery) -> list[dict[str, Any]]:
    stored = pa.concat_tables(gallery.tables()).drop_columns(["stamp", "position"]).to_pylist()
    return [row | {"thumbnail": (gallery.picture(row["id"]) or (None, None))[1]} for row in stored]


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["tvilfm", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.mark.slow
def test_a_runs_gallery_ranks_as_its_evaluation_and_a_second_index_changes_nothing(
    untrained_run: UntrainedRun, ray_session: None, database: str
) -> None:
    config = resolve(untrained_run.config.model_dump(mode="json"), [f"gallery.url={database}"])
    result = index(config)
    gallery = result.gallery
    visible = select(untrained_run.manifest, split="gallery", modality="visible")
    first = rows(gallery)
    assert [row["id"] for row in first] == visible["image"].to_pylist()
    assert [row["pid"] for row in first] == [f"p{pid:04}" for pid in visible["pid"].to_pylist()]
    assert [row["camid"] for row in first] == [str(camid) for camid in visible["camid"].to_pylist()]
    for row in first:
        original = (untrained_run.root / str(row["id"])).read_bytes()
        assert row["image"] == str(untrained_run.root / str(row["id"]))
        shape = decode(original, height=None, width=None, name="").shape
        assert Image.open(io.BytesIO(row["thumbnail"])).size == (shape[1], shape[0])  # smaller than a thumbnail may be

    data = untrained_run.config.data
    encoder = QueryEncoder(untrained_run.model, height=data.height, width=data.width)
    searcher, compared = Searcher(gallery, untrained_run.config.gallery), 0
    for ranking in evaluated_rankings(untrained_run.config, untrained_run.evaluator):
        question = Question(
            infrared=decode(ranking.image, height=None, width=None, name=""),
            sentence=ranking.sentence,
            infrared_caption=ranking.infrared_caption,
        )
        request = Request(
            weights=untrained_run.config.evaluate.ensemble.weights,
            k=len(first),
            where=Where(exclude_cameras=ranking.exclude_cameras),
        )
        (answer,) = searcher.search(encoder.encode([question]), [request])
        assert [hit.id for hit in answer.hits if hit.id in ranking.shown] == ranking.names
        compared += 1
    assert compared == 16 * (3 + 4)  # held-out witnesses speak of indoor galleries only

    assert (result.written, result.skipped, result.faults) == (len(first), 0, [])
    gallery.delete([str(first[0]["id"])])
    later = index(config)
    assert (later.written, later.skipped) == (1, len(first) - 1)
    assert rows(later.gallery) == first[1:] + first[:1]
    again = index(config, again=True)
    assert again.written == len(first) and rows(again.gallery) == first


@pytest.mark.slow
def test_the_command_encodes_ones_own_pictures(
    untrained_run: UntrainedRun,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    names = ["a.jpg", "deep/b.jpg", "deep/c.jpg"]
    pictures = np.random.default_rng(0).integers(0, 256, (3, 60, 30, 3), dtype=np.uint8)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name, picture in zip(names, pictures, strict=True):
        Image.fromarray(picture).save(tmp_path / "photos" / name, quality=95)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no picture")
    options = ["--gallery", str(tmp_path / "g"), "--images", str(tmp_path / "photos"), "--camid", "4", "--size", "tiny"]
    overrides = [f"run.dir={untrained_run.config.run.dir}", "gallery.thumbnail_height=20", "cluster.extract_workers=1"]
    assert run_command(monkeypatch, "index", *options, *overrides) == 0
    printed = capsys.readouterr().out
    assert "gallery: 3 images; 3 written, 0 skipped as existing" in printed
    assert "1 images could not be read" in printed and "broken.jpg: expected an image" in printed
    gallery, data = Gallery.open(str(tmp_path / "g")), untrained_run.config.data
    found = rows(gallery)
    assert [row["id"] for row in found] == [str(tmp_path / "photos" / name) for name in names]
    assert {(row["pid"], row["camid"]) for row in found} == {(None, "4")}
    for row in found:
        picture = decode(Path(str(row["id"])).read_bytes(), height=None, width=None, name="")
        pixels = np.stack([resized(picture, height=data.height, width=data.width)])
        raw = encode_pixels(untrained_run.model, pixels, "visible")
        for column, head in (("vector", untrained_run.model.embed), ("vector_base", untrained_run.model.embed_base)):
            with torch.inference_mode():
                unit = head(torch.from_numpy(raw))[0].numpy()
            np.testing.assert_allclose(row[column], unit, atol=1e-5)
        assert Image.open(io.BytesIO(row["thumbnail"])).size == (10, 20)


@pytest.mark.slow
def test_a_manifest_brings_ids_people_cameras_and_times(
    untrained_run: UntrainedRun,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    database: str,
) -> None:
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (30, 60), "red").save(tmp_path / name)
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(
        "path,camera,id,person,time\na.jpg,03,first,0007,2026-05-01T12:00:00Z\n"
        "b.jpg, gate-4,second,,\nb.jpg,5,junk,-1,\n"
    )
    options = ["--gallery", database, "--images", str(tmp_path), "--manifest", str(manifest), "--size", "tiny"]
    overrides = [f"run.dir={untrained_run.config.run.dir}", "gallery.exact_limit=1"]
    assert run_command(monkeypatch, "index", *options, *overrides) == 0
    gallery = Gallery.open(database)
    found = [(row["id"], row["camid"], row["pid"], row["time"]) for row in rows(gallery)]
    assert found == [
        ("first", "03", "0007", datetime(2026, 5, 1, 12, tzinfo=UTC)),
        ("second", "gate-4", None, None),
        ("junk", "5", None, None),
    ]
    assert gallery.kind == "index"  # it does not fit gallery.exact_limit
    manifest.write_text("path,person\na.jpg,7\n")
    assert run_command(monkeypatch, "index", *options, *overrides) == 2
    assert "--manifest: expected the columns path, camera" in capsys.readouterr().err


@pytest.mark.slow
def test_a_gallery_is_described_checked_copied_and_erased_by_commands(
    untrained_run: UntrainedRun,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    new_database: Callable[[], str],
) -> None:
    first, second = new_database(), new_database()
    run = ["--size", "tiny", f"run.dir={untrained_run.config.run.dir}"]

    def command(name: str, *arguments: str, url: str = first) -> str:
        status = run_command(monkeypatch, "gallery", name, *arguments, *run, f"gallery.url={url}")
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    index(resolve(untrained_run.config.model_dump(mode="json"), [f"gallery.url={first}"]))
    gallery = Gallery.open(first)
    before = rows(gallery)
    stats = command("stats")
    assert f"images: {len(before)}," in stats and "no index" in stats and "time unknown: " in stats
    assert "vector: 1.000 of the 10 nearest" in command("check", "--queries", "5")
    assert f"{len(before)} images indexed" in command("optimize") and gallery.kind == "index"
    for name in ("rows.parquet", "rows.lance"):
        assert f"{len(before)} rows" in command("export", str(tmp_path / name))
        assert f"{len(before)} rows written" in command("import", str(tmp_path / name), url=second)
        assert rows(Gallery.open(second)) == before
    pid = before[0]["pid"]
    own = [row for row in before if row["pid"] == pid]
    assert f"{len(own)} images deleted, {len(before) - len(own)} left" in command("delete", "--person", pid)
    assert run_command(monkeypatch, "gallery", "delete", *run, f"gallery.url={first}") == 2
    assert run_command(monkeypatch, "gallery", "export", str(tmp_path / "rows.parquet"), *run) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "tiny"), "run.name: expected a finished run in"),
        (("--images", "photos"), "--camid: expected the camera of --images"),
        (("--images", "photos", "--camid", " "), "--camid: expected the camera of --images"),
        (("--images", "broken", "--camid", "1"), "got 1 invalid files. First: a.jpg: expected"),
        (("--manifest", "photos.csv"), "--images: expected what --manifest or --boxes describes, got none"),
        (("--images", "unprintable", "--camid", "1"), "--images: expected paths of at most 512 printable"),
    ],
)
def test_what_cannot_be_indexed_is_said_in_one_message(
    untrained_run: UntrainedRun,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    config: Config = untrained_run.config
    folder = [f"run.dir={tmp_path if '--size' in arguments else config.run.dir}", f"run.name={config.run.name}"]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"no picture")
    (tmp_path / "unprintable").mkdir()
    (tmp_path / "unprintable" / "12.30\u202fPM.jpg").touch()
    arguments = tuple(str(tmp_path / word) if word in ("broken", "unprintable") else word for word in arguments)
    assert run_command(monkeypatch, "index", "--gallery", str(tmp_path / "g"), *arguments, *folder) == 2
    assert message in capsys.readouterr().err
