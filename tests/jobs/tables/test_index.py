"""`tvilfm index`: from a finished run, or anybody's pictures, to a gallery that ranks as the evaluation does."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from cluster.cli.app import main
from cluster.tables.indexing import build_index, index
from tests.untrained_run import UntrainedRun, evaluated_rankings
from tvilfm.config import Config, load_config
from tvilfm.data.images import resized
from tvilfm.data.manifest import select
from tvilfm.data.pixels import decode
from tvilfm.models.encode import encode_pixels
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.query import QueryEncoder, Question
from tvilfm.retrieval.rows import Where, vector_column
from tvilfm.retrieval.search import Request, Searcher


def rows(gallery: Gallery) -> list[dict[str, object]]:
    table = gallery.load(None, ["id", "vector", "vector_base", "pid", "camid", "image", "thumbnail", "position"])
    return table.sort_by("position").drop_columns(["position"]).to_pylist()


@pytest.mark.slow
def test_a_runs_gallery_ranks_as_its_evaluation_and_a_second_index_changes_nothing(
    untrained_run: UntrainedRun, ray_session: None
) -> None:
    gallery = index(untrained_run.config)
    visible = select(untrained_run.manifest, split="gallery", modality="visible")
    first = rows(gallery)
    assert [row["id"] for row in first] == visible["image"].to_pylist()
    assert [row["pid"] for row in first] == visible["pid"].to_pylist()
    assert [row["camid"] for row in first] == visible["camid"].to_pylist()
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

    again = index(untrained_run.config)
    assert again.version > gallery.version and rows(again) == first


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
    options = ["--gallery", str(tmp_path / "g"), "--images", str(tmp_path / "photos"), "--camid", "4", "--size", "tiny"]
    overrides = [f"run.dir={untrained_run.config.run.dir}", "gallery.thumbnail_height=20", "cluster.extract_workers=1"]
    monkeypatch.setattr("sys.argv", ["tvilfm", "index", *options, *overrides])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and "holds 3 images in space" in capsys.readouterr().out
    gallery, data = Gallery.open(str(tmp_path / "g")), untrained_run.config.data
    found = rows(gallery)
    assert [row["id"] for row in found] == [str(tmp_path / "photos" / name) for name in names]
    assert {(row["pid"], row["camid"]) for row in found} == {(None, 4)}
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
def test_a_large_gallery_gets_an_index_that_finds_what_an_exact_search_finds(ray_session: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((600, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    gallery = Gallery.prepare(str(tmp_path), space_id="feed-48x24", dim=32)
    columns = {"vector": vector_column(vectors), "vector_base": vector_column(vectors[::-1].copy())}
    gallery.upsert(pa.table({"id": [str(n) for n in range(600)], "camid": [1] * 600, **columns}), space_id="feed-48x24")

    def indexed() -> list[int]:
        statistics = (gallery.dataset.stats.index_stats(f"{column}_idx") for column in ("vector", "vector_base"))
        return [one["num_indexed_rows"] for one in statistics]

    config = load_config(
        None, ["gallery.exact_limit=0", "gallery.sub_vectors=8", "gallery.partitions=4", "cluster.extract_workers=1"]
    )
    build_index(gallery, config)
    assert indexed() == [600, 600]
    for base, row in ((False, 17), (True, 582)):
        found = gallery.nearest(vectors[17], ["id"], base=base, k=5, where=Where(), minimum_nprobes=4, refine_factor=30)
        ranked = np.argsort(-(vectors @ vectors[17]), kind="stable")[:5]
        expected = {str(599 - place) if base else str(place) for place in ranked}
        assert set(found["id"].to_pylist()) == expected and str(row) in expected
    gallery.delete([str(n) for n in range(10)])
    build_index(gallery, config)
    assert indexed() == [590, 590]
    with pytest.raises(ValueError, match=r"gallery.sub_vectors: expected a divisor of the dimension 32, got 5"):
        build_index(gallery, load_config(None, ["gallery.sub_vectors=5"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "tiny"), "run.name: expected a finished run in"),
        (("--images", "photos"), "--camid: expected the camera of --images"),
        (("--images", "photos", "--camid", "-1"), "--camid"),
        (("--images", "broken", "--camid", "1"), "a.jpg: expected"),
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
    monkeypatch.setattr("sys.argv", ["tvilfm", "index", "--gallery", str(tmp_path / "g"), *arguments, *folder])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and message in capsys.readouterr().err
