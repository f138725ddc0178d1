"""Search against plain loops, and against the evaluation, whose ranking a client gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tests.untrained_run import draw_statistics
from tvilfm.config import EnsembleWeights, EvaluateSection, GallerySection
from tvilfm.data.images import Pixels
from tvilfm.data.manifest import CAPTION_SCHEMA, build_manifest, select
from tvilfm.evaluation.evaluator import Evaluator
from tvilfm.evaluation.features import FeatureTable
from tvilfm.evaluation.protocols import get_protocol
from tvilfm.evaluation.query_texts import draw_query_texts, sentences_of
from tvilfm.models import TVILFM, ModelSpec
from tvilfm.models.encode import encode_pixels, encode_texts
from tvilfm.models.similarity import similarity
from tvilfm.retrieval import exact, search
from tvilfm.retrieval.exact import ExactIndex
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.query import Query, QueryEncoder, Question
from tvilfm.retrieval.rows import Where, vector_column
from tvilfm.retrieval.search import Answer, Request, Searcher, merged
from tvilfm.retrieval.spaces import Heads, space_id
from tvilfm.retrieval.store import Changes, Snapshot

SPACE, DIM, NUM_ROWS = "feed-32x16", 24, 400
NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)
CPU = torch.device("cpu")


def unit(rng: np.random.Generator, count: int) -> npt.NDArray[np.float32]:
    values = rng.standard_normal((count, DIM)).astype(np.float32)
    found: npt.NDArray[np.float32] = values / np.linalg.norm(values, axis=1, keepdims=True)
    return found


def gallery_rows(numbers: Sequence[int], *, seed: int = 0) -> pa.Table:
    """Five images of a person, every seventh row nobody known, every ninth without a time; some rows are equal."""
    rng = np.random.default_rng(seed)
    columns: dict[str, object] = {"id": [f"r{n}" for n in numbers]}
    for name in ("vector", "vector_base"):
        vectors = unit(rng, len(numbers))
        vectors[len(numbers) // 2 :] = vectors[: len(numbers) - len(numbers) // 2]  # each row has a twin
        columns[name] = vector_column(vectors)
    columns["pid"] = pa.array([None if n % 7 == 0 else f"{n // 5:04}" for n in numbers])
    columns["camid"] = [str(n % 6 + 1) for n in numbers]
    columns["time"] = pa.array([None if n % 9 == 0 else NOON + timedelta(minutes=n) for n in numbers])
    return pa.table(columns)


def empty(url: str) -> Gallery:
    head_4D = np.ones((4, DIM), dtype=np.float32)
    heads = Heads(current_4D=head_4D, base_4D=head_4D, eps=1e-5, width=DIM)
    gallery = Gallery.prepare(url, space_id=SPACE, heads=heads, encoder="none")
    gallery.publish()
    return gallery


@pytest.fixture
def gallery(database: str) -> Gallery:
    gallery = empty(database)
    gallery.upsert(gallery_rows(range(NUM_ROWS)), space_id=SPACE)
    return gallery


def searcher(gallery: Gallery, **settings: int) -> Searcher:
    section = GallerySection(**settings)
    return Searcher(Gallery.open(gallery.url, section=section), section)


def query(vector: npt.NDArray[np.float32], *, base: bool = False) -> Query:
    parts = {"infrared" if base else "text": torch.from_numpy(vector)}
    return Query(parts=parts, base=base, space_id=SPACE, filter_text_source="none")


def ids(answer: Answer) -> list[str]:
    return [hit.id for hit in answer.hits]


WHERES = {
    "all": (Where(), lambda row: True),
    "cameras": (Where(cameras=frozenset(("1", "4"))), lambda row: row["camid"] in ("1", "4")),
    "no camera": (Where(cameras=frozenset()), lambda row: False),
    "not camera 2": (Where(exclude_cameras=frozenset(("2",))), lambda row: row["camid"] != "2"),
    "window": (
        Where(since=NOON + timedelta(minutes=10), until=NOON + timedelta(minutes=200)),
        lambda row: row["time"] is not None and 10 <= (row["time"] - NOON).total_seconds() / 60 <= 200,
    ),
    "all of it": (
        Where(
            cameras=frozenset(("1", "2", "3")),
            exclude_cameras=frozenset(("3", "5")),
            since=NOON + timedelta(minutes=100),
        ),
        lambda row: (
            row["time"] is not None and row["camid"] in ("1", "2") and row["time"] >= NOON + timedelta(minutes=100)
        ),
    ),
}


def ranked_by_hand(
    table: pa.Table, vector: npt.NDArray[np.float32], column: str, keep: object, by_identity: bool
) -> list[str]:
    found: list[tuple[float, int]] = []
    rows = table.to_pylist()
    for place, row in enumerate(rows):
        if keep(row):  # type: ignore[operator]
            score = sum(float(a) * float(b) for a, b in zip(vector, row[column], strict=True))
            found.append((-round(score, 9), place))
    seen, names = set(), []
    for _, place in sorted(found):
        pid = rows[place]["pid"]
        if not by_identity or pid is None or pid not in seen:
            names.append(rows[place]["id"])
        seen.add(pid)
    return names


@pytest.mark.parametrize("by_identity", [False, True])
@pytest.mark.parametrize("name", WHERES)
def test_hits_are_those_of_a_plain_loop(gallery: Gallery, name: str, by_identity: bool) -> None:
    where, keep = WHERES[name]
    rng = np.random.default_rng(1)
    table, vectors = gallery_rows(range(NUM_ROWS)), unit(rng, 4)
    queries = [query(vector, base=row % 2 == 1) for row, vector in enumerate(vectors)]
    searching = searcher(gallery)
    for k in (1, 7, 150, NUM_ROWS):
        requests = [Request(weights={}, k=k, where=where, by_identity=by_identity)] * len(queries)
        for answer, one, vector in zip(searching.search(queries, requests), queries, vectors, strict=True):
            column = "vector_base" if one.base else "vector"
            assert ids(answer) == ranked_by_hand(table, vector, column, keep, by_identity)[:k]


def test_chunks_do_not_change_an_answer(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [query(vector, base=row == 0) for row, vector in enumerate(unit(np.random.default_rng(8), 3))]
    requests = [Request(weights={}, k=k) for k in (20, 70, NUM_ROWS)]
    whole = searcher(gallery).search(queries, requests)
    monkeypatch.setattr(exact, "CHUNK_ROWS", 64)
    for mine, theirs in zip(searcher(gallery).search(queries, requests), whole, strict=True):
        assert mine.hits == theirs.hits


@pytest.mark.parametrize("exact_limit", [NUM_ROWS, 0])
@pytest.mark.parametrize("by_identity", [False, True])
def test_shares_of_the_rows_give_together_the_answer_of_the_whole(
    gallery: Gallery, exact_limit: int, by_identity: bool
) -> None:
    section = GallerySection(exact_limit=exact_limit)
    shares = [Searcher(Gallery.open(gallery.url, section=section, share=(part, 3)), section) for part in range(3)]
    counts = [one.gallery.count() for one in shares]
    assert sum(counts) == NUM_ROWS and min(counts) > NUM_ROWS // 4
    queries = [query(vector, base=row == 0) for row, vector in enumerate(unit(np.random.default_rng(8), 3))]
    requests = [Request(weights={}, k=k, by_identity=by_identity) for k in (5, 40, NUM_ROWS)]
    for _ in range(2):
        whole = searcher(gallery).search(queries, requests)
        parts = zip(*(one.search(queries, requests) for one in shares), strict=True)
        assert [ids(merged(part, request)) for part, request in zip(parts, requests, strict=True)] == list(
            map(ids, whole)
        )
        # A row that is written again gets a new stamp, and so another share.
        gallery.upsert(gallery_rows(range(0, NUM_ROWS, 3)), space_id=SPACE)
        gallery.delete([hit.id for hit in whole[0].hits])
        for one in shares:
            one.refresh()


def test_queries_of_one_batch_do_not_touch_each_other(gallery: Gallery) -> None:
    rng = np.random.default_rng(2)
    searching, queries, requests = searcher(gallery), [], []
    for row, vector in enumerate(unit(rng, 9)):
        where = list(WHERES.values())[row % len(WHERES)][0]
        queries.append(query(vector, base=row % 3 == 0))
        requests.append(Request(weights={}, k=row + 1, where=where, by_identity=row % 2 == 0))
    together = searching.search(queries, requests)
    alone = [searching.search([one], [request])[0] for one, request in zip(queries, requests, strict=True)]
    assert [ids(answer) for answer in together] == [ids(answer) for answer in alone]


@pytest.mark.parametrize("half", [False, True])
def test_the_first_pass_loses_no_row_that_ranks(gallery: Gallery, half: bool) -> None:
    # Copies that differ by less than half precision can tell.
    rng = np.random.default_rng(3)
    near = unit(rng, 1) + 1e-5 * rng.standard_normal((NUM_ROWS, DIM)).astype(np.float32)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    near = near.astype(np.float32)
    column = vector_column(near)
    table = gallery_rows(range(NUM_ROWS))
    gallery.upsert(table.set_column(table.schema.get_field_index("vector"), "vector", column), space_id=SPACE)
    index = ExactIndex.load(gallery.changes(None), device=CPU, half=half)
    vectors_QD = torch.from_numpy(np.concatenate([3 * unit(rng, 20), near[:1]]))
    order_QG = similarity(vectors_QD, torch.from_numpy(near)).sort(dim=1, descending=True, stable=True).indices
    for count in (1, 10, 399):
        for best, order_G in zip(index.rank(vectors_QD, [Where()] * 21, count, base=False), order_QG, strict=True):
            assert best.facts["id"].to_pylist() == [f"r{place}" for place in order_G[:count]]


def test_queries_that_rank_the_whole_gallery_share_its_vectors(gallery: Gallery) -> None:
    index = ExactIndex.load(gallery.changes(None), device=CPU, half=False)
    vectors_QD = torch.from_numpy(unit(np.random.default_rng(3), 9))
    found = index.rank(vectors_QD, [Where()] * 9, NUM_ROWS, base=False)
    assert len({best.vectors_RD.data_ptr() for best in found}) == 1
    for best in found:
        head = best.head(3)
        assert head.facts.equals(best.facts.slice(0, 3)) and head.vectors_RD.shape == (3, DIM)
        assert torch.equal(head.vectors_KD, best.vectors_KD[:3])


def test_a_lone_query_adds_up_as_many_do() -> None:
    generator = torch.Generator().manual_seed(0)
    gallery_GD = torch.nn.functional.normalize(torch.randn(301, 2048, generator=generator), dim=1)
    query_QD = torch.nn.functional.normalize(torch.randn(60, 2048, generator=generator), dim=1)
    together = similarity(query_QD, gallery_GD).numpy()
    np.testing.assert_array_equal(together, (query_QD.numpy().astype(float) @ gallery_GD.numpy().T).astype(np.float32))
    for rows in (slice(0, 1), slice(3, 6), slice(0, 60)):
        for places in ([0], [300], [7, 8, 9], list(range(0, 301, 7))):
            alone = similarity(query_QD[rows], gallery_GD[places]).numpy()
            np.testing.assert_array_equal(alone, together[rows, places])


def test_a_reader_loads_what_is_new_and_sees_what_a_new_one_sees(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    changes = Gallery.changes

    def counted(self: Gallery, since: Snapshot | None) -> Changes:
        new = changes(self, since)
        loaded.append(new.rows.num_rows)
        return new

    monkeypatch.setattr(Gallery, "changes", counted)
    searching, rng = searcher(gallery), np.random.default_rng(4)
    asked = [query(vector, base=base) for vector in unit(rng, 2) for base in (False, True)]
    requests = [Request(weights={}, k=2 * NUM_ROWS)] * 4
    searching.refresh()
    assert loaded == [NUM_ROWS, 0]

    steps = [
        (lambda: gallery.upsert(gallery_rows([3, 900, 901], seed=1), space_id=SPACE), 3),
        (lambda: gallery.delete(["r5", "r6", "r900"]), 0),
        (lambda: gallery.delete([f"r{n}" for n in range(50, 350)]), 0),
        (lambda: [gallery.upsert(gallery_rows([n], seed=n), space_id=SPACE) for n in (60, 61, 950)][-1], 3),
        (lambda: gallery.upsert(gallery_rows([60], seed=2), space_id=SPACE), 1),
        (lambda: gallery.delete([f"r{n}" for n in range(1000)]), 0),
        (lambda: gallery.upsert(gallery_rows([2, 1], seed=3), space_id=SPACE), 2),
    ]
    for step, new in steps:
        change = step()
        assert not searching.snapshot.includes(change.version)
        loaded.clear()
        searching.refresh()
        assert loaded == [new]
        answers, fresh = searching.search(asked, requests), searcher(gallery).search(asked, requests)
        assert [answer.hits for answer in answers] == [answer.hits for answer in fresh]
        assert searching.snapshot.includes(change.version) and all(one.version >= change.version for one in answers)
        assert len(answers[0].hits) == len(gallery)
    assert ids(answers[0]) in (["r1", "r2"], ["r2", "r1"])


def test_a_copy_that_was_not_updated_for_long_is_loaded_again(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    searching = searcher(gallery)
    gallery.delete([f"r{n}" for n in range(1, NUM_ROWS)])
    with psycopg.connect(gallery.url, autocommit=True) as connection:
        connection.execute("DELETE FROM removed")  # as after a day
    monkeypatch.setattr(search, "OLD_S", -1.0)
    searching.refresh()
    (answer,) = searching.search([query(unit(np.random.default_rng(0), 1)[0])], [Request(weights={})])
    assert ids(answer) == ["r0"]


def test_queries_of_another_model_are_refused(gallery: Gallery) -> None:
    asked = replace(query(unit(np.random.default_rng(0), 1)[0]), space_id="beef-32x16")
    with pytest.raises(ValueError, match=rf"space_id: expected vectors of {SPACE}, got beef-32x16"):
        searcher(gallery).search([asked], [Request(weights={})])


def test_an_empty_gallery_has_no_hits(database: str) -> None:
    gallery = empty(database)
    searching, asked = searcher(gallery), query(unit(np.random.default_rng(0), 1)[0])
    assert searching.search([asked], [Request(weights={}, by_identity=True)])[0].hits == []
    gallery.upsert(gallery_rows([4]), space_id=SPACE)
    searching.refresh()
    assert ids(searching.search([asked], [Request(weights={})])[0]) == ["r4"]


def test_a_gallery_that_outgrows_the_memory_is_searched_in_the_database(gallery: Gallery) -> None:
    searching = searcher(gallery, exact_limit=NUM_ROWS)
    assert searching.kind == "exact"
    gallery.upsert(gallery_rows([NUM_ROWS]), space_id=SPACE)
    searching.refresh()
    searching.refresh()
    assert searching.kind == "scan"
    gallery.delete([f"r{n}" for n in range(10)])
    searching.refresh()
    assert searching.kind == "exact"


@pytest.mark.parametrize("few_rows", [10_000, 50, 0])
def test_a_large_gallery_is_searched_by_the_index_with_the_same_answer(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch, few_rows: int
) -> None:
    gallery.build_index(workers=0)
    gallery.upsert(gallery_rows([3, 777], seed=9), space_id=SPACE)
    monkeypatch.setattr("tvilfm.retrieval.gallery.FEW_ROWS", few_rows)  # below it, filters are answered without it
    precise, approximate = searcher(gallery), searcher(gallery, exact_limit=10, ef_search=400, refine=20)
    assert approximate.kind == "index"
    rng = np.random.default_rng(5)
    for where, _ in WHERES.values():
        for by_identity in (False, True):
            queries = [query(vector, base=row == 1) for row, vector in enumerate(unit(rng, 3))]
            requests = [Request(weights={}, k=6, where=where, by_identity=by_identity)] * 3
            for mine, theirs in zip(
                precise.search(queries, requests), approximate.search(queries, requests), strict=True
            ):
                assert [(hit.id, hit.score) for hit in theirs.hits] == [(hit.id, hit.score) for hit in mine.hits]


def test_a_sample_of_the_recall_compares_the_latest_query_with_every_row(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    searching = searcher(gallery, exact_limit=10, ef_search=400, refine=20)
    asked = query(unit(np.random.default_rng(0), 1)[0])
    searching.search([asked], [Request(weights={}, k=3)])
    assert searching.sample_recall() is None  # no index
    gallery.build_index(workers=0)
    searching.search([asked], [Request(weights={}, k=3)])
    assert searching.sample_recall() == 1.0
    assert searching.sample_recall() is None  # no query since then
    searching.search([asked], [Request(weights={}, k=3)])
    by_index = searching.gallery._by_index  # type: ignore[attr-defined]
    best = ids(searcher(gallery).search([asked], [Request(weights={}, k=5)])[0])

    def without_best(*arguments: Any) -> pa.Table:
        rows = by_index(*arguments)
        return rows.filter(pa.array([id not in best for id in rows["id"].to_pylist()]))

    monkeypatch.setattr(searching.gallery, "_by_index", without_best)
    assert searching.sample_recall() == 0.5


def test_shares_say_what_each_modality_adds_and_sum_to_the_score(gallery: Gallery) -> None:
    rng = np.random.default_rng(6)
    parts = dict(zip(("infrared", "text", "fusion"), torch.from_numpy(unit(rng, 3)), strict=True))
    asked = Query(parts=parts, base=False, space_id=SPACE, filter_text_source="given")
    weights = ({"infrared": 1.0, "text": 1.0, "fusion": 1.0}, {"infrared": 0.0, "text": 2.0, "fusion": 0.5})
    vectors = dict(zip(*(gallery_rows(range(NUM_ROWS))[name].to_pylist() for name in ("id", "vector")), strict=True))
    orders = []
    for own in weights:
        (answer,) = searcher(gallery).search([asked], [Request(weights=own, k=30)])
        for hit in answer.hits:
            assert set(hit.shares) == {name for name, weight in own.items() if weight}
            for name, share in hit.shares.items():
                by_hand = own[name] * sum(float(a) * b for a, b in zip(parts[name], vectors[hit.id], strict=True))
                assert share == pytest.approx(by_hand, abs=1e-6)
            assert sum(hit.shares.values()) == pytest.approx(hit.score, abs=1e-6)
        orders.append(ids(answer))
    assert orders[0] != orders[1]
    with pytest.raises(ValueError, match="weights: expected one above 0"):
        searcher(gallery).search([asked], [Request(weights={"infrared": 0.0})])


# The evaluation's ranking, from pixels and sentences.

HEIGHT, WIDTH = 32, 16
PROTOCOLS = ("sysu_mm01/all/single", "sysu_mm01/indoor/single")
SECTION = EvaluateSection(protocols=PROTOCOLS, ensemble=EnsembleWeights(infrared=0.5, text=2.0, fusion=1.0), batch=16)


@dataclass(frozen=True)
class Lab:
    """A model, its dataset, and the features that an evaluation looks up."""

    model: TVILFM
    manifest: pa.Table
    captions: pa.Table
    pixels: dict[str, Pixels]
    images: FeatureTable
    texts: FeatureTable

    def evaluator(self, *, filter_text: bool) -> Evaluator:
        return Evaluator(
            self.model,
            self.manifest,
            draw_query_texts(self.manifest, self.captions, SECTION, seed=0),
            self.images,
            self.texts,
            SECTION,
            filter_text=filter_text,
        )


@pytest.fixture(scope="module")
def lab() -> Lab:
    """Three people, three images a camera, of which one pair shows two people and is the same picture."""
    rng = np.random.default_rng(0)
    rows, captions, pixels = [], [], {}
    for pid in (3, 8, 12):
        for camid in range(1, 7):
            modality = "infrared" if camid in (3, 6) else "visible"
            for n in range(3):
                image = f"cam{camid}/{pid}-{n}.jpg"
                split = "query" if modality == "infrared" else "gallery"
                rows.append({"image": image, "pid": pid, "camid": camid, "modality": modality, "split": split})
                caption = f"person {pid} in camera {camid} coat {n}" if modality == "visible" else f"dark {pid} {n}"
                captions.append({"image": image, "caption": caption})
                pixels[image] = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels["cam4/8-1.jpg"] = pixels["cam1/3-2.jpg"]
    manifest, caption_table = build_manifest(rows), pa.Table.from_pylist(captions, schema=CAPTION_SCHEMA)
    torch.manual_seed(0)
    spec = ModelSpec(backbone="resnet18_half", num_classes=4, text_width=8, text_layers=1, text_heads=2)
    model = TVILFM(spec)
    draw_statistics(model)
    model.eval()
    keys, features = [], []
    for modality in ("visible", "infrared"):
        names = select(manifest, modality=modality)["image"].to_pylist()
        keys += names
        features.append(encode_pixels(model, np.stack([pixels[name] for name in names]), modality))
    texts = sentences_of(draw_query_texts(manifest, caption_table, SECTION, seed=0))
    return Lab(
        model=model,
        manifest=manifest,
        captions=caption_table,
        pixels=pixels,
        images=FeatureTable(keys=tuple(keys), vectors_ND=np.concatenate(features)),
        texts=FeatureTable(keys=tuple(texts), vectors_ND=encode_texts(model, texts)),
    )


@pytest.fixture(scope="module")
def lab_gallery(lab: Lab, new_database: Callable[[], str]) -> Gallery:
    space = space_id(lab.model, height=HEIGHT, width=WIDTH)
    gallery = Gallery.prepare(new_database(), space_id=space, heads=Heads.of(lab.model), encoder="lab")
    visible = select(lab.manifest, modality="visible")
    raw = vector_column(lab.images.select(visible["image"].to_pylist()))
    facts = {"id": visible["image"], "pid": visible["pid"], "camid": visible["camid"]}
    gallery.upsert(pa.table({**facts, "raw": raw}), space_id=space)
    gallery.publish()
    return gallery


@pytest.mark.parametrize("filter_text", [True, False])
def test_every_query_of_every_text_source_ranks_as_the_evaluation_ranks_it(
    lab: Lab, lab_gallery: Gallery, filter_text: bool
) -> None:
    evaluator = lab.evaluator(filter_text=filter_text)
    encoder = QueryEncoder(lab.model, height=HEIGHT, width=WIDTH, filter_text=filter_text)
    searching, compared = searcher(lab_gallery), []

    def check(questions: list[Question], camids: list[int], weights: dict[str, float], expected_QG: np.ndarray) -> None:
        requests = [
            Request(weights=weights, k=len(lab_gallery), where=Where(exclude_cameras=frozenset(("2",) * (camid == 3))))
            for camid in camids
        ]
        together = searching.search(encoder.encode(questions), requests)
        alone = [
            searching.search(encoder.encode([one]), [own])[0] for one, own in zip(questions, requests, strict=True)
        ]
        for row, camid in enumerate(camids):
            order = np.argsort(-expected_QG[row], kind="stable")
            names = [image_G[place] for place in order if not (camid == 3 and camid_G[place] == 2)]
            for answer in (together[row], alone[row]):
                assert [one for one in ids(answer) if one in shown] == names
                compared.append(row)

    for name in PROTOCOLS:
        protocol = get_protocol(name)
        asking, gallery = evaluator.query(protocol), evaluator.gallery(protocol, 7)
        image_G, camid_G = gallery["image"].to_pylist(), gallery["camid"].to_pylist()
        shown, pixels = set(image_G), [lab.pixels[image] for image in asking["image"].to_pylist()]
        alone_QG = evaluator.similarity(evaluator.image_vectors(asking, base=True), gallery, base=True)(slice(None))
        check([Question(infrared=image) for image in pixels], asking["camid"].to_pylist(), {}, alone_QG)
        for source in SECTION.text_sources:
            texts = evaluator.texts(protocol, source)
            if texts is None:
                continue
            parts = evaluator.part_vectors(asking, texts)
            camids = asking["camid"].take(pa.array(texts.kept)).to_pylist()
            both = [
                Question(infrared=pixels[row], sentence=text, infrared_caption=own)
                for row, text, own in zip(texts.kept, texts.texts, texts.filter_texts, strict=True)
            ]
            sentences = [Question(sentence=text) for text in texts.texts]
            check(sentences, camids, {}, evaluator.similarity(parts["text"], gallery, base=False)(slice(None)))
            check(
                both, camids, {"fusion": 1.0}, evaluator.similarity(parts["fusion"], gallery, base=False)(slice(None))
            )
            check(both, camids, SECTION.ensemble.weights, evaluator.ensemble_similarity(parts, gallery)(slice(None)))
    assert len(compared) == 2 * 18 * (1 + 2 * 3 + 1 + 3 * 3)  # all search has no text that is held out


def test_the_filter_text_is_given_or_written_or_left_out_and_the_query_says_which(lab: Lab) -> None:
    asked: list[tuple[int, ...]] = []

    def captioner(images: Sequence[Pixels]) -> list[str]:
        asked.append(tuple(image.shape[0] for image in images))
        return ["dark 3 1" if image.shape[0] == 50 else "" for image in images]

    large = np.asarray(Image.fromarray(lab.pixels["cam3/3-1.jpg"]).resize((25, 50)))
    small, sentence = lab.pixels["cam3/3-1.jpg"], "person 3 in camera 1 coat 0"
    questions = [
        Question(infrared=large, sentence=sentence, infrared_caption="dark 8 0"),
        Question(infrared=large, sentence=sentence),
        Question(infrared=small, sentence=sentence),  # of which the captioner says nothing
        Question(infrared=large),
        Question(sentence=sentence, infrared_caption="dark 8 0"),
    ]

    def encode(**options: object) -> list[Query]:
        return QueryEncoder(lab.model, height=HEIGHT, width=WIDTH, **options).encode(questions)  # type: ignore[arg-type]

    given, written, silent, alone, text = encode(captioner=captioner)
    assert asked == [(50, 32)]  # the pictures as they came, all at once, and only those that fusion needs
    sources = [one.filter_text_source for one in (given, written, silent, alone, text)]
    assert sources == ["given", "captioner", "none", "none", "none"]
    assert [list(one.parts) for one in (given, alone, text)] == [["infrared", "text", "fusion"], ["infrared"], ["text"]]
    assert [one.base for one in (given, written, silent, alone, text)] == [False, False, False, True, False]

    (said,) = QueryEncoder(lab.model, height=HEIGHT, width=WIDTH).encode(
        [Question(infrared=large, sentence=sentence, infrared_caption="dark 3 1")]
    )
    torch.testing.assert_close(written.parts["fusion"], said.parts["fusion"], rtol=0, atol=1e-6)
    assert not torch.allclose(written.parts["fusion"], given.parts["fusion"], atol=1e-3)
    without = encode()
    assert [one.filter_text_source for one in without] == ["given", "none", "none", "none", "none"]
    ablation = encode(filter_text=False, captioner=captioner)
    assert len(asked) == 1 and {one.filter_text_source for one in ablation} == {"none"}
    torch.testing.assert_close(ablation[0].parts["fusion"], without[1].parts["fusion"], rtol=0, atol=1e-6)


def test_a_question_is_an_image_or_a_sentence_and_a_base_model_reads_none(lab: Lab) -> None:
    with pytest.raises(ValueError, match="question: expected an infrared image, a sentence, or both"):
        Question(infrared_caption="dark")
    base = TVILFM(replace(lab.model.spec, with_text=False)).eval()
    encoder = QueryEncoder(base, height=HEIGHT, width=WIDTH)
    with pytest.raises(ValueError, match="sentence: expected none"):
        encoder.encode([Question(sentence="a coat")])
    assert encoder.space_id != space_id(lab.model, height=HEIGHT, width=WIDTH)
    assert encoder.space_id != space_id(base, height=HEIGHT, width=WIDTH + 1)
