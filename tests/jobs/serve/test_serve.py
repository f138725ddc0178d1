"""The service as it runs: real replicas behind a real port, rankings as measured, parts that are killed."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psycopg
import pyarrow as pa
import pytest
import ray
import torch
from ray.exceptions import OwnerDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import DeploymentUnavailableError

from cluster import machines
from cluster.places.finished import finished_run, min_scores_of
from cluster.serve.application import application, filter_captioner
from cluster.serve.launch import _check_room, serving
from cluster.serve.replica import Replica
from cluster.serve.searcher import GallerySearcher
from cluster.tables.indexing import index
from tests.processes import command_line, descendants, free_ports, until
from tests.unit.service.test_service import hostile
from tests.untrained_run import Ranking, UntrainedRun, evaluated_rankings
from tvilfm.captioning.captioner import Captioner
from tvilfm.captioning.colors import remove_colors
from tvilfm.config import Config, resolve
from tvilfm.data.manifest import select
from tvilfm.data.pixels import decode
from tvilfm.evaluation.open_set import OpenSet
from tvilfm.evaluation.results import ResultRow, Results
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.query import Query, Question
from tvilfm.retrieval.rows import vector_column
from tvilfm.retrieval.search import Answer, Request, Searcher
from tvilfm.retrieval.spaces import Heads
from tvilfm.retrieval.store import Unavailable
from tvilfm.service.backend import Busy, Search
from tvilfm.service.client import Client, as_json
from tvilfm.service.messages import SearchAnswer
from tvilfm.terms import METRICS

BATCH = 28


def assert_ranks_as_evaluated(client: Client, rankings: Sequence[Ranking], *, rounding: float = 0.0) -> SearchAnswer:
    """Ask for every ranking, and return the last answer; rows whose scores differ by `rounding` may change places."""
    for start in range(0, len(rankings), BATCH):
        asked = rankings[start : start + BATCH]
        answers = client.search_batch([_query(ranking) for ranking in asked])
        for ranking, answer in zip(asked, answers, strict=True):
            scores = {hit.id: hit.score for hit in answer.hits if hit.id in ranking.shown}
            assert len(scores) == len(ranking.names)
            for found, name in zip(scores, ranking.names, strict=True):
                assert found == name or abs(scores[found] - scores[name]) <= rounding
    return answers[-1]


def _query(ranking: Ranking) -> dict[str, Any]:
    return as_json(
        image=ranking.image,
        sentence=ranking.sentence,
        infrared_caption=ranking.infrared_caption if ranking.sentence else None,
        exclude_cameras=sorted(ranking.exclude_cameras),
        k=1000,
    )


@pytest.fixture(scope="module")
def config(untrained_run: UntrainedRun, ray_session: None, new_database: Callable[[], str]) -> Config:
    config = untrained_run.config
    changes = {
        "gallery": config.gallery.model_copy(update={"url": new_database()}),
        "serve": config.serve.model_copy(update={"port": free_ports(1)[0], "captioner": "run"}),
    }
    config = config.model_copy(update=changes)
    index(config)
    return config


@pytest.fixture(scope="module")
def address(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    here = tmp_path_factory.mktemp("served")
    # As in the folder of a user; the parts of the service run in another.
    relative = resolve(config.model_dump(mode="json"), [f"run.dir={os.path.relpath(config.run.dir, here)}"])
    with ExitStack() as stack:
        with chdir(here):
            address = stack.enter_context(serving(relative))
        yield address


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("serve", {"keys": Path("nowhere.yaml")}, "serve.keys: expected a file of API keys, got nowhere.yaml"),
        (
            "gallery",
            {"url": "postgresql://x@127.0.0.1:1/y"},
            "gallery.url: expected a PostgreSQL database at 127.0.0.1/y",
        ),
        ("run", {"name": "none"}, "run.name: expected a finished run"),
        ("serve", {"min_score": "fitted"}, "serve.min_score: expected a run that was evaluated on validation"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_starts(
    config: Config, section: str, changes: dict[str, object], message: str
) -> None:
    changed = config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})
    with pytest.raises(ValueError, match=message):
        application({"config": changed.model_dump(mode="json")})


def test_fitted_scores_are_those_of_the_runs_validation_identities(config: Config, tmp_path: Path) -> None:
    run = finished_run(config)
    assert run.validation is None and min_scores_of(run) == {}
    kept = replace(run, validation=tmp_path / "validation.json")
    assert min_scores_of(kept) == {}  # all identities were trained on
    curve = {"thresholds": (), "false_accepts": (), "false_rejects": (), "gallery_people": 8.0}
    open_set = {"text": OpenSet(**curve, fitted=0.25), "infrared": OpenSet(**curve)}
    row = ResultRow(
        **{"query": "infrared", "text_source": "none", "protocol": "p", "num_trials": 1},
        **dict.fromkeys(METRICS, 0.5),
        std=dict.fromkeys(METRICS, 0.0),
    )
    results = Results(
        dataset="synthetic", default_text_source="witness", default_protocol="p", rows=[row], open_set=open_set
    )
    results.write(kept.validation)
    assert min_scores_of(kept) == {"text": 0.25}


def test_weights_are_the_runs_and_what_its_evaluation_does_besides_is_said(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = finished_run(config)

    def served(*overrides: str) -> dict[str, float]:
        changed = resolve(run.config.model_dump(mode="json"), ["evaluate.ensemble.text=2.0", *overrides])
        monkeypatch.setattr("cluster.serve.application.finished_run", lambda config: replace(run, config=changed))
        app = application({"config": config.model_dump(mode="json")})
        return dict(app._bound_deployment.init_args[1].weights)

    logger = logging.getLogger("ray.serve")
    caplog.set_level(logging.WARNING, logger=logger.name)
    for name, value in (("propagate", True), ("disabled", False)):  # libraries of earlier tests may have disabled it
        monkeypatch.setattr(logger, name, value)
    assert config.evaluate.ensemble.text == 1.0
    assert served() == {"infrared": 1.0, "text": 2.0, "fusion": 1.0}
    assert [record.message for record in caplog.records if record.name == "ray.serve"] == []
    served("evaluate.rerank.method=k_reciprocal")
    assert "evaluate.rerank.method: expected none to rank as the evaluation does, got k_reciprocal" in caplog.text
    served("evaluate.ensemble.temperature=0.1")
    assert "evaluate.ensemble.temperature: expected null to rank" in caplog.text


@pytest.mark.parametrize("runs_already", [False, True])
def test_what_ends_with_the_service_is_what_it_started(
    config: Config, monkeypatch: pytest.MonkeyPatch, runs_already: bool
) -> None:
    calls: list[str] = []

    def noted(name: str) -> object:
        return lambda *_, **__: calls.append(name)

    there = SimpleNamespace(http_config=HTTPOptions(host="127.0.0.1", port=config.serve.port, request_timeout_s=None))
    monkeypatch.setattr("cluster.serve.launch._get_global_client", lambda **_: there if runs_already else None)
    names = ("start", "run", "delete", "shutdown")
    monkeypatch.setattr("cluster.serve.launch.serve", SimpleNamespace(**{name: noted(name) for name in names}))
    monkeypatch.setattr("cluster.serve.launch.application", lambda args: None)
    with serving(config):
        pass
    assert calls == (["run", "delete"] if runs_already else ["start", "run", "shutdown"])
    calls.clear()
    monkeypatch.setattr("cluster.serve.launch.application", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError), serving(config):
        pass
    assert calls == []


def test_a_machine_that_is_too_small_is_refused_and_a_cluster_may_grow(
    untrained_run: UntrainedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def check(gpus: float, searcher_gpus: float, *, address: str | None = None, **resources: float) -> None:
        config = untrained_run.config
        changes = {
            "cluster": config.cluster.model_copy(update={"gpus_per_worker": gpus, "address": address}),
            "serve": config.serve.model_copy(update={"searcher_gpus": searcher_gpus}),
        }
        _check_room(config.model_copy(update=changes), resources)

    check(0, 0, CPU=2)
    check(0.5, 0, CPU=2, GPU=1)
    check(0.3, 0.2, CPU=2, GPU=1)
    with pytest.raises(ValueError, match="serve: expected 2 GPUs for its replicas, got 1"):
        check(0, 1, CPU=2, GPU=1)
    with pytest.raises(ValueError, match=r"serve: expected 1\.6 CPUs for its replicas, got 1"):
        check(0, 0, CPU=1)
    assert capsys.readouterr().err == ""
    check(1, 0, address="auto", CPU=2)
    assert "expected 2 GPUs for its replicas, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_service_joins_no_serve_that_listens_otherwise_and_leaves_it_alone(address: str, config: Config) -> None:
    port = config.serve.port
    for changes, message in (
        ({"port": port + 1}, rf"serve\.port: expected {port}, .* already runs on this cluster, got {port + 1}"),
        ({"tls_cert": Path("cert.pem"), "tls_key": Path("key.pem")}, r"serve\.tls_cert: expected None"),
    ):
        changed = config.model_copy(update={"serve": config.serve.model_copy(update=changes)})
        with pytest.raises(ValueError, match=message), serving(changed):
            pass
    assert httpx.get(f"{address}/readyz", trust_env=False).is_success


@pytest.mark.slow
def test_every_query_ranks_over_http_as_the_evaluation_ranks_it(address: str, untrained_run: UntrainedRun) -> None:
    rankings = list(evaluated_rankings(untrained_run.config, untrained_run.evaluator))
    assert len(rankings) == 16 * (3 + 4)
    with Client(address) as client:
        last = assert_ranks_as_evaluated(client, rankings)
        (alone,) = (client.search(**{**_query(rankings[-1]), "image": rankings[-1].image}),)
    assert [hit.id for hit in alone.hits] == [hit.id for hit in last.hits]


@pytest.mark.slow
def test_the_runs_captioner_says_what_fusion_subtracts_where_the_client_does_not(
    address: str, config: Config, untrained_run: UntrainedRun
) -> None:
    (picture, *_) = (ranking.image for ranking in evaluated_rankings(untrained_run.config, untrained_run.evaluator))
    run = finished_run(config)
    captioner = Captioner.load(config.caption.infrared.model_copy(update={"model": str(run.captioner)}))
    (said,) = captioner.caption([decode(picture, height=None, width=None, name="")])
    with Client(address) as client:
        written = client.search(image=picture, sentence="a red coat", k=5)
        given = client.search(image=picture, sentence="a red coat", infrared_caption=remove_colors(said), k=5)
    assert (written.filter_text, given.filter_text) == ("captioner", "given")
    for one, other in zip(written.hits, given.hits, strict=True):
        assert one.id == other.id and one.score == pytest.approx(other.score, abs=1e-5)
    with pytest.raises(ValueError, match=r"serve\.captioner: expected a run that fine-tuned captioners"):
        filter_captioner(config, replace(run, captioner=None))


@pytest.mark.slow
def test_a_write_whose_client_hangs_up_is_audited_if_it_is_made(
    address: str, config: Config, untrained_run: UntrainedRun
) -> None:
    (picture, *_) = (ranking.image for ranking in evaluated_rankings(untrained_run.config, untrained_run.evaluator))
    body, hung_up = as_json(image=picture, camid=1), 0
    ids = {f"gone-{number}" for number in range(30)}
    for number, id in enumerate(sorted(ids)):
        try:
            httpx.put(f"{address}/v1/gallery/{id}", json=body, timeout=0.005 * (1 + number), trust_env=False)
        except httpx.TimeoutException:
            hung_up += 1
    assert hung_up
    time.sleep(3.0)  # what was under way is made, or not
    with psycopg.connect(config.gallery_url) as connection:
        written = connection.execute("SELECT id FROM image WHERE id = ANY(%s)", (list(ids),)).fetchall()
        noted = connection.execute("SELECT unnest(ids) FROM audit WHERE action = 'upsert' AND ids <@ %s", (list(ids),))
        assert sorted(noted.fetchall()) == sorted(written)
    with Client(address) as client:
        for id in ids:
            client.delete(id)


@pytest.mark.slow
def test_parts_are_killed_under_load_and_nobody_who_tries_twice_sees_it(
    address: str, config: Config, untrained_run: UntrainedRun
) -> None:
    names = select(untrained_run.manifest, split="gallery", modality="visible")["image"].to_pylist()
    picture = (untrained_run.root / names[0]).read_bytes()
    stop, errors, acknowledged, searched = threading.Event(), [], [], []

    def write(worker: int) -> None:
        with Client(address, retries=1) as client:
            number = 0
            while not stop.is_set():
                id = f"load-{worker}-{number}"
                number += 1
                try:
                    client.put(id, image=picture, camid=1, pid=100 + worker)
                    acknowledged.append(id)
                except Exception as error:
                    errors.append(error)

    def search() -> None:
        with Client(address, retries=1) as client:
            while not stop.is_set():
                try:
                    searched.append(client.search(image=picture, sentence="a coat", k=3).version)
                except Exception as error:
                    errors.append(error)

    workers = [threading.Thread(target=write, args=(n,)) for n in range(2)]
    workers += [threading.Thread(target=search) for _ in range(2)]
    for worker in workers:
        worker.start()

    def both_go_on() -> None:
        writes, searches = len(acknowledged), len(searched)
        until(lambda: len(acknowledged) > writes + 5 and len(searched) > searches + 5)

    both_go_on()
    with psycopg.connect(config.gallery_url) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    for _ in range(2):
        both_go_on()
        (pid, *_) = before = replicas()
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid, before=before: pid not in replicas() and len(replicas()) == len(before))
    both_go_on()
    stop.set()
    for worker in workers:
        worker.join(120)
    assert errors == []
    assert Gallery.open(config.gallery_url).contains(acknowledged).all()
    assert len(acknowledged) == len(set(acknowledged)) > 20


def replicas() -> list[int]:
    """Processes of the service."""
    return [pid for pid in descendants(os.getpid()) if b"ServeReplica:tvilfm:Replica" in command_line(pid)]


def small_gallery(config: Config, url: str, **serve: object) -> Config:
    """How a gallery of three rows is served."""
    head_4D = np.ones((4, 4), dtype=np.float32)
    heads = Heads(current_4D=head_4D, base_4D=head_4D, eps=1e-5, width=4)
    gallery = Gallery.prepare(url, space_id="space", heads=heads, encoder="none")
    vector = vector_column(np.eye(4, dtype=np.float32)[:3])
    gallery.upsert(
        pa.table({"id": ["a", "b", "c"], "camid": [1, 2, 3], "vector": vector, "vector_base": vector}), space_id="space"
    )
    gallery.publish()
    changes = {
        "serve": config.serve.model_copy(update=serve),
        "gallery": config.gallery.model_copy(update={"url": url}),
    }
    return config.model_copy(update=changes)


def test_a_batch_counts_questions_and_not_the_requests_that_bring_them(
    untrained_run: UntrainedRun, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_gallery(untrained_run.config, database, batch=3)
    replica, sizes, search = GallerySearcher(config, Gallery.open(database)), [], Searcher.search

    def counted(self: Searcher, queries: Sequence[Query], requests: Sequence[Request]) -> list[Answer]:
        sizes.append(len(queries))
        return search(self, queries, requests)

    monkeypatch.setattr(Searcher, "search", counted)
    vectors = (torch.eye(4)[row % 3] for row in range(7))
    asked = [Query(parts={"text": one}, base=False, space_id="space", filter_text_source="none") for one in vectors]
    answers = replica._search(asked, [Request(weights={}, k=1)] * 7, {0})
    assert [hit.id for answer in answers for hit in answer.hits] == list("abcabca") and sizes == [3, 3, 1]


@pytest.mark.parametrize("read_url", [None, "postgresql:///nowhere?host=/nowhere"])
def test_a_searcher_sees_a_write_at_once_if_asked_for_its_version_and_else_soon(
    untrained_run: UntrainedRun, database: str, read_url: str | None
) -> None:
    config = small_gallery(untrained_run.config, database, follow_s=3600)
    section = config.gallery.model_copy(update={"read_url": read_url})
    replica = GallerySearcher(config.model_copy(update={"gallery": section}), Gallery.open(database))
    gallery = Gallery.open(database)
    asked = Query(parts={"text": torch.eye(4)[1]}, base=False, space_id="space", filter_text_source="none")
    version = gallery.delete(["b"]).version
    (answer,) = replica._search([asked], [Request(weights={})], {version})
    assert [hit.id for hit in answer.hits] == ["a", "c"] and answer.version >= version
    version = gallery.delete(["a"]).version
    until(lambda: replica.searcher.snapshot.includes(version))  # the database tells it
    facts = asyncio.run(replica.facts())
    assert (facts["images"], facts["cameras"], facts["search"], facts["gallery_in_use"]) == (1, ["3"], "exact", True)


def test_expired_rows_leave_when_the_service_starts(untrained_run: UntrainedRun, database: str) -> None:
    config = small_gallery(untrained_run.config, database, retention_days=30)
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE image SET added = now() - interval '31 days' WHERE id <> 'b'")
    gallery = Gallery.open(database)
    replica_of(config, Part())
    until(lambda: gallery.count() == 1)
    assert gallery.contains(["b"]).all()


class Part:
    """A deployment whose methods answer or fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, 0
        self.ready = self.encode = self.search = self

    async def remote(self, *arguments: object) -> list[object]:
        self.calls += 1
        await asyncio.sleep(0.01)
        if self.error is not None:
            raise self.error
        return []


def replica_of(config: Config, encoder: Part, *shards: Part) -> Replica:
    """A replica whose encoder and shards are deployments of their own."""
    facts = SimpleNamespace(space_id="space")
    return Replica(config, facts, None, None, encoder, shards or (Part(),))  # type: ignore[arg-type]


def test_an_answer_that_went_with_its_machine_is_asked_for_again(untrained_run: UntrainedRun, database: str) -> None:
    part = Part(error=OwnerDiedError("0" * 56, None, ""))
    question = Question(sentence="a red coat")
    search = Search(asked=question, request=Request(weights={}), min_version=0, facts={}, by=None)
    with pytest.raises(Unavailable):
        asyncio.run(replica_of(small_gallery(untrained_run.config, database), part).search([search]))
    assert part.calls == 2


def test_the_service_is_ready_when_every_part_answers(
    untrained_run: UntrainedRun, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, parts = small_gallery(untrained_run.config, database), [Part() for _ in range(3)]
    service = replica_of(config, *parts)
    asyncio.run(service.ready())
    assert [part.calls for part in parts] == [1, 1, 1]
    gone = Part(error=DeploymentUnavailableError(DeploymentID("Shard1")))
    with pytest.raises(Unavailable):
        asyncio.run(replica_of(config, Part(), Part(), gone).ready())

    def away(*_: object, **__: object) -> None:
        raise psycopg.OperationalError("connection refused")

    monkeypatch.setattr("tvilfm.retrieval.database.PATIENCE_S", 0.1)
    monkeypatch.setattr(psycopg, "connect", away)
    service._gallery.database.close()
    with pytest.raises(Unavailable, match="expected an answer from the database"):
        asyncio.run(service.ready())


def test_a_replica_refuses_more_than_max_queued_requests(untrained_run: UntrainedRun, database: str) -> None:
    service = replica_of(small_gallery(untrained_run.config, database, max_queued=2), Part())

    async def three() -> list[object]:
        return await asyncio.gather(*(service.search([]) for _ in range(3)), return_exceptions=True)

    *answers, refusal = asyncio.run(three())
    assert answers == [[], []] and isinstance(refusal, Busy)
    assert asyncio.run(service.search([])) == []  # the places are free again


@pytest.mark.slow
def test_hostile_requests_through_the_proxy_leave_the_service_up(address: str) -> None:
    url = httpx.URL(address)
    with httpx.Client(trust_env=False, timeout=60) as client:
        for method, path, body, headers in hostile():
            raw = url.copy_with(raw_path=path.encode("ascii", "replace"))
            answer = client.request(method, raw, content=body, headers=headers)
            assert answer.status_code < 500, (method, path, body[:80], answer.text)
        large = b"x" * 1_000_000
        for content in (large * 17, iter([large] * 17)):
            answer = client.post(f"{address}/v1/search", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413
        assert client.get(f"{address}/readyz").is_success


@pytest.mark.slow
def test_prometheus_finds_every_metric_that_the_dashboard_shows(address: str) -> None:
    with Client(address) as client:
        client.search(sentence="a coat")
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    dashboard = (Path(machines.__file__).parent / "templates" / "grafana_service.json").read_text()
    # A refusal is counted once there was one, and a recall only where the index answers.
    shown = set(re.findall(r"\bray_\w+", dashboard)) - {"ray_tvilfm_refused_total", "ray_tvilfm_recall"}
    assert len(shown) > 9

    def scraped() -> str:
        return httpx.get(url, trust_env=False).text

    until(lambda: shown <= set(re.findall(r"^ray_\w+", scraped(), re.MULTILINE)), 60)
    stages = set(re.findall(r'ray_tvilfm_stage_seconds_count{[^}]*stage="(\w+)"', scraped()))
    assert {"decode", "encode", "search"} <= stages
