"""The HTTP service on a backend without Ray: what it answers, whom it lets in, and what it refuses."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import psycopg
import pyarrow as pa
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from PIL import Image
from pydantic import ValidationError

from tests.untrained_run import UntrainedRun
from tvilfm.config import MAX_BATCH, EvaluateSection, GallerySection, ServeSection
from tvilfm.data.images import Pixels, resized, thumbnail
from tvilfm.data.manifest import select
from tvilfm.data.pixels import decode
from tvilfm.models.encode import encode_pixels
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.query import Query, QueryEncoder, Question, query_like
from tvilfm.retrieval.rows import vector_column, vectors_of
from tvilfm.retrieval.search import Searcher
from tvilfm.retrieval.spaces import Heads
from tvilfm.retrieval.store import Change, Unavailable
from tvilfm.service.app import FORMATS, ROOM, create_app
from tvilfm.service.backend import Busy, Result, Search, entries_of
from tvilfm.service.key_checker import KeyChecker
from tvilfm.service.keys import KeyFile, add_key, key_store
from tvilfm.service.messages import HEADER, Bulk, Message, ModelFacts, SearchBatch, SearchQuery, Status, Weights

WEIGHTS = EvaluateSection().ensemble.weights


class DirectBackend:
    """The parts of the service, called where they stand."""

    def __init__(self, run: UntrainedRun, gallery: Gallery) -> None:
        data = run.config.data
        self._model, self._size = run.model, {"height": data.height, "width": data.width}
        self._encoder = QueryEncoder(run.model, **self._size)
        self.gallery = gallery
        self._searcher = Searcher(gallery, GallerySection())
        self.facts = ModelFacts(
            model="untrained",
            space_id=self._encoder.space_id,
            dim=run.model.spec.dim,
            width=run.model.spec.image_dim,
            text=True,
            captioner=False,
            weights=Weights(**WEIGHTS),
        )
        self.fails: Exception | None = None

    async def encode_visible(self, pictures: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        pixels = np.stack([resized(picture, **self._size) for picture in pictures])
        return encode_pixels(self._model, pixels, "visible")

    async def caption(self, picture: Pixels) -> str:
        return f"a person in {picture.shape[0]} rows"

    async def like(self, id: str) -> Query | None:
        return query_like(self.gallery, id)

    async def search(self, searches: Sequence[Search]) -> list[Result]:
        if self.fails is not None:
            raise self.fails
        encoded = iter(self._encoder.encode([one.asked for one in searches if isinstance(one.asked, Question)]))
        queries = [next(encoded) if isinstance(one.asked, Question) else one.asked for one in searches]
        self._searcher.refresh()
        answers = self._searcher.search(queries, [one.request for one in searches])
        results = [Result.of(*row) for row in zip(searches, queries, answers, strict=True)]
        self.gallery.note(entries_of(searches, results))
        return results

    async def upsert(self, rows: pa.Table, *, space_id: str, by: str | None) -> Change:
        return self.gallery.upsert(rows, space_id=space_id, by=by)

    async def delete(self, ids: Sequence[str], *, by: str | None) -> Change:
        return self.gallery.delete(ids, by=by)

    async def delete_person(self, pid: str, *, by: str | None) -> Change:
        return self.gallery.delete_person(pid, by=by)

    async def ready(self) -> None:
        if self.fails is not None:
            raise self.fails

    async def picture(self, id: str) -> bytes | None:
        found = self.gallery.picture(id)
        return None if found is None else found[1]

    async def status(self) -> Status:
        facts = {"images": len(self.gallery), "version": self.gallery.snapshot().version, "search": "exact"}
        return Status(**dict(self.facts), **facts, cameras=self.gallery.cameras(), gallery_in_use=self.gallery.in_use)


class Service:
    """A backend, and clients of its application."""

    def __init__(self, run: UntrainedRun, url: str, **section: object) -> None:
        gallery = Gallery.prepare(url, space_id=run_space(run), heads=Heads.of(run.model), encoder="untrained")
        visible = select(run.manifest, split="gallery", modality="visible")
        names = visible["image"].to_pylist()
        pictures = [decode((run.root / name).read_bytes(), height=None, width=None, name=name) for name in names]
        data = run.config.data
        pixels = np.stack([resized(picture, height=data.height, width=data.width) for picture in pictures])
        gallery.upsert(
            pa.table(
                {
                    "id": names,
                    "pid": visible["pid"],
                    "camid": visible["camid"],
                    "thumbnail": [thumbnail(picture, height=64) for picture in pictures],
                    "raw": vector_column(encode_pixels(run.model, pixels, "visible")),
                }
            ),
            space_id=run_space(run),
        )
        gallery.publish()
        self.names = names
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("TRUNCATE audit")
        self.backend = DirectBackend(run, gallery)
        self.stages: list[str] = []
        serve = ServeSection(**section)
        self.checker = None
        if serve.keys is not None:
            self.checker = KeyChecker(key_store(serve.keys, gallery.database), gallery.database)
        self.app = create_app(
            self.backend,
            serve,
            thumbnail_height=64,
            checker=self.checker,
            observe=lambda stage, seconds: self.stages.append(stage),
        )
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def audited(self) -> list[dict[str, Any]]:
        columns = ("time", "key", "action", "version", "ids", "facts")
        with psycopg.connect(self.backend.gallery.url) as connection:
            rows = connection.execute(f"SELECT {', '.join(columns)} FROM audit ORDER BY number".encode()).fetchall()
        return [dict(zip(columns, row, strict=True)) for row in rows]


def run_space(run: UntrainedRun) -> str:
    return QueryEncoder(run.model, height=run.config.data.height, width=run.config.data.width).space_id


@pytest.fixture
def service(untrained_run: UntrainedRun, database: str) -> Iterator[Service]:
    service = Service(untrained_run, database, max_body_mb=0.5, max_pixels=100_000, max_batch=3)
    with service.client:
        yield service
    service.backend.gallery.close()


@pytest.fixture
def infrared(untrained_run: UntrainedRun) -> str:
    """An infrared query as a client sends it."""
    (name, *_) = select(untrained_run.manifest, split="query", modality="infrared")["image"].to_pylist()
    return base64.b64encode((untrained_run.root / name).read_bytes()).decode()


def encoded(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_a_hit_says_what_each_modality_added_and_filters_hold(service: Service, infrared: str) -> None:
    query = {"image": infrared, "sentence": "a woman in a red coat", "infrared_caption": "a woman in a coat", "k": 6}
    answer = service.client.post("/v1/search", json=query).json()
    assert len(answer["hits"]) == 6 and answer["modalities"] == ["infrared", "text", "fusion"]
    assert answer["filter_text"] == "given"
    for hit in answer["hits"]:
        assert sum(hit["shares"].values()) == pytest.approx(hit["score"], abs=1e-5)
    assert [hit["score"] for hit in answer["hits"]] == sorted((hit["score"] for hit in answer["hits"]), reverse=True)

    def hits(**changes: object) -> list[dict[str, object]]:
        found = service.client.post("/v1/search", json={**query, "k": 100, **changes})
        assert found.status_code == 200, found.text
        return found.json()["hits"]

    everything = {hit["id"] for hit in hits()}
    assert everything == set(service.names)
    assert {hit["camid"] for hit in hits(cameras=[1, "2"])} == {"1", "2"}
    assert {hit["camid"] for hit in hits(exclude_cameras=[1])} == {hit["camid"] for hit in hits()} - {"1"}
    people = hits(by_identity=True)
    assert len({hit["pid"] for hit in people}) == len(people) == 4
    assert hits(since="2024-01-01T00:00:00Z") == []  # nobody has a time
    assert set(hits(weights={"infrared": 0, "text": 1, "fusion": 0})[0]["shares"]) == {"text"}
    alone = service.client.post("/v1/search", json={"image": infrared}).json()
    assert alone["modalities"] == ["infrared"] and alone["filter_text"] == "none"
    assert set(service.stages) == {"decode"}


def test_hits_below_a_score_are_left_out_and_the_answer_says_how_many(service: Service, infrared: str) -> None:
    both = {"image": infrared, "sentence": "a woman in a red coat", "k": 6}

    def ask(**query: object) -> dict[str, Any]:
        found = service.client.post("/v1/search", json=query)
        assert found.status_code == 200, found.text
        return found.json()

    every = ask(**both)
    assert every["min_score"] is None and every["left_out"] == 0 and len(every["hits"]) == 6
    limit = every["hits"][2]["score"]
    some = ask(**both, min_score=limit)
    assert [hit["id"] for hit in some["hits"]] == [hit["id"] for hit in every["hits"] if hit["score"] >= limit]
    assert some["left_out"] == 6 - len(some["hits"]) > 0 and some["min_score"] == limit
    assert service.audited()[-1]["ids"] == [hit["id"] for hit in some["hits"]]  # nobody saw the others
    nobody = ask(**both, min_score=1000)
    assert nobody["hits"] == [] and nobody["left_out"] == 6
    assert service.client.post("/v1/search", json={**both, "min_score": "high"}).status_code == 422


def test_a_fitted_score_holds_for_the_modalities_that_vote_and_no_others(service: Service, infrared: str) -> None:
    fitted = {"infrared": -8.0, "text": -7.0, "ensemble": -6.0, "ensemble-unfiltered": -5.0}
    weights = {"infrared": 1, "text": 2, "fusion": 1}
    image, sentence, caption = {"image": infrared}, {"sentence": "a coat"}, {"infrared_caption": "a coat"}
    like = {"like": service.names[0]}

    def score(query: Mapping[str, object], wanted: str | None = "fitted") -> float | None:
        chosen = {} if wanted is None else {"min_score": wanted}
        found = service.client.post("/v1/search", json={**query, **chosen})
        assert found.status_code == 200, found.text
        return found.json()["min_score"]

    def refused(query: Mapping[str, object]) -> str:
        found = service.client.post("/v1/search", json={**query, "min_score": "fitted"})
        assert found.status_code == 422
        return found.json()["error"]

    assert "no fitted score for text with these weights" in refused(sentence)  # a run without validation identities
    service.backend.facts = service.backend.facts.model_copy(update={"min_scores": fitted})
    assert service.client.get("/v1/status").json()["min_scores"] == fitted
    assert [score(image), score(sentence), score(image | sentence | caption), score(image | sentence)] == [
        *fitted.values()
    ]
    assert score(image | sentence | {"weights": WEIGHTS}) == -5.0
    assert "no fitted score for infrared + text + fusion with these" in refused(image | sentence | {"weights": weights})
    assert "no fitted score for visible" in refused(like)
    assert score(image, None) is None and score(image, "none") is None
    service.backend.facts = service.backend.facts.model_copy(update={"min_scores": {"ensemble": -6.0}})
    assert score(image | sentence) == -6.0  # of a run whose fusion never subtracts


def test_the_service_may_leave_out_low_scores_unless_a_request_says_otherwise(
    untrained_run: UntrainedRun, database: str, infrared: str
) -> None:
    service = Service(untrained_run, database, min_score="fitted")
    service.backend.facts = service.backend.facts.model_copy(update={"min_scores": {"infrared": 1.5}})
    with service.client:
        found = service.client.post("/v1/search", json={"image": infrared, "k": 3}).json()
        assert (found["hits"], found["min_score"], found["left_out"]) == ([], 1.5, 3)
        for query in ({"image": infrared, "min_score": "none"}, {"sentence": "a coat"}, {"like": service.names[0]}):
            found = service.client.post("/v1/search", json={**query, "k": 3}).json()
            assert (len(found["hits"]), found["min_score"], found["left_out"]) == (3, None, 0)
    service.backend.gallery.close()


def test_a_batch_answers_as_searches_alone_do(service: Service, infrared: str) -> None:
    queries = [
        {"image": infrared, "k": 3},
        {"sentence": "a man in black trousers", "k": 2},
        {"image": infrared, "k": 1},
    ]
    together = service.client.post("/v1/search/batch", json={"queries": queries}).json()["answers"]
    for query, answer in zip(queries, together, strict=True):
        alone = service.client.post("/v1/search", json=query).json()
        assert [hit["id"] for hit in alone["hits"]] == [hit["id"] for hit in answer["hits"]]
    assert service.client.post("/v1/search/batch", json={"queries": queries * 2}).status_code == 422


def test_images_that_clients_send_are_read_or_the_accepted_formats_are_named(service: Service, infrared: str) -> None:
    def ask(image: str) -> httpx.Response:
        return service.client.post("/v1/search", json={"image": image})

    plain = ask(infrared)
    assert plain.status_code == 200
    assert ask(f"data:image/jpeg;base64,{infrared}").json()["hits"] == plain.json()["hits"]
    tiff = ask(text(encoded(Image.new("RGB", (20, 40)), "TIFF")))
    assert tiff.status_code == 422
    assert tiff.json()["error"].startswith("image: expected an image as JPEG, PNG, WEBP, BMP, got a file that begins")
    assert "BytesIO" not in tiff.text and "Restore" not in tiff.text


def test_a_16_bit_query_is_scaled_as_the_run_scaled_its_images(service: Service) -> None:
    gray = np.random.default_rng(0).integers(0, 256, (40, 20), dtype=np.uint8)

    def ask(values: npt.NDArray[np.uint16]) -> list[tuple[str, float]]:
        hits = service.client.post("/v1/search", json={"image": text(encoded(Image.fromarray(values)))}).json()["hits"]
        return [(hit["id"], round(hit["score"], 5)) for hit in hits]

    expected = ask(gray)
    assert ask(gray.astype(np.uint16) * 257) == expected != ask(gray.T.copy())
    service.backend.facts = service.backend.facts.model_copy(update={"depth_range": (7000, 7000 + 8 * 255)})
    assert ask(7000 + 8 * gray.astype(np.uint16)) == expected
    assert service.client.get("/v1/status").json()["depth_range"] == [7000, 9040]


def test_a_sentence_that_is_cut_is_said(service: Service, infrared: str) -> None:
    def cut(**query: object) -> bool:
        return service.client.post("/v1/search", json=query).json()["sentence_cut"]

    assert not cut(sentence="a man " + "with a long blue coat and a bag " * 8)  # 66 tokens
    assert cut(sentence="a man " + "with a long blue coat and a bag " * 10)
    assert cut(image=infrared, sentence="a man", infrared_caption="coat " * 80)
    assert not cut(image=infrared)


@pytest.mark.parametrize("blank", [" ", "\t\n", "\u200b\u200d", "\ufeff", "\u2003 \u00ad"])
def test_a_blank_sentence_is_refused(service: Service, infrared: str, blank: str) -> None:
    for query in ({"sentence": blank}, {"image": infrared, "sentence": "a man", "infrared_caption": blank}):
        answer = service.client.post("/v1/search", json=query)
        assert answer.status_code == 422 and "expected words, got blank text" in answer.json()["error"]


def test_a_written_picture_is_found_shown_replaced_and_removed(service: Service, untrained_run: UntrainedRun) -> None:
    own = (untrained_run.root / service.names[0]).read_bytes()
    id = "camera 9/é?x=1#b.jpg"
    path = "/v1/gallery/camera%209%2F%C3%A9%3Fx%3D1%23b.jpg"
    row = {
        "image": text(own),
        "camid": 9,
        "pid": "p/0077",
        "time": "2026-01-02T03:04:05+02:00",
        "reference": "s3://b/k",
    }
    written = service.client.put(path, json=row).json()
    assert written["count"] == 1
    query = {"sentence": "a coat", "cameras": [9], "min_version": written["version"]}
    (hit,) = service.client.post("/v1/search", json=query).json()["hits"]
    assert (hit["id"], hit["pid"], hit["time"], hit["image"]) == (id, "p/0077", "2026-01-02T01:04:05Z", "s3://b/k")
    # The same picture has the vectors that indexing gave it.
    everything = service.client.post("/v1/search", json={"sentence": "a coat", "k": 100}).json()["hits"]
    scores = {one["id"]: one["score"] for one in everything}
    assert scores[id] == pytest.approx(scores[service.names[0]], abs=1e-5)
    shown = service.client.get(f"{path}/image")
    assert shown.headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(shown.content)).format == "JPEG"

    moved = service.client.put(path, json={**row, "camid": 8})
    assert moved.status_code == 200
    assert service.client.get("/v1/status").json()["images"] == len(service.names) + 1
    assert service.client.post("/v1/search", json=query).json()["hits"] == []
    late = {"sentence": "a coat", "min_version": 10**9}
    assert service.client.post("/v1/search", json=late).status_code == 409

    # The answer may be lost, and the request be made again.
    first, again = service.client.delete(path), service.client.delete(path)
    assert (first.status_code, first.json()["count"]) == (200, 1)
    assert (again.status_code, again.json()["count"]) == (200, 0)
    assert [line["ids"] for line in service.audited() if line["action"] == "delete"] == [[id], [id]]
    assert service.client.get(f"{path}/image").status_code == 404


@pytest.mark.parametrize(
    ("time", "status"),
    [
        ("1899-12-31T23:59:59Z", 422),
        ("1900-01-01T00:00:00Z", 200),
        (timedelta(hours=1), 200),  # from now: a camera's clock may be wrong
        (timedelta(days=2), 422),
        ("9999-01-01T00:00:00Z", 422),
        ("2026-05-01T12:00:00", 422),
    ],
)
def test_an_image_was_taken_between_1900_and_now(
    service: Service, untrained_run: UntrainedRun, time: str | timedelta, status: int
) -> None:
    if isinstance(time, timedelta):
        time = (datetime.now(UTC) + time).isoformat()
    row = {"image": text((untrained_run.root / service.names[0]).read_bytes()), "camid": 1, "time": time}
    assert service.client.put("/v1/gallery/x", json=row).status_code == status


@pytest.mark.parametrize("size", [(100_000, 8), (70_000, 200), (65_501, 8), (8, 70_000), (64, 64), (100, 50)])
def test_a_thumbnail_is_small_whatever_the_proportions(
    untrained_run: UntrainedRun, database: str, size: tuple[int, int]
) -> None:
    service = Service(untrained_run, database)
    row = {"image": text(encoded(Image.new("RGB", size))), "camid": 1}
    assert service.client.put("/v1/gallery/x", json=row).status_code == 200
    width, height = Image.open(io.BytesIO(service.client.get("/v1/gallery/x/image").content)).size
    assert height <= 64 and width <= 4 * 64
    if max(size) <= 100:
        assert (width, height) == size
    service.backend.gallery.close()


def test_bulk_writes_are_all_or_none_and_a_person_is_forgotten(service: Service, untrained_run: UntrainedRun) -> None:
    own = text((untrained_run.root / service.names[0]).read_bytes())
    vector = [1.0] + [0.0] * (untrained_run.model.spec.dim - 1)
    ready = {"vector": vector, "vector_base": vector, "space_id": service.backend.facts.space_id}
    rows = [{"id": "a", "image": own, "camid": 1, "pid": 5}, {"id": "b", **ready, "camid": 2, "pid": 5}]
    assert service.client.post("/v1/gallery/bulk", json={"rows": rows}).json()["count"] == 2
    before = service.client.get("/v1/status").json()
    for wrong, status in (
        ({"id": "c", **ready, "vector": [2.0, *vector[1:]], "camid": 1}, 422),
        ({"id": "c", **ready, "vector": vector[1:], "camid": 1}, 422),
        ({"id": "c", **ready, "vector": vector[:1], "vector_base": vector[:1], "camid": 1}, 422),
        ({"id": "c", **ready, "space_id": "another", "camid": 1}, 409),
        ({"id": "c", "image": text(b"no picture"), "camid": 1}, 422),
        ({"id": "a", "image": own, "camid": 1}, 422),  # twice
        ({"id": "c", "camid": 1}, 422),
        ({"id": "c", **ready, "image": own, "camid": 1}, 422),
    ):
        answer = service.client.post("/v1/gallery/bulk", json={"rows": [rows[0], wrong]})
        assert answer.status_code == status and "error" in answer.json(), answer.text
    for vectors in (
        {"vector": vector[:-1]},
        {"vector_base": vector[:-1]},
        {"vector": []},
        {"vector": [], "vector_base": []},
    ):
        answer = service.client.put("/v1/gallery/c", json={**ready, **vectors, "camid": 1})
        assert answer.status_code == 422, answer.text
        assert answer.json()["error"].startswith("vector, vector_base: expected vectors of length")
    short = {**ready, "vector": vector[:1], "vector_base": vector[:1], "camid": 1}
    assert service.client.put("/v1/gallery/c", json=short).status_code == 422
    assert service.client.get("/v1/status").json() == before
    assert service.client.delete("/v1/people/5").json()["count"] == 2
    assert service.client.get("/v1/status").json()["images"] == len(service.names)
    actions = [(line["action"], line["ids"]) for line in service.audited()]
    assert actions == [("upsert", ["a", "b"]), ("delete person", ["a", "b"])]


def test_the_audit_trail_says_who_saw_whom_and_holds_neither_text_nor_pixels(
    untrained_run: UntrainedRun, tmp_path: Path, database: str, infrared: str
) -> None:
    token = add_key(KeyFile(tmp_path / "keys"), "front desk", ["read"])
    service = Service(untrained_run, database, keys=tmp_path / "keys")
    query = {"image": infrared, "sentence": "a zebra coat", "k": 2, "since": "2026-01-01T00:00:00Z", "until": None}
    query |= {"cameras": None, "exclude_cameras": [7]}
    answer = service.client.post("/v1/search", json=query, headers={HEADER: token}).json()
    (line,) = service.audited()
    assert line.pop("time") <= datetime.now(UTC)
    ids = [hit["id"] for hit in answer["hits"]]
    facts = {"modalities": ["infrared", "text", "fusion"], "k": 2, "exclude_cameras": ["7"], "since": query["since"]}
    assert line == {"key": "front desk", "action": "search", "version": answer["version"], "ids": ids, "facts": facts}
    service.backend.gallery.close()


SCOPE_OF = {
    ("POST", "/v1/search"): "read",
    ("POST", "/v1/search/batch"): "read",
    ("POST", "/v1/caption"): "read",
    ("GET", "/v1/status"): "read",
    ("GET", "/v1/gallery/x/image"): "read",
    ("PUT", "/v1/gallery/x"): "write",
    ("DELETE", "/v1/gallery/x"): "write",
    ("POST", "/v1/gallery/bulk"): "write",
    ("DELETE", "/v1/people/1"): "admin",
}


def test_a_key_opens_what_it_is_for_and_nothing_else(
    untrained_run: UntrainedRun, tmp_path: Path, database: str
) -> None:
    file = tmp_path / "keys.yaml"
    tokens = {scope: add_key(KeyFile(file), scope, [scope]) for scope in ("read", "write", "admin")}
    assert file.stat().st_mode & 0o077 == 0 and not any(token in file.read_text() for token in tokens.values())
    service = Service(untrained_run, database, keys=file)
    row = {"camid": 1, "image": text((untrained_run.root / service.names[0]).read_bytes())}
    bodies = {
        "/v1/search": {"sentence": "a coat"},
        "/v1/search/batch": {"queries": [{"sentence": "a coat"}]},
        "/v1/gallery/x": row,
        "/v1/gallery/bulk": {"rows": [{"id": "x", **row}]},
    }
    paths = {(method, path) for path, of in service.app.openapi()["paths"].items() for method in map(str.upper, of)}
    named = {(method, path.replace("{id}", "x").replace("{pid}", "1")) for method, path in paths}
    assert named - {("GET", "/healthz"), ("GET", "/readyz")} == set(SCOPE_OF)  # no route is forgotten here

    def ask(method: str, path: str, **headers: str | bytes) -> int:
        body = bodies.get(path) if method in ("POST", "PUT") else None
        return service.client.request(method, path, json=body, headers=headers).status_code

    for (method, path), scope in SCOPE_OF.items():
        assert ask(method, path) == 401
        cut, longer = tokens[scope][:-1], tokens[scope] + "x"
        for wrong in (b"", b"nobody", cut.encode(), longer.encode(), "tvi_é".encode(), "tvi_é".encode("latin-1")):
            assert ask(method, path, **{HEADER: wrong}) == 401, (method, path, wrong)
        for other, token in tokens.items():
            assert (ask(method, path, **{HEADER: token}) == 403) == (other != scope), (method, path, other)
    assert ask("GET", "/healthz") == ask("GET", "/readyz") == ask("GET", "/") == 200

    KeyFile(file).remove("read")
    service.checker.sync()
    assert ask("GET", "/v1/status", **{HEADER: tokens["read"]}) == 401
    service.backend.gallery.close()


def test_a_key_may_search_so_often_in_a_minute(untrained_run: UntrainedRun, tmp_path: Path, database: str) -> None:
    token = add_key(KeyFile(tmp_path / "keys"), "desk", ["read"], per_minute=2)
    service = Service(untrained_run, database, keys=tmp_path / "keys")
    service.checker._clock = lambda: 45.0  # one minute for all requests
    headers = {HEADER: token}

    def ask() -> httpx.Response:
        return service.client.post("/v1/search", json={"sentence": "a coat"}, headers=headers)

    assert [ask().status_code for _ in range(2)] == [200, 200]
    refused = ask()
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "16")
    assert "expected at most 2 searches and writes in a minute" in refused.json()["error"]
    assert service.client.get("/v1/status", headers=headers).status_code == 200  # a page shows thumbnails all the time
    assert len(service.audited()) == 2
    service.backend.gallery.close()


def test_a_body_is_read_when_its_sender_may_send_it(untrained_run: UntrainedRun, tmp_path: Path, database: str) -> None:
    reader, writer = (add_key(KeyFile(tmp_path / "keys"), scope, [scope]) for scope in ("read", "write"))
    service = Service(untrained_run, database, keys=tmp_path / "keys")
    read = []

    def body() -> Iterator[bytes]:
        read.append(True)
        yield b"[]"

    for token, status in ((None, 401), ("tvi_wrong", 401), (reader, 403), (writer, 422)):
        headers = {"Content-Type": "application/json"} | ({} if token is None else {HEADER: token})
        answer = service.client.post("/v1/gallery/bulk", content=body(), headers=headers)
        assert answer.status_code == status and bool(read) == (status == 422), token
    answer = service.client.post("/v1/search", content=b"{")
    assert answer.json() == {"error": "X-API-Key: expected an API key, got none. Ask an operator for one."}
    assert service.app.openapi()["paths"]["/v1/search"]["post"]["security"] == [{"APIKeyHeader": []}]
    service.backend.gallery.close()


def test_without_keys_a_page_of_another_name_is_turned_away(service: Service) -> None:
    for host, status in (("127.0.0.1:8000", 200), ("localhost", 200), ("evil.example", 400), ("", 400)):
        assert service.client.get("/v1/status", headers={"Host": host}).status_code == status
    # A form of another page cannot write: it cannot send JSON without asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        body = json.dumps({"sentence": "a coat"}).encode()
        assert service.client.post("/v1/search", content=body, headers={"Content-Type": kind}).status_code == 422


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://testserver", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://testserver:3000", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "https://evil.example/testserver"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[", "Sec-Fetch-Site": "same-origin"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
def test_without_keys_a_page_of_another_site_changes_nothing(
    service: Service, headers: dict[str, str], status: int
) -> None:
    for method, path in (("DELETE", "/v1/people/99"), ("DELETE", "/v1/gallery/x")):
        assert service.client.request(method, path, headers=headers).status_code == status
    assert service.client.post("/v1/search", json={"sentence": "a coat"}, headers=headers).status_code == status
    assert service.client.get("/v1/status", headers=headers).status_code == 200  # it cannot read what it gets


def test_with_keys_the_key_is_enough(untrained_run: UntrainedRun, tmp_path: Path, database: str) -> None:
    token = add_key(KeyFile(tmp_path / "keys"), "app", ["read"])
    service = Service(untrained_run, database, keys=tmp_path / "keys")
    headers = {HEADER: token, "Origin": "https://our-own-app.example", "Sec-Fetch-Site": "cross-site"}
    assert service.client.post("/v1/search", json={"sentence": "a coat"}, headers=headers).status_code == 200
    service.backend.gallery.close()


def test_the_pictures_of_a_request_are_counted_before_any_is_decoded(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def noted(content: bytes, **options: object) -> Pixels:
        decoded.append(content)
        return decode(content, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("tvilfm.service.app.decode", noted)

    def ask(*sides: int) -> httpx.Response:
        pictures = [text(encoded(Image.new("RGB", (side, side)))) for side in sides]
        return service.client.post("/v1/search/batch", json={"queries": [{"image": one} for one in pictures]})

    assert ask(180, 180, 180).status_code == 200 and len(decoded) == 3  # 97,200 of 100,000
    assert ask(316).status_code == 200 and len(decoded) == 4
    answer = ask(190, 190, 190)  # each of them is allowed
    assert answer.status_code == 422 and len(decoded) == 4
    assert "expected at most 100000 pixels in the images of a request, got 108300" in answer.json()["error"]
    rows = [{"id": str(n), "camid": 1, "image": text(encoded(Image.new("RGB", (240, 240))))} for n in range(2)]
    assert service.client.post("/v1/gallery/bulk", json={"rows": rows}).status_code == 422 and len(decoded) == 4


def test_the_pictures_of_all_requests_have_a_limit(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    query = {"image": text(encoded(Image.new("RGB", (300, 300))))}  # 90,000 of 100,000 pixels
    search, under_way = service.backend.search, 0

    async def ask_together() -> None:
        gate = asyncio.Event()

        async def slow(searches: Sequence[Search]) -> list[Result]:
            nonlocal under_way
            under_way += 1
            await gate.wait()
            return await search(searches)

        monkeypatch.setattr(service.backend, "search", slow)
        transport = httpx.ASGITransport(app=service.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            waiting = [asyncio.create_task(client.post("/v1/search", json=query)) for _ in range(ROOM)]
            while under_way < ROOM:
                await asyncio.sleep(0.01)
            refused = await asyncio.wait_for(client.post("/v1/search", json=query), 20)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            gate.set()
            assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * ROOM
            assert (await client.post("/v1/search", json=query)).status_code == 200

    asyncio.run(ask_together())


def test_the_page_needs_nothing_from_elsewhere(service: Service) -> None:
    answer = service.client.get("/")
    assert "http://" not in answer.text and "https://" not in answer.text and "<script>" in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_a_full_queue_and_a_part_that_is_replaced_say_when_to_try_again(service: Service) -> None:
    for error, status in ((Busy("full"), 429), (Unavailable("gone"), 503)):
        service.backend.fails = error
        answer = service.client.post("/v1/search", json={"sentence": "a coat"})
        assert answer.status_code == status and int(answer.headers["retry-after"]) >= 1
    assert service.client.get("/readyz").status_code == 503
    service.backend.fails = KeyError("a fault")
    answer = service.client.post("/v1/search", json={"sentence": "a coat"})
    assert answer.status_code == 500 and "a fault" not in answer.text


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of some kilobytes that says it is very large, and is."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compressobj(9)
    content = b"".join(rows.compress(bytes(width // 8 + 1)) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def hostile() -> Iterator[tuple[str, str, bytes, dict[str, str]]]:
    """Method, path, body and headers of what strangers send."""
    draw = random.Random(0)
    as_json = {"Content-Type": "application/json"}
    picture = Image.effect_noise((40, 80), 60).convert("RGB")
    files = {format: encoded(picture, format) for format in (*FORMATS, "GIF", "TIFF", "ICO", "PPM", "PDF")}
    pictures = [files["GIF"], files["TIFF"], files["ICO"], files["PPM"], files["PDF"], png_bomb(30_000, 30_000)]
    pictures += [encoded(Image.new("RGB", (400, 400))), encoded(Image.new("RGB", (1, 1))), b"\0" * 5000, b"<svg/>"]
    pictures += [files["JPEG"] + b"\0" * 200_000, encoded(picture, "PNG", exif=b"Exif\0\0" + b"\xff" * 900)]
    for format in FORMATS:
        content = files[format]
        pictures += [content[: draw.randrange(1, len(content))] for _ in range(8)]
        for _ in range(16):
            broken = bytearray(content)
            for _ in range(draw.choice((1, 4, 30))):
                broken[draw.randrange(len(broken))] = draw.randrange(256)
            pictures.append(bytes(broken))
    for content in pictures:
        yield "POST", "/v1/search", json.dumps({"image": text(content)}).encode(), as_json
    for content in pictures[:16]:
        yield "PUT", "/v1/gallery/x", json.dumps({"image": text(content), "camid": 1}).encode(), as_json
    words = ["", "\0", "a\0b", "\u202e", "\ud800", "🧥" * 1000, "&#0;&amp;" * 100, "x" * 10_000_000, "\x1b[2J"]
    words += [
        "%s%n",
        "' OR 1=1 --",
        "${jndi:ldap://x}",
        "a " * 900,
        "<|endoftext|><start_of_text>",
        "\N{COMBINING ACUTE ACCENT}" * 999,
    ]
    for word in words:
        yield "POST", "/v1/search", json.dumps({"sentence": word}).encode(), as_json
    yield "POST", "/v1/search", b'{"sentence": "\xff\xfe"}', as_json
    for id in (
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e",
        "%00",
        "a%00b",
        "%0d%0aX: y",
        "x" * 600,
        "%ff",
        "//",
        ".",
        "%E2%80%AE",
        "' or id != '",
    ):
        for method, path in (
            ("GET", f"/v1/gallery/{id}/image"),
            ("DELETE", f"/v1/gallery/{id}"),
            ("PUT", f"/v1/gallery/{id}"),
        ):
            yield method, path, b'{"camid": 1}' if method == "PUT" else b"", as_json
    values = [
        None,
        [],
        {},
        1e400,
        -1,
        2**63,
        2**200,
        "1",
        True,
        [[]],
        "9999-12-31T23:59:59-23:59",
        "0001-01-01T00:00:00+23:59",
    ]
    keys = ("image", "sentence", "k", "cameras", "weights", "since", "min_version", "by_identity", "surprise")
    for key in keys:
        for value in draw.sample(values, 6):
            yield "POST", "/v1/search", json.dumps({"sentence": "a coat", key: value}).encode(), as_json
    for pid in ("-1", "9223372036854775808", "1e3", "x", "%00"):
        yield "DELETE", f"/v1/people/{pid}", b"", {}
    for body in (b"", b"{", b"[]", b"null", b'"x"', b"[" * 100_000, b'{"a":' * 20_000, b"\0" * 1000, b"1" * 400_000):
        for path in ("/v1/search", "/v1/search/batch", "/v1/gallery/bulk"):
            yield "POST", path, body, as_json
    items, unknown = [1] * 200_000, dict.fromkeys(map(str, range(40_000)), 1)
    for path, key in (("/v1/search/batch", "queries"), ("/v1/gallery/bulk", "rows")):
        for body in ({key: items}, {key: [unknown]}, unknown):
            yield "POST", path, json.dumps(body).encode(), as_json
    for body in (unknown, {"cameras": items}, {"cameras": [""] * 90_000}):
        yield "POST", "/v1/search", json.dumps(body).encode(), as_json
    row = {"id": "x", "camid": 1, "space_id": "s", "vector_base": [1.0]}
    yield "POST", "/v1/gallery/bulk", json.dumps({"rows": [row]}).encode(), as_json
    yield (
        "POST",
        "/v1/gallery/bulk",
        json.dumps({"rows": [{**row, "vector": [1e39], "vector_base": [1.0]}]}).encode(),
        as_json,
    )


def test_hostile_requests_are_refused_and_leave_the_service_up_and_its_memory_flat(service: Service) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    requests = list(hostile())
    assert len(requests) >= 200
    before, sizes = service.client.get("/v1/status").json(), []
    for _ in range(3):
        for method, path, body, headers in requests:
            answer = service.client.request(method, path, content=body, headers=headers)
            assert answer.status_code < 500, (method, path, body[:80], answer.text)
            understood = path == "/v1/search" or method == "DELETE" or "image" in body[:20].decode()
            assert answer.status_code != 200 or understood, (method, path)
            assert len(answer.content) < 100_000
        sizes.append(resident())
    assert sizes[-1] - sizes[0] < 60e6, sizes
    assert before["images"] <= service.client.get("/v1/status").json()["images"] <= before["images"] + 1


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (SearchBatch, {"queries": [1] * 200_000}),
        (Bulk, {"rows": [1] * 200_000}),
        (SearchBatch, {"queries": [{"sentence": "a coat"}] * (MAX_BATCH + 1)}),
        (Bulk, {"rows": [{"vector": [""] * 60_000, "id": "a", "camid": 1}] * 4}),
        (SearchQuery, {"sentence": "a coat", "cameras": [""] * 1000, "exclude_cameras": []}),
        (SearchQuery, {"sentence": "a coat", "weights": dict.fromkeys(map(str, range(101)), 1)}),
        (SearchQuery, dict.fromkeys(map(str, range(100_000)), 1)),
    ],
)
def test_a_body_with_many_faults_tells_one(message: type[Message], body: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        message.model_validate(body)
    assert caught.value.error_count() == 1


def test_a_body_that_is_too_large_is_refused_however_it_comes(service: Service) -> None:
    large = b"x" * 600_000
    seen = 0

    def pieces() -> Iterator[bytes]:
        nonlocal seen
        for _ in range(60):
            seen += 10_000
            yield large[:10_000]

    for content in (large, pieces()):
        answer = service.client.post("/v1/search", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413 and "expected at most" in answer.json()["error"]


def test_the_documented_api_gives_no_fault_to_whoever_tries_it(service: Service) -> None:
    schema, tried = schemathesis.openapi.from_asgi("/openapi.json", service.app), set()
    for operation in schema.get_all_operations():

        @settings(
            max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
        )
        @given(case=operation.ok().as_strategy())
        def ask(case: schemathesis.Case) -> None:
            tried.add((case.method, case.path))
            answer = case.call()
            assert answer.status_code < 500, answer.text

        ask()
    assert len(tried) == len(SCOPE_OF) + 2


def test_images_like_one_of_the_gallery_are_ranked_by_the_vectors_of_the_current_head(service: Service) -> None:
    id = service.names[3]
    body = {"like": id, "k": 100, "by_identity": False}
    answer = service.client.post("/v1/search", json=body).json()
    assert answer["modalities"] == ["visible"] and answer["hits"][0]["id"] == id
    rows = service.backend.gallery.changes(None).rows
    vectors = vectors_of(rows["vector"])
    scores = dict(zip(rows["id"].to_pylist(), vectors @ vectors[rows["id"].to_pylist().index(id)], strict=True))
    assert [hit["id"] for hit in answer["hits"]] == sorted(scores, key=lambda name: -scores[name])
    both = [{"like": id}, {"sentence": "a coat"}, {"like": service.names[0]}]
    batch = service.client.post("/v1/search/batch", json={"queries": both}).json()["answers"]
    assert [one["modalities"] for one in batch] == [["visible"], ["text"], ["visible"]]
    assert service.client.post("/v1/search", json={"like": "nowhere"}).status_code == 404
    assert service.client.post("/v1/search", json={"like": id, "sentence": "a coat"}).status_code == 422


def test_an_image_is_described_only_by_a_service_with_a_captioner(service: Service, infrared: str) -> None:
    refusal = service.client.post("/v1/caption", json={"image": infrared})
    assert refusal.status_code == 404 and "serve.captioner" in refusal.json()["error"]
    service.backend.facts = service.backend.facts.model_copy(update={"captioner": True})
    answer = service.client.post("/v1/caption", json={"image": infrared})
    assert answer.json() == {"caption": f"a person in {Image.open(io.BytesIO(base64.b64decode(infrared))).height} rows"}
    assert service.client.post("/v1/caption", json={"image": "bm8="}).status_code == 422


def test_an_answer_repeats_the_text_that_was_subtracted(service: Service, infrared: str) -> None:
    body = {"image": infrared, "sentence": "a red coat", "infrared_caption": "a coat"}
    assert service.client.post("/v1/search", json=body).json()["infrared_caption"] == "a coat"
    del body["infrared_caption"]
    assert service.client.post("/v1/search", json=body).json()["infrared_caption"] is None
