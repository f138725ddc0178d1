"""`tvilfm index`: from a finished run, or anybody's pictures, to a gallery that ranks as the evaluation does."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cluster.__main__ import main
from cluster.index import build_index, index
from tvilfm.config import Config, load_config, to_yaml
from tvilfm.datasets import read_dataset
from tvilfm.datasets.captions import read_captions
from tvilfm.datasets.manifest import select
from tvilfm.datasets.pixels import decode, decode_files
from tvilfm.datasets.splits import TEST_SPLITS
from tvilfm.evaluation.evaluator import Evaluator, all_texts
from tvilfm.evaluation.extract import encode_pixels, encode_texts
from tvilfm.evaluation.features import FeatureTable
from tvilfm.evaluation.protocols import get_protocol
from tvilfm.models import TVILFM, spec_from_config
from tvilfm.retrieval.gallery import Gallery, Where, vector_column
from tvilfm.retrieval.pictures import resized
from tvilfm.retrieval.query import QueryEncoder, Question
from tvilfm.retrieval.search import Request, Searcher


@pytest.fixture(scope="module")
def run(tiny_benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run folder as a finished run leaves it, of a network that nobody trained."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = [f"run.dir={folder}", f"data.root={tiny_benchmark}", "evaluate.batch=8", "cluster.extract_workers=1"]
    config = load_config(Path("ray_config.yaml"), overrides, size="tiny")
    torch.manual_seed(0)
    model = TVILFM(spec_from_config(config.model, 6, with_text=True))
    for module in model.modules():  # two heads that differ, as after the text stage
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    model.eval()
    manifest = read_dataset("synthetic", tiny_benchmark)
    captions = read_captions(manifest, tiny_benchmark, None)
    keys, parts = [], []
    for modality in ("visible", "infrared"):
        names = select(manifest, split=("val", *TEST_SPLITS), modality=modality)["image"].to_pylist()
        pixels = decode_files(tiny_benchmark, names, height=config.data.height, width=config.data.width)
        keys += names
        parts.append(encode_pixels(model, pixels, modality))
    texts = all_texts(manifest, captions, config.evaluate, seed=0)
    images = FeatureTable(keys=tuple(keys), vectors_ND=np.concatenate(parts))
    sentences = FeatureTable(keys=tuple(texts), vectors_ND=encode_texts(model, texts))

    stages = {name: config.run.path / "stages" / f"{name}-0" for name in ("pixels", "text", "features")}
    for stage in stages.values():
        stage.mkdir(parents=True)
    pq.write_table(manifest, stages["pixels"] / "manifest.parquet")
    model.save_pretrained(stages["text"] / "model")
    images.write(stages["features"] / "images.parquet")
    (config.run.path / "config.yaml").write_text(to_yaml(config))
    relative = {name: str(path.relative_to(config.run.path)) for name, path in stages.items()}
    (config.run.path / "run.json").write_text(json.dumps({"stages": relative}))
    evaluator = Evaluator(model, manifest, captions, images, sentences, config.evaluate, filter_text=True, seed=0)
    return SimpleNamespace(config=config, model=model, evaluator=evaluator, manifest=manifest, root=tiny_benchmark)


def rows(gallery: Gallery) -> list[dict[str, object]]:
    table = gallery.load(None, ["id", "vector", "vector_base", "pid", "camid", "image", "thumbnail", "position"])
    return table.sort_by("position").drop_columns(["position"]).to_pylist()


@pytest.mark.slow
def test_a_runs_gallery_ranks_as_its_evaluation_and_a_second_index_changes_nothing(
    run: SimpleNamespace, ray_session: None
) -> None:
    gallery = index(run.config)
    visible = select(run.manifest, split="gallery", modality="visible")
    first = rows(gallery)
    assert [row["id"] for row in first] == visible["image"].to_pylist()
    assert [row["pid"] for row in first] == visible["pid"].to_pylist()
    assert [row["camid"] for row in first] == visible["camid"].to_pylist()
    for row in first:
        original = (run.root / str(row["id"])).read_bytes()
        assert row["image"] == str(run.root / str(row["id"]))
        shape = decode(original, height=None, width=None, name="").shape
        assert Image.open(io.BytesIO(row["thumbnail"])).size == (shape[1], shape[0])  # smaller than a thumbnail may be

    data, evaluator = run.config.data, run.evaluator
    encoder = QueryEncoder(run.model, height=data.height, width=data.width)
    searcher, compared = Searcher(gallery, run.config.gallery), 0
    for name in run.config.evaluate.protocols:
        protocol = get_protocol(name)
        asking, drawn = evaluator.query(protocol), evaluator.gallery(protocol, 0)
        image_G, camid_G = drawn["image"].to_pylist(), drawn["camid"].to_pylist()
        camids = asking["camid"].to_pylist()
        pictures = [
            decode((run.root / image).read_bytes(), height=None, width=None, name=image)
            for image in asking["image"].to_pylist()
        ]
        alone_QG = evaluator.similarity(evaluator.image_vectors(asking, base=True), drawn, base=True)
        cases = [([Question(infrared=picture) for picture in pictures], list(range(len(pictures))), alone_QG)]
        for source in run.config.evaluate.text_sources:
            texts = evaluator.texts(protocol, source)
            if texts is None:
                continue
            ensemble_QG = evaluator.ensemble_similarity(evaluator.part_vectors(asking, texts), drawn)
            both = [
                Question(infrared=pictures[row], sentence=text, infrared_caption=own)
                for row, text, own in zip(texts.kept, texts.texts, texts.filter_texts, strict=True)
            ]
            cases.append((both, texts.kept.tolist(), ensemble_QG))
        for questions, kept, expected_QG in cases:
            requests = [
                Request(
                    weights=run.config.evaluate.ensemble.weights,
                    k=len(first),
                    where=Where(exclude_cameras=frozenset((2,) * (camids[row] == 3))),
                )
                for row in kept
            ]
            answers = searcher.search(encoder.encode(questions), requests)
            for answer, row, expected_G in zip(answers, kept, expected_QG, strict=True):
                order = np.argsort(-expected_G, kind="stable")
                names = [image_G[place] for place in order if not (camids[row] == 3 and camid_G[place] == 2)]
                assert [hit.id for hit in answer.hits if hit.id in set(image_G)] == names
                compared += 1
    assert compared == 16 * (3 + 4)  # held-out witnesses speak of indoor galleries only

    again = index(run.config)
    assert again.version > gallery.version and rows(again) == first


@pytest.mark.slow
def test_the_command_encodes_ones_own_pictures(
    run: SimpleNamespace,
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
    overrides = [f"run.dir={run.config.run.dir}", "gallery.thumbnail_height=20", "cluster.extract_workers=1"]
    monkeypatch.setattr("sys.argv", ["tvilfm", "index", *options, *overrides])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and "holds 3 images in space" in capsys.readouterr().out
    gallery, data = Gallery.open(str(tmp_path / "g")), run.config.data
    found = rows(gallery)
    assert [row["id"] for row in found] == [str(tmp_path / "photos" / name) for name in names]
    assert {(row["pid"], row["camid"]) for row in found} == {(None, 4)}
    for row in found:
        picture = decode(Path(str(row["id"])).read_bytes(), height=None, width=None, name="")
        pixels = np.stack([resized(picture, height=data.height, width=data.width)])
        raw = encode_pixels(run.model, pixels, "visible")
        for column, head in (("vector", run.model.embed), ("vector_base", run.model.embed_base)):
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
        found = gallery.nearest(vectors[17], ["id"], base=base, k=5, where=Where(), nprobes=4, refine_factor=30)
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
    ],
)
def test_what_cannot_be_indexed_is_said_in_one_message(
    run: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    config: Config = run.config
    folder = [f"run.dir={tmp_path if '--size' in arguments else config.run.dir}", f"run.name={config.run.name}"]
    monkeypatch.setattr("sys.argv", ["tvilfm", "index", "--gallery", str(tmp_path / "g"), *arguments, *folder])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and message in capsys.readouterr().err
