"""Evaluation on a handful of images with random features, against sums done by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.oracles import expand_queries_loop, k_reciprocal_rerank_loop, ranking_metrics_loop
from tvilfm.config import EnsembleWeights, EvaluateSection, RerankSection
from tvilfm.data.manifest import CAPTION_SCHEMA, build_manifest
from tvilfm.evaluation.evaluator import CaseResult, Evaluator, default_case
from tvilfm.evaluation.features import FeatureTable
from tvilfm.evaluation.protocols import get_protocol, select_query
from tvilfm.evaluation.query_texts import draw_query_texts, select_query_texts, sentences_of, with_noise
from tvilfm.models import TVILFM, ModelSpec
from tvilfm.models.bn_neck import BNNeck
from tvilfm.models.encode import encode_pixels, encode_texts
from tvilfm.terms import Split

ALL, INDOOR = "sysu_mm01/all/single", "sysu_mm01/indoor/single"
PIDS = (3, 8, 12, 20)
GALLERY_CAMERAS = {ALL: (1, 2, 4, 5), INDOOR: (1, 2)}
SECTION = EvaluateSection(
    protocols=(ALL, INDOOR), ensemble=EnsembleWeights(infrared=0.5, text=2.0, fusion=1.0), batch=3
)


def visible_caption(pid: int, camid: int) -> str:
    """One sentence an identity for what galleries show of it, another for cameras 4 and 5: draws have no choice."""
    return f"person {pid} " + ("outdoors" if camid in (4, 5) else "indoors")


@pytest.fixture(scope="module")
def manifest() -> pa.Table:
    """One image an identity and camera, so that the gallery draw has no choice either."""
    rows = []
    for pid in PIDS:
        for camid in range(1, 7):
            modality = "infrared" if camid in (3, 6) else "visible"
            split = "val" if pid == 20 else {"infrared": "query", "visible": "gallery"}[modality]
            rows.append(
                {"image": f"cam{camid}/{pid}.jpg", "pid": pid, "camid": camid, "modality": modality, "split": split}
            )
    return build_manifest(rows)


@pytest.fixture(scope="module")
def captions(manifest: pa.Table) -> pa.Table:
    rows = []
    for row in manifest.to_pylist():
        infrared = row["modality"] == "infrared"
        text = f"infrared of {row['image']}" if infrared else visible_caption(row["pid"], row["camid"])
        rows.append({"image": row["image"], "caption": text, "rephrased": "never used"})
    return pa.Table.from_pylist(rows, schema=CAPTION_SCHEMA)


@pytest.fixture(scope="module")
def model() -> TVILFM:
    """Two heads that differ, as after the text stage."""
    torch.manual_seed(0)
    spec = ModelSpec(backbone="resnet18_half", num_classes=4, text_width=8, text_layers=1, text_heads=2)
    model = TVILFM(spec)
    for head in (model.head, model.base_head):
        assert head is not None
        for tensor, low, high in (
            (head.bn.running_mean, -1, 1),
            (head.bn.running_var, 0.5, 2),
            (head.bn.weight.data, 0.5, 2),
            (head.bn.bias.data, -1, 1),
        ):
            assert tensor is not None
            tensor.uniform_(low, high)
    return model.eval()


def make_features(keys: list[str], dim: int, seed: int) -> FeatureTable:
    vectors = np.random.default_rng(seed).standard_normal((len(keys), dim)).astype(np.float32)
    return FeatureTable(keys=tuple(keys), vectors_ND=vectors)


@pytest.fixture(scope="module")
def images(manifest: pa.Table, model: TVILFM) -> FeatureTable:
    return make_features(sorted(manifest["image"].to_pylist(), reverse=True), model.spec.dim, 1)


@pytest.fixture(scope="module")
def texts(captions: pa.Table, model: TVILFM) -> FeatureTable:
    return make_features(sorted(set(captions["caption"].to_pylist())), model.spec.dim, 2)


def make_evaluator(
    model: TVILFM,
    manifest: pa.Table,
    captions: pa.Table,
    images: FeatureTable,
    texts: FeatureTable | None,
    *,
    filter_text: bool = True,
    section: EvaluateSection = SECTION,
    split: Split = "test",
) -> Evaluator:
    query_texts = draw_query_texts(manifest, captions, section, seed=0, splits=(split,))
    return Evaluator(model, manifest, query_texts, images, texts, section, filter_text=filter_text, split=split)


def unit_by_hand(head: BNNeck | None, raw: np.ndarray) -> np.ndarray:
    assert head is not None and head.bn.running_mean is not None and head.bn.running_var is not None
    mean, variance, weight, bias = (
        tensor.detach().double().numpy()
        for tensor in (head.bn.running_mean, head.bn.running_var, head.bn.weight, head.bn.bias)
    )
    value = (raw.astype(np.float64) - mean) / np.sqrt(variance + 1e-5) * weight + bias
    return value / math.sqrt(float(value @ value))


def case_by_hand(
    model: TVILFM,
    images: FeatureTable,
    texts: FeatureTable,
    protocol: str,
    source: str,
    kind: str,
    *,
    filter_text: bool,
    asked: tuple[int, ...] = PIDS[:3],
) -> tuple[list[float], float, float, int]:
    """CMC, mAP, mINP and the number of queries of one row of the table, image by image."""

    def image(name: str) -> np.ndarray:
        return images.vectors_ND[images.keys.index(name)]

    def text(sentence: str) -> np.ndarray:
        return texts.vectors_ND[texts.keys.index(sentence)]

    head = model.base_head if kind == "infrared" else model.head
    queries = [(pid, camid) for pid in asked for camid in (3, 6)]
    gallery = [(pid, camid) for pid in PIDS[:3] for camid in GALLERY_CAMERAS[protocol]]
    similarity = np.zeros((len(queries), len(gallery)))
    for q, (pid, camid) in enumerate(queries):
        name = f"cam{camid}/{pid}.jpg"
        raw, own = image(name), text(f"infrared of {name}")
        said = {
            "witness": text(visible_caption(pid, 1)),
            "witness-heldout": text(visible_caption(pid, 4)),
            "own": own,
            "none": own,
        }[source]
        fused = raw + said - own if filter_text else raw + said
        parts = {"infrared": raw, "text": said, "fusion": fused}
        weights = {"infrared": 0.5, "text": 2.0, "fusion": 1.0} if kind == "ensemble" else {kind: 1.0}
        for g, (gallery_pid, gallery_camid) in enumerate(gallery):
            target = unit_by_hand(head, image(f"cam{gallery_camid}/{gallery_pid}.jpg"))
            similarity[q, g] = sum(
                weight * float(unit_by_hand(head, parts[part]) @ target) for part, weight in weights.items()
            )
    pids, camids = zip(*queries, strict=True)
    gallery_pids, gallery_camids = zip(*gallery, strict=True)
    return ranking_metrics_loop(similarity, pids, gallery_pids, camids, gallery_camids, "sysu_mm01", 20)


def check(case: CaseResult, expected: tuple[list[float], float, float, int]) -> None:
    assert len(case.trials) == 10
    for trial in case.trials:
        np.testing.assert_allclose(trial.cmc[: len(expected[0])], expected[0], atol=1e-12)
        assert (trial.mAP, trial.mINP) == pytest.approx(expected[1:3], abs=1e-12)
        assert trial.num_valid_queries == expected[3]


@pytest.fixture(scope="module")
def one_caption(captions: pa.Table) -> pa.Table:
    """Every visible image of a person has the same sentence: the witness draw has no choice."""
    rows = [row | {"caption": row["caption"].replace("outdoors", "indoors")} for row in captions.to_pylist()]
    return pa.Table.from_pylist(rows, schema=CAPTION_SCHEMA)


def test_of_a_trained_gem_infrared_alone_reads_the_base_pooling_and_all_else_the_current_one(
    model: TVILFM, manifest: pa.Table, captions: pa.Table, images: FeatureTable, texts: FeatureTable
) -> None:
    base = make_features(list(images.keys), model.spec.dim, 9)
    both = FeatureTable(keys=images.keys, vectors_ND=np.hstack([images.vectors_ND, base.vectors_ND]))
    trained = TVILFM(replace(model.spec, trained_pool=True)).eval()
    trained.load_state_dict(model.state_dict())

    def scores(model: TVILFM, images: FeatureTable) -> list[tuple[str, float]]:
        results = make_evaluator(model, manifest, captions, images, texts).evaluate()
        return [(case.query, trial.mAP) for case in results for trial in case.trials]

    alone, others = scores(model, base), scores(model, images)
    assert scores(trained, both) == [a if a[0] == "infrared" else b for a, b in zip(alone, others, strict=True)]
    assert alone[0] != others[0]


@pytest.mark.parametrize("filter_text", [True, False])
@pytest.mark.parametrize("protocol", [ALL, INDOOR])
def test_rows_equal_sums_done_by_hand(
    model: TVILFM,
    manifest: pa.Table,
    one_caption: pa.Table,
    images: FeatureTable,
    texts: FeatureTable,
    protocol: str,
    filter_text: bool,
) -> None:
    results = make_evaluator(model, manifest, one_caption, images, texts, filter_text=filter_text).evaluate()
    found = {(case.protocol, case.text_source, case.query): case for case in results}
    values = []
    for source, kinds in (("none", ("infrared",)), *((s, ("text", "fusion", "ensemble")) for s in ("witness", "own"))):
        for kind in kinds:
            expected = case_by_hand(model, images, texts, protocol, source, kind, filter_text=filter_text)
            check(found[protocol, source, kind], expected)
            values.append(expected[1])
    assert len(set(values)) >= 5  # random features that tell the rows apart


def test_a_heldout_witness_speaks_of_cameras_outside_the_gallery(
    model: TVILFM, manifest: pa.Table, captions: pa.Table, images: FeatureTable, texts: FeatureTable
) -> None:
    results = make_evaluator(model, manifest, captions, images, texts).evaluate()
    (fusion,) = (case for case in results if (case.text_source, case.query) == ("witness-heldout", "fusion"))
    assert fusion.protocol == INDOOR
    check(fusion, case_by_hand(model, images, texts, INDOOR, "witness-heldout", "fusion", filter_text=True))


def test_rows_are_infrared_then_every_text_source_that_applies(
    model: TVILFM, manifest: pa.Table, captions: pa.Table, images: FeatureTable, texts: FeatureTable
) -> None:
    results = make_evaluator(model, manifest, captions, images, texts).evaluate()
    asked = ("text", "fusion", "ensemble")
    expected = [(ALL, "none", "infrared")]
    expected += [(ALL, source, kind) for source in ("witness", "own") for kind in asked]
    expected += [(INDOOR, "none", "infrared")]
    expected += [(INDOOR, source, kind) for source in ("witness", "witness-heldout", "own") for kind in asked]
    assert [(case.protocol, case.text_source, case.query) for case in results] == expected
    # 6 queries; camera 3 does not search camera 2: 3 of 9 kept images are right, else 4 of 12, and 1 of 3 indoors.
    assert [case.chance for case in results] == pytest.approx([1 / 3] * len(results))


def test_without_texts_infrared_alone_is_evaluated(
    model: TVILFM, manifest: pa.Table, captions: pa.Table, images: FeatureTable
) -> None:
    results = make_evaluator(model, manifest, captions, images, None).evaluate()
    assert [(case.protocol, case.query) for case in results] == [(ALL, "infrared"), (INDOOR, "infrared")]


def test_validation_identities_are_scored_by_the_same_rules(
    model: TVILFM, manifest: pa.Table, captions: pa.Table, images: FeatureTable, texts: FeatureTable
) -> None:
    evaluator = make_evaluator(model, manifest, captions, images, texts, split="val")
    assert evaluator.query(get_protocol(ALL))["image"].to_pylist() == ["cam3/20.jpg", "cam6/20.jpg"]
    assert set(evaluator.gallery(get_protocol(ALL), 0)["pid"].to_pylist()) == {20}
    assert {trial.rank1 for case in evaluator.evaluate() for trial in case.trials} == {1.0}


def test_the_ensemble_uses_the_current_head_for_its_infrared_part(
    model: TVILFM, manifest: pa.Table, one_caption: pa.Table, images: FeatureTable, texts: FeatureTable
) -> None:
    section = EvaluateSection(
        protocols=(ALL,),
        text_sources=("own",),
        default_text_source="own",
        ensemble=EnsembleWeights(infrared=1, text=0, fusion=0),
    )
    evaluator = make_evaluator(model, manifest, one_caption, images, texts, section=section)
    query = evaluator.query(get_protocol(ALL))
    found = evaluator.texts(get_protocol(ALL), "own")
    assert found is not None
    vectors = evaluator.text_query_vectors(query, found)["ensemble"]
    for row, name in zip(vectors, query["image"].to_pylist(), strict=True):
        raw = images.vectors_ND[images.keys.index(name)]
        np.testing.assert_allclose(row.numpy(), unit_by_hand(model.head, raw), atol=1e-5)


def test_query_texts_keep_the_queries_that_have_one(manifest: pa.Table, captions: pa.Table) -> None:
    gone = [row["image"] for row in manifest.to_pylist() if row["pid"] == 8 and row["camid"] in (4, 5)]
    fewer = manifest.filter(pa.array([image not in gone for image in manifest["image"].to_pylist()]))
    drawn = draw_query_texts(fewer, captions, SECTION, seed=0)
    protocol = get_protocol(INDOOR)
    found = select_query_texts(drawn, select_query(fewer, protocol), protocol, "witness-heldout", split="test")
    assert found is not None
    assert found.kept.tolist() == [0, 1, 4, 5]
    assert found.texts == [visible_caption(pid, 4) for pid in (3, 3, 12, 12)]
    assert found.filter_texts == [f"infrared of cam{camid}/{pid}.jpg" for pid in (3, 12) for camid in (3, 6)]
    protocol = get_protocol(ALL)
    for source in ("witness-heldout", "none"):
        query = select_query(manifest, protocol)
        drawn = draw_query_texts(manifest, captions, SECTION, seed=0)
        assert select_query_texts(drawn, query, protocol, source, split="test") is None  # type: ignore[arg-type]


def test_queries_without_a_text_leave_the_rows_of_that_source(
    model: TVILFM, manifest: pa.Table, captions: pa.Table, images: FeatureTable, texts: FeatureTable
) -> None:
    gone = [f"cam{camid}/8.jpg" for camid in (4, 5)]
    fewer = manifest.filter(pa.array([image not in gone for image in manifest["image"].to_pylist()]))
    results = make_evaluator(model, fewer, captions, images, texts).evaluate()
    cases = {case.query: case for case in results if case.text_source == "witness-heldout"}
    for kind in ("text", "fusion", "ensemble"):
        expected = case_by_hand(model, images, texts, INDOOR, "witness-heldout", kind, filter_text=True, asked=(3, 12))
        assert expected[3] == 4
        check(cases[kind], expected)


def test_all_texts_are_what_an_evaluation_looks_up(
    model: TVILFM, manifest: pa.Table, captions: pa.Table, images: FeatureTable
) -> None:
    sentences = sentences_of(draw_query_texts(manifest, captions, SECTION, seed=0))
    assert sentences == sorted(set(sentences))
    assert "never used" not in sentences and not [text for text in sentences if " 20" in text or "/20" in text]
    needed = make_features(sentences, model.spec.dim, 3)
    make_evaluator(model, manifest, captions, images, needed).evaluate()
    witness_only = SECTION.model_copy(update={"text_sources": ("witness",), "protocols": (ALL,)})
    fewer = make_features(sentences_of(draw_query_texts(manifest, captions, witness_only, seed=0)), model.spec.dim, 3)
    assert "infrared of cam3/3.jpg" in fewer.keys
    make_evaluator(model, manifest, captions, images, fewer, section=witness_only).evaluate()
    for row in (0, len(sentences) - 1):  # and not one more
        kept = [text for text in sentences if text != sentences[row]]
        with pytest.raises(KeyError):
            make_evaluator(model, manifest, captions, images, make_features(kept, model.spec.dim, 3)).evaluate()


def test_the_default_case_is_the_first_protocols_default_source(
    model: TVILFM, manifest: pa.Table, captions: pa.Table, images: FeatureTable, texts: FeatureTable
) -> None:
    results = make_evaluator(model, manifest, captions, images, texts).evaluate()
    for kind, source in (("infrared", "none"), ("fusion", "witness")):
        case = default_case(results[::-1], SECTION, kind)
        assert case is not None and (case.protocol, case.text_source, case.query) == (ALL, source, kind)
    heldout = SECTION.model_copy(update={"default_text_source": "witness-heldout"})
    assert default_case(results, heldout, "fusion") is None


def test_a_feature_table_comes_back_from_parquet(tmp_path: Path) -> None:
    table = make_features(["b", 'a "quoted" sentence, ü', "c"], 5, 0)
    table.write(tmp_path / "features.parquet")
    again = FeatureTable.read(tmp_path / "features.parquet")
    assert again.keys == table.keys
    assert again.vectors_ND.dtype == np.float32
    np.testing.assert_array_equal(again.vectors_ND, table.vectors_ND)
    np.testing.assert_array_equal(again.select(["c", "b", "c"]), table.vectors_ND[[2, 0, 2]])
    with pytest.raises(KeyError):
        again.select(["d"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_feature_that_is_not_finite_is_named(value: float) -> None:
    vectors = np.ones((3, 4), dtype=np.float32)
    vectors[1, 2] = value
    with pytest.raises(ValueError, match=r"features: expected finite numbers, got NaN or infinity for 'b'"):
        FeatureTable(keys=("a", "b", "c"), vectors_ND=vectors)
    with pytest.raises(ValueError, match=r"features: expected 2 vectors, got 3"):
        FeatureTable(keys=("a", "b"), vectors_ND=np.ones((3, 4), dtype=np.float32))


@torch.no_grad()
def test_extraction_keeps_the_order_asked_for(model: TVILFM) -> None:
    sentences = ["a very long sentence about a coat", "a", "a red bag", "blue"]
    alone = np.concatenate([encode_texts(model, [sentence]) for sentence in sentences])
    for batch in (1, 3, 10):
        np.testing.assert_allclose(encode_texts(model, sentences, batch=batch), alone, atol=1e-5)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 16, 3), dtype=np.uint8)
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    tensor = torch.from_numpy(((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    for modality, encode in (("visible", model.encode_visible), ("infrared", model.encode_infrared)):
        np.testing.assert_allclose(encode_pixels(model, pixels, modality), encode(tensor).numpy(), rtol=1e-4, atol=1e-4)


def parts_by_hand(
    model: TVILFM, images: FeatureTable, texts: FeatureTable, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Infrared, text and fusion of a query whose text is its own caption, which the filter takes away again."""
    raw = images.vectors_ND[images.keys.index(name)]
    own = texts.vectors_ND[texts.keys.index(f"infrared of {name}")]
    return tuple(unit_by_hand(model.head, vector) for vector in (raw, own, raw + own - own))  # type: ignore[return-value]


def asked_of_own_captions(
    model: TVILFM,
    manifest: pa.Table,
    captions: pa.Table,
    images: FeatureTable,
    texts: FeatureTable,
    section: EvaluateSection,
) -> tuple[dict[str, np.ndarray], list[tuple[np.ndarray, ...]], np.ndarray]:
    """Similarities that the evaluator finds, and the vectors by hand of the queries' parts and of the gallery."""
    evaluator = make_evaluator(model, manifest, captions, images, texts, section=section)
    protocol = get_protocol(ALL)
    query, gallery = evaluator.query(protocol), evaluator.gallery(protocol, 0)
    found = evaluator.texts(protocol, "own")
    assert found is not None
    parts = evaluator.part_vectors(query, found)
    similarity = {
        name: evaluator.similarity(vectors, gallery, base=False)(slice(None)) for name, vectors in parts.items()
    }
    similarity["ensemble"] = evaluator.ensemble_similarity(parts, gallery)(slice(None))
    by_hand = [parts_by_hand(model, images, texts, name) for name in query["image"].to_pylist()]
    rows = [images.vectors_ND[images.keys.index(name)] for name in gallery["image"].to_pylist()]
    return similarity, by_hand, np.stack([unit_by_hand(model.head, row) for row in rows])


def test_a_temperature_makes_every_vote_a_share_of_the_gallery(
    model: TVILFM, manifest: pa.Table, captions: pa.Table, images: FeatureTable, texts: FeatureTable
) -> None:
    weights = EnsembleWeights(infrared=0.5, text=2.0, fusion=1.0, temperature=0.2)
    section = SECTION.model_copy(update={"ensemble": weights})
    similarity, queries, gallery = asked_of_own_captions(model, manifest, captions, images, texts, section)
    for q, parts in enumerate(queries):
        expected = np.zeros(len(gallery))
        for weight, part in zip((0.5, 2.0, 1.0), parts, strict=True):
            votes = [math.exp(float(part @ g) / 0.2) for g in gallery]
            expected += weight * np.array(votes) / sum(votes)
        np.testing.assert_allclose(similarity["ensemble"][q], expected, atol=1e-5)


@pytest.mark.parametrize("method", ["k_reciprocal", "query_expansion"])
def test_a_second_look_is_taken_of_every_query(
    model: TVILFM, manifest: pa.Table, captions: pa.Table, images: FeatureTable, texts: FeatureTable, method: str
) -> None:
    rerank = RerankSection.model_validate({"method": method, "k1": 4, "k2": 2, "lambda_value": 0.4, "k": 3, "alpha": 2})
    section = SECTION.model_copy(update={"rerank": rerank})
    similarity, queries, gallery = asked_of_own_captions(model, manifest, captions, images, texts, section)
    infrared, text, fusion = (np.stack(part) for part in zip(*queries, strict=True))
    ensemble = 0.5 * infrared + 2.0 * text + fusion
    ensemble /= np.linalg.norm(ensemble, axis=1, keepdims=True)
    for name, vectors in (("infrared", infrared), ("fusion", fusion), ("ensemble", ensemble)):
        if method == "k_reciprocal":
            expected = k_reciprocal_rerank_loop(vectors, gallery, 4, 2, 0.4)
        else:
            expected = expand_queries_loop(vectors, gallery, 3, 2) @ gallery.T
        np.testing.assert_allclose(similarity[name], expected, atol=1e-5)


@pytest.mark.parametrize("second_look", ["none", "k_reciprocal", "query_expansion", "temperature"])
def test_blocks_of_queries_and_of_the_gallery_give_the_metrics_of_the_whole(
    model: TVILFM,
    manifest: pa.Table,
    captions: pa.Table,
    images: FeatureTable,
    texts: FeatureTable,
    second_look: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ensemble, rerank = SECTION.ensemble, RerankSection(k1=4, k2=2, k=3)
    if second_look == "temperature":
        ensemble = ensemble.model_copy(update={"temperature": 0.1})
    else:
        rerank = rerank.model_copy(update={"method": second_look})
    section = SECTION.model_copy(update={"ensemble": ensemble, "rerank": rerank})
    evaluator = make_evaluator(model, manifest, captions, images, texts, section=section)
    whole = evaluator.evaluate()
    monkeypatch.setattr("tvilfm.models.similarity.ROWS", 2)
    monkeypatch.setattr("tvilfm.evaluation.metrics.BLOCK_ELEMENTS", 3 * len(PIDS))
    for block, expected in zip(evaluator.evaluate(), whole, strict=True):
        for ours, theirs in zip(block.trials, expected.trials, strict=True):
            assert ours.cmc.tolist() == theirs.cmc.tolist()
            assert (ours.mAP, ours.mINP) == pytest.approx((theirs.mAP, theirs.mINP), abs=1e-12)


def test_noise_is_evaluated_as_its_sentences_would_be(
    model: TVILFM, manifest: pa.Table, captions: pa.Table, images: FeatureTable
) -> None:
    noises = ("typos-1", "other-person")
    section = SECTION.model_copy(update={"text_noise": noises})
    plain = draw_query_texts(manifest, captions, section, seed=0)
    drawn = with_noise(plain, manifest, section, seed=0)
    texts = make_features(sentences_of(drawn), model.spec.dim, 2)

    def evaluator(query_texts: pa.Table) -> Evaluator:
        return Evaluator(model, manifest, query_texts, images, texts, section, filter_text=True)

    def numbers(cases: list[CaseResult]) -> dict[tuple[str, str, str], list[tuple[float, list[float]]]]:
        return {
            (case.query, case.text_source, case.protocol): [(trial.mAP, trial.cmc.tolist()) for trial in case.trials]
            for case in cases
        }

    found = evaluator(drawn).evaluate_noise()
    assert list(found) == list(noises)
    assert numbers(evaluator(drawn).evaluate()) == numbers(evaluator(plain).evaluate())
    for noise in noises:
        of_noise = [row | {"noise": ""} for row in drawn.to_pylist() if row["noise"] == noise]
        case = {(row["protocol"], row["text_source"]) for row in of_noise}
        assert case == {(ALL, "witness")} and len(of_noise) == 6
        others = [row for row in plain.to_pylist() if (row["protocol"], row["text_source"]) not in case]
        replaced = pa.Table.from_pylist(of_noise + others, schema=plain.schema)
        expected = numbers(evaluator(replaced).evaluate())
        assert numbers(found[noise]) == {key: expected[key] for key in expected if key[1:] == ("witness", ALL)}


def test_noise_of_a_source_that_does_not_apply_is_left_out(
    model: TVILFM, manifest: pa.Table, captions: pa.Table, images: FeatureTable, texts: FeatureTable
) -> None:
    section = SECTION.model_copy(update={"text_noise": ("typos-1",), "default_text_source": "witness-heldout"})
    drawn = draw_query_texts(manifest, captions, section, seed=0)
    assert with_noise(drawn, manifest, section, seed=0).equals(drawn)
    assert make_evaluator(model, manifest, captions, images, texts, section=section).evaluate_noise() == {}
