"""The gallery: what is written stays, what is deleted goes, and readers miss nothing."""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pytest
import torch

from tests.paths import REPOSITORY
from tests.untrained_run import draw_statistics
from tvilfm.config import GallerySection, load_config
from tvilfm.models import TVILFM, ModelSpec
from tvilfm.retrieval import database as database_module
from tvilfm.retrieval.audit import NewEntry
from tvilfm.retrieval.database import Database
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.rows import Where, vector_column, vectors_of
from tvilfm.retrieval.spaces import Heads
from tvilfm.retrieval.store import Snapshot, Unavailable
from tvilfm.service.key_checker import KeyChecker
from tvilfm.service.keys import KeyTable, add_key

SPACE, OTHER, DIM = "feed-96x48", "beef-96x48", 8


def heads(dim: int = DIM, *, seed: int = 0) -> Heads:
    """Heads of a model with drawn statistics."""
    current, base = np.random.default_rng(seed).random((2, 4, dim), dtype=np.float32) + np.float32(0.5)
    return Heads(current_4D=current, base_4D=base, eps=1e-5, width=dim)


def prepare(url: str, space: str = SPACE, **section: int) -> Gallery:
    return Gallery.prepare(url, space_id=space, heads=heads(), encoder="same", section=GallerySection(**section))


def rows(ids: list[str], *, seed: int = 0, pid: int | str | None = None, dim: int = DIM) -> pa.Table:
    """Random rows with vectors; every thumbnail says whose it is."""
    rng = np.random.default_rng(seed)
    vectors = {}
    for name in ("vector", "vector_base"):
        values = rng.standard_normal((len(ids), dim)).astype(np.float32)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        vectors[name] = vector_column(values)
    return pa.table(
        {
            "id": ids,
            **vectors,
            "pid": [None if pid is None else str(pid)] * len(ids),
            "camid": np.arange(len(ids)) % 6 + 1,
            "thumbnail": [f"the face of {id}".encode() for id in ids],
        }
    )


def content(gallery: Gallery) -> dict[str, list[float]]:
    """Return id -> vector."""
    table = gallery.changes(None).rows
    ids = table["id"].to_pylist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, vectors_of(table["vector"]).tolist(), strict=True))


def expected(table: pa.Table) -> dict[str, list[float]]:
    return dict(zip(table["id"].to_pylist(), vectors_of(table["vector"]).tolist(), strict=True))


@pytest.fixture
def gallery(database: str) -> Gallery:
    gallery = prepare(database)
    gallery.publish()
    return gallery


def audit(gallery: Gallery) -> list[tuple[Any, ...]]:
    with psycopg.connect(gallery.url) as connection:
        return connection.execute("SELECT key, action, version, ids, facts FROM audit ORDER BY number").fetchall()


def test_an_upsert_inserts_and_replaces_and_the_last_one_counts(gallery: Gallery, database: str) -> None:
    first, second = rows(["b", "a", "c"], seed=1), rows(["a", "d"], seed=2)
    assert gallery.upsert(first, space_id=SPACE).version < gallery.upsert(second, space_id=SPACE).version
    reader = Gallery.open(database)
    assert (len(reader), reader.dim, reader.space_id, reader.in_use) == (4, DIM, SPACE, True)
    assert content(reader) == expected(first) | expected(second)
    order = reader.changes(None).rows.sort_by("position")
    assert order["id"].to_pylist() == ["b", "c", "a", "d"]
    assert reader.picture("d") == (None, b"the face of d") and reader.picture("nobody") is None
    assert reader.contains(["a", "x", "d"]).tolist() == [True, False, True]


def test_raw_features_become_the_vectors_of_the_models_heads(database: str) -> None:
    for trained_pool in (False, True):
        spec = ModelSpec(backbone="resnet18_half", num_classes=4, text_width=8, text_layers=1, text_heads=2)
        model = TVILFM(replace(spec, trained_pool=trained_pool))
        torch.manual_seed(0)
        draw_statistics(model)
        model.eval()
        assert model.base_head is not None
        model.base_head.bn.weight.data.uniform_(0.5, 2.0)
        own = Heads.of(model)
        gallery = Gallery.prepare(database, space_id=f"raw-{trained_pool}", heads=own, encoder="e")
        raw = np.random.default_rng(0).standard_normal((5, spec.dim * (1 + trained_pool))).astype(np.float32)
        table = pa.table({"id": list("abcde"), "camid": [1] * 5, "raw": vector_column(raw)})
        gallery.upsert(table, space_id=gallery.space_id)
        stored = Gallery.open(database, space_id=gallery.space_id).changes(None).rows.sort_by("position")
        with torch.inference_mode():
            current, base = model.embed(torch.from_numpy(raw)), model.embed_base(torch.from_numpy(raw))
        np.testing.assert_array_equal(vectors_of(stored["vector"]), current.numpy())
        np.testing.assert_array_equal(vectors_of(stored["vector_base"]), base.numpy())
        assert not np.allclose(current, base)


def test_missing_columns_are_null_and_times_and_references_come_back(gallery: Gallery) -> None:
    taken = datetime(2024, 5, 1, 12, tzinfo=UTC)
    table = rows(["a", "b"]).drop_columns(["thumbnail", "pid"])
    table = table.append_column("time", [[taken, None]]).append_column("image", [["s3://photos/a.jpg", None]])
    gallery.upsert(table, space_id=SPACE)
    row = gallery.changes(None).rows.select(["id", "time", "image", "pid"]).to_pylist()[0]
    assert row == {"id": "a", "time": taken, "image": "s3://photos/a.jpg", "pid": None}
    assert gallery.picture("b") == (None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.set_column(0, "id", [["a", "a"]]), "rows.id: expected each id once, got 'a' twice"),
        (lambda table: table.set_column(0, "id", [["a", ""]]), "rows.id: expected 1 to 512 printable characters"),
        (lambda table: table.set_column(0, "id", [["a", "x\0y"]]), "rows.id: expected 1 to 512 printable characters"),
        (lambda table: table.set_column(0, "id", [["a", "x" * 513]]), "rows.id: expected 1 to 512 printable"),
        (lambda table: table.set_column(0, "id", [["a", None]]), "rows: expected the columns of row_schema"),
        (lambda table: table.drop_columns(["camid"]), "rows: expected a column camid"),
        (lambda table: table.drop_columns(["vector"]), "rows: expected either raw or vector and vector_base"),
        (lambda table: table.append_column("raw", vector_column(np.ones((2, DIM), np.float32))), "neither or both for"),
        (lambda table: table.set_column(1, "vector", [[[1.0] * 4] * 2]), "rows: expected the columns of row_schema"),
        (lambda table: table.set_column(1, "vector", [[[1.0] * DIM] * 2]), "rows.vector: expected unit vectors, got"),
        (
            lambda table: table.set_column(2, "vector_base", [[[float("nan")] * DIM] * 2]),
            "rows.vector_base: expected unit vectors, got a vector of length nan",
        ),
        (
            lambda table: table.drop_columns(["vector", "vector_base"]).append_column(
                "raw", vector_column(np.full((2, DIM), np.inf, np.float32))
            ),
            "rows.raw: expected finite numbers",
        ),
    ],
)
def test_invalid_rows_are_refused_and_nothing_is_written(gallery: Gallery, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gallery.upsert(change(rows(["a", "b"])), space_id=SPACE)
    assert len(gallery) == 0 and audit(gallery) == []


def test_vectors_of_another_space_are_refused_by_name(gallery: Gallery) -> None:
    with pytest.raises(ValueError, match=rf"space_id: expected vectors of {SPACE}, got {OTHER}"):
        gallery.upsert(rows(["a"]), space_id=OTHER)
    assert len(gallery) == 0


def test_deletes_count_the_rows_that_existed(gallery: Gallery, database: str) -> None:
    gallery.upsert(rows(["a", "b"], pid=1), space_id=SPACE)
    gallery.upsert(rows(["c", "it's; DROP"], pid=2, seed=1), space_id=SPACE)
    assert gallery.delete(["nobody"]).count == 0
    assert gallery.delete(["c", "a", "c", "nobody"]).count == 2
    assert set(content(Gallery.open(database))) == {"b", "it's; DROP"}
    counts = [gallery.delete_person(pid).count for pid in ("2", "2", "1")]
    assert counts == [1, 0, 1] and len(Gallery.open(database)) == 0
    gallery.upsert(rows(["a", "b", "c"]), space_id=SPACE)
    assert gallery.delete_camera("2").count == 1 and set(content(gallery)) == {"a", "c"}


def test_a_write_and_its_audit_entry_are_one_transaction(
    gallery: Gallery, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = gallery.upsert(rows(["a", "b"], pid=3), space_id=SPACE, by="ingest").version
    erased = gallery.delete_person("3", by="officer").version
    assert audit(gallery) == [
        ("ingest", "upsert", version, ["a", "b"], {"count": 2}),
        ("officer", "delete person", erased, ["a", "b"], {"pid": "3", "count": 2}),
    ]
    gallery.upsert(rows(["c"], pid=4), space_id=SPACE)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("ALTER TABLE audit ADD CONSTRAINT none CHECK (action <> 'delete person') NOT VALID")
    with pytest.raises(psycopg.errors.CheckViolation):
        gallery.delete_person("4")
    assert set(content(gallery)) == {"c"}


def test_people_and_cameras_stay_as_people_write_them(gallery: Gallery) -> None:
    people, cameras = ["0001", "1", "alice", None], ["entrance-10", "entrance-2", "2", "10"]
    table = rows(["a", "b", "c", "d"]).drop_columns(["pid", "camid"])
    table = table.append_column("pid", pa.array(people)).append_column("camid", pa.array(cameras))
    gallery.upsert(table, space_id=SPACE)
    stored = gallery.changes(None).rows.sort_by("id")
    assert (stored["pid"].to_pylist(), stored["camid"].to_pylist()) == (people, cameras)
    assert gallery.cameras() == list(gallery.describe().cameras) == ["2", "10", "entrance-2", "entrance-10"]
    assert gallery.delete_person("1").count == 1 and set(content(gallery)) == {"a", "c", "d"}
    assert gallery.delete_camera("entrance-10").count == 1 and set(content(gallery)) == {"c", "d"}


def test_numbers_of_an_older_database_become_their_text(new_database: Callable[[], str]) -> None:
    url = new_database()
    first = files("tvilfm.retrieval").joinpath("migrations", "0001_gallery.sql").read_text()
    with psycopg.connect(url) as connection:
        connection.execute("CREATE EXTENSION vector; CREATE TABLE schema_version (number integer NOT NULL)")
        connection.execute(f"{first}; INSERT INTO schema_version VALUES (1)".encode())
        connection.execute("CREATE TABLE image_1 PARTITION OF image FOR VALUES IN (1)")
        connection.execute(
            "INSERT INTO image (gallery, id, position, pid, camid, given, current, base) "
            "SELECT 1, id, 0, pid::bigint, 7, '[1,1]', '[1]', '[1]' "
            "FROM (VALUES ('a', 42), ('b', -1), ('c', NULL)) v (id, pid)"
        )
    Database.open(url).close()
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT id, pid, camid FROM image ORDER BY id").fetchall()
    assert found == [("a", "42", "7"), ("b", None, "7"), ("c", None, "7")]


def test_nothing_of_an_erased_person_is_left_in_any_table(gallery: Gallery, database: str) -> None:
    gallery.upsert(rows(["secret-1", "secret-2"], pid=777_123_456_789), space_id=SPACE)
    gallery.upsert(rows(["secret-1"], pid=777_123_456_789, seed=1), space_id=SPACE)
    gallery.delete_person("777123456789")
    with psycopg.connect(database) as connection:
        for table in ("image", "removed", "gallery"):
            records = connection.execute(f"SELECT t::text FROM {table} AS t").fetchall()
            assert not [record for (record,) in records if "secret" in record or "777123456789" in record], table


# Following the database


def followed(gallery: Gallery, seen: Snapshot, rows_by_stamp: dict[int, str]) -> Snapshot:
    """Apply the changes since a snapshot to a copy (stamp -> id), as `ExactIndex.load` does."""
    changes = gallery.changes(seen)
    if changes.complete:
        rows_by_stamp.clear()
    for stamp in changes.removed.tolist():
        rows_by_stamp.pop(stamp, None)
    rows_by_stamp |= dict(zip(changes.rows["stamp"].to_pylist(), changes.rows["id"].to_pylist(), strict=True))
    return changes.snapshot


def test_a_reader_follows_writes_replacements_and_deletes(gallery: Gallery) -> None:
    copy: dict[int, str] = {}
    seen = gallery.snapshot()
    for step, change in enumerate(
        (
            lambda: gallery.upsert(rows(["a", "b", "c"]), space_id=SPACE),
            lambda: gallery.upsert(rows(["b", "d"], seed=1), space_id=SPACE),
            lambda: gallery.delete(["a", "d"]),
            lambda: [gallery.upsert(rows(["e"]), space_id=SPACE), gallery.delete(["e"])],
        )
    ):
        change()
        seen = followed(gallery, seen, copy)
        assert sorted(copy.values()) == sorted(content(gallery)), step
        assert gallery.changes(seen).rows.num_rows == 0
    assert sorted(copy.values()) == ["b", "c"]


def test_a_transaction_that_commits_late_is_not_missed(gallery: Gallery, database: str) -> None:
    gallery.upsert(rows(["a", "b"]), space_id=SPACE)
    copy: dict[int, str] = {}
    with psycopg.connect(database) as early:
        early.execute("UPDATE image SET camid = '9' WHERE id = 'a'")
        (late,) = early.execute("SELECT pg_current_xact_id()::text::bigint").fetchone() or (0,)
        later = gallery.upsert(rows(["c"]), space_id=SPACE).version
        seen = followed(gallery, Snapshot("1:1:"), copy)
        assert later > late and seen.version >= later > late
        assert seen.includes(later) and not seen.includes(late)
        assert sorted(copy.values()) == ["a", "b", "c"]
        early.commit()
    changes = gallery.changes(seen)
    assert changes.rows["id"].to_pylist() == ["a"] and changes.rows["camid"].to_pylist() == ["9"]
    assert changes.snapshot.includes(late) and len(changes.removed) == 1
    assert followed(gallery, seen, copy).includes(late) and sorted(copy.values()) == ["a", "b", "c"]


def test_many_writers_at_once_leave_a_followers_copy_equal_to_the_database(gallery: Gallery, database: str) -> None:
    copy: dict[int, str] = {}
    seen, ended = gallery.changes(None).snapshot, threading.Event()

    def write(seed: int) -> None:
        own, rng = Gallery.open(database), np.random.default_rng(seed)
        for _ in range(15):
            ids = [f"r{n}" for n in rng.choice(30, size=5, replace=False)]
            own.upsert(rows(ids, seed=seed), space_id=SPACE) if rng.random() < 0.7 else own.delete(ids)
        own.close()

    def follow() -> None:
        nonlocal seen
        while not ended.is_set():
            seen = followed(gallery, seen, copy)

    with ThreadPoolExecutor(5) as pool:
        following = pool.submit(follow)
        try:
            list(pool.map(write, range(4)))
        finally:
            ended.set()
        following.result()
    followed(gallery, seen, copy)
    assert sorted(copy.values()) == sorted(content(gallery))
    assert len(audit(gallery)) == 4 * 15


def test_a_database_that_was_restored_is_read_from_the_start(gallery: Gallery) -> None:
    gallery.upsert(rows(["a"]), space_id=SPACE)
    changes = gallery.changes(Snapshot("900000:900000:"))
    assert changes.complete and changes.rows["id"].to_pylist() == ["a"]


def test_a_waiting_reader_wakes_at_once(gallery: Gallery, database: str) -> None:
    waiting = Gallery.open(database).wait(60.0)
    next(waiting)
    writer = threading.Timer(0.2, lambda: gallery.upsert(rows(["a"]), space_id=SPACE))
    writer.start()
    next(waiting)  # would take a minute
    assert set(content(gallery)) == {"a"}


# Galleries of several models


def test_the_gallery_of_a_new_model_is_filled_aside_and_published_at_once(gallery: Gallery, database: str) -> None:
    gallery.upsert(rows(["a", "b"]), space_id=SPACE)
    new = prepare(database, OTHER)
    new.upsert(rows(["a"], seed=3), space_id=OTHER)
    assert Gallery.open(database).space_id == SPACE
    with pytest.raises(ValueError, match="expected one that is not in use"):
        gallery.drop()
    new.publish()
    assert content(Gallery.open(database)) == expected(rows(["a"], seed=3))
    assert len(Gallery.open(database, space_id=SPACE)) == 2
    gallery.drop()
    with pytest.raises(ValueError, match=rf"gallery.url: expected vectors of {SPACE} in .*, got those of {OTHER}"):
        Gallery.open(database, space_id=SPACE)
    assert len(new) == 1


def test_retention_deletes_by_time_or_else_by_the_time_of_the_write(gallery: Gallery, database: str) -> None:
    now = datetime.now(UTC)
    table = rows(["old", "new", "unknown"]).append_column("time", [[now - timedelta(days=40), now, None]])
    gallery.upsert(table, space_id=SPACE)
    gallery.expire(rows_days=30, audit_days=None)
    assert set(content(gallery)) == {"new", "unknown"}
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE image SET added = added - interval '31 days' WHERE time IS NULL")
        connection.execute("UPDATE audit SET time = time - interval '3 days'")
        connection.execute("UPDATE removed SET time = time - interval '2 days'")
    gallery.expire(rows_days=30, audit_days=2)
    assert set(content(gallery)) == {"new"} and [entry[1] for entry in audit(gallery)] == ["retention"]
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT count(*) FROM removed WHERE time < now() - interval '1 day'").fetchone() == (
            0,
        )


# The index


@pytest.fixture(scope="module")
def indexed(new_database: Any) -> tuple[Gallery, np.ndarray, np.ndarray]:
    """A gallery of 4,000 rows with an index, their vectors, and their cameras: 1 has one row, 2 has 40, 3 the rest."""
    rng = np.random.default_rng(0)
    gallery = prepare(new_database(), refine=4, ef_search=40)
    vectors = rng.standard_normal((4000, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    camids = np.full(4000, 3)
    camids[:1], camids[1:41] = 1, 2
    for start in range(0, 4000, 1000):
        part = slice(start, start + 1000)
        table = pa.table(
            {
                "id": [f"r{n}" for n in range(start, start + 1000)],
                "camid": camids[part],
                "vector": vector_column(vectors[part]),
                "vector_base": vector_column(-vectors[part]),
            }
        )
        gallery.upsert(table, space_id=SPACE)
    progress: list[float] = []
    assert gallery.kind == "scan"
    gallery.build_index(workers=0, on_progress=progress.append)
    assert gallery.kind == "index" and all(0 <= share <= 1 for share in progress)
    return gallery, vectors, camids


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("few_rows", [10_000, 0])
@pytest.mark.parametrize("cameras", [None, {1}, {2}, {1, 2}, {3}, set()])
def test_a_filter_never_loses_hits(
    indexed: tuple[Gallery, np.ndarray, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    cameras: set[int] | None,
    few_rows: int,
    base: bool,
) -> None:
    gallery, vectors, camids = indexed
    monkeypatch.setattr("tvilfm.retrieval.gallery.FEW_ROWS", few_rows)  # 0: the index is asked first
    query = np.random.default_rng(1).standard_normal(DIM).astype(np.float32)
    matching = np.flatnonzero(np.ones(4000, bool) if cameras is None else np.isin(camids, sorted(cameras)))
    where = Where(cameras=None if cameras is None else frozenset(map(str, cameras)))
    for count in (10, 300):
        table = gallery.nearest(query, base=base, count=count, where=where)
        scores = vectors[matching] @ (-query if base else query)
        best = {f"r{n}" for n in matching[np.argsort(-scores)[:count]]}
        assert table.num_rows >= min(count, len(matching))
        assert len(best & set(table["id"].to_pylist())) >= 0.98 * len(best)


def test_the_index_is_used_and_new_rows_are_in_it_at_once(indexed: tuple[Gallery, np.ndarray, np.ndarray]) -> None:
    gallery, vectors, _ = indexed
    with gallery.database.session() as connection:
        (node,) = connection.execute(
            "EXPLAIN (FORMAT JSON) SELECT id FROM image WHERE gallery = 1 "
            f"ORDER BY current::halfvec({DIM}) <#> '{vectors[0].tolist()}'::halfvec({DIM}) LIMIT 5"
        ).fetchone() or ({},)
    assert "image_1_current" in json.dumps(node)
    query = np.eye(DIM, dtype=np.float32)[0]
    table = pa.table(
        {
            "id": ["exactly"],
            "camid": ["3"],
            "vector": vector_column(query[None]),
            "vector_base": vector_column(query[None]),
        }
    )
    gallery.upsert(table, space_id=SPACE)
    assert "exactly" in gallery.nearest(query, base=False, count=1, where=Where())["id"].to_pylist()
    gallery.delete(["exactly"])
    assert "exactly" not in gallery.nearest(query, base=False, count=1, where=Where())["id"].to_pylist()


def test_the_description_counts_cameras_and_months(gallery: Gallery) -> None:
    may, june = datetime(2024, 5, 31, 23, tzinfo=UTC), datetime(2024, 6, 1, tzinfo=UTC)
    table = rows(["a", "b", "c"]).append_column("time", [[may, june, None]])
    gallery.upsert(table, space_id=SPACE)
    facts = gallery.describe()
    assert (facts.rows, facts.cameras, facts.oldest) == (3, {"1": 1, "2": 1, "3": 1}, may)
    assert facts.months == {"2024-05": 1, "2024-06": 1, None: 1} and facts.bytes > 0
    assert facts.in_use and not facts.indexed and gallery.cameras() == ["1", "2", "3"]


# Databases that cannot be used


def test_a_missing_or_unsuitable_database_is_described(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"gallery.url: expected a gallery, got .*, which has none. Create one with"):
        Gallery.open(database)
    with pytest.raises(ValueError, match=r"gallery.url: expected a PostgreSQL database at localhost/none, got: .*"):
        Gallery.open("postgresql://user@localhost:1/none")
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"expected PostgreSQL 99 or later at .*, got 18"),
    ):
        patch.setattr(database_module, "MIN_SERVER", 99)
        Database.open(database)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"expected pgvector 99.0 or later at"):
        patch.setattr(database_module, "MIN_PGVECTOR", (99, 0))
        Database.open(database)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE ROLE visitor LOGIN")
        connection.execute("INSERT INTO schema_version VALUES (99)")
    with pytest.raises(ValueError, match=r"expected tables of version \d+ or earlier at .*, got version 99. Update"):
        Database.open(database)


def test_a_role_without_permissions_is_told_so(new_database: Any) -> None:
    url = new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE ROLE stranger LOGIN")
        connection.execute("CREATE EXTENSION vector")
        connection.execute("REVOKE CREATE ON SCHEMA public FROM public")
    with pytest.raises(
        ValueError, match=r"gallery.url: expected permission to create tables in .*, got: permission denied"
    ):
        Database.open(url.replace("postgres:@", "stranger@"))


def test_the_documented_role_of_a_service_can_serve_but_not_drop_rewrite_the_audit_trail_or_make_keys(
    gallery: Gallery, database: str
) -> None:
    gallery.upsert(rows(["a"]), space_id=SPACE)
    (grants,) = re.findall(r"```sql\n(.*?)```", (REPOSITORY / "docs" / "operations.md").read_text(), re.DOTALL)
    role = f"service_{uuid.uuid4().hex}"
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("REVOKE CREATE ON SCHEMA public FROM public")
        connection.execute(grants.replace("tvilfm_service", role).encode())
    serving = Gallery.open(database.replace("postgres:@", f"{role}@"))
    version = serving.upsert(rows(["a", "b"], pid=1), space_id=SPACE, by="ingest").version
    serving.note([NewEntry("search", {"modalities": ["text"]}, "desk", version, ["a"])])
    assert serving.delete_person("1").count == 2 and serving.changes(None).rows.num_rows == 0
    serving.expire(rows_days=1, audit_days=None)
    token = add_key(KeyTable(gallery.database), "desk", ["read"], per_minute=1)
    checker = KeyChecker(KeyTable(serving.database), serving.database)
    key = checker.find(token)
    assert key is not None and checker.wait_s(key) == 0
    checker.sync()
    with pytest.raises(PermissionError, match=r"expected the permission for this in .*: permission denied for table"):
        add_key(KeyTable(serving.database), "mine", ["admin"])
    for command in (
        "DROP TABLE image",
        "UPDATE audit SET key = 'me'",
        "DELETE FROM audit",
        "INSERT INTO audit (time, action) VALUES ('2020-01-01', 'search')",
        "INSERT INTO audit (role, action) VALUES ('postgres', 'search')",
        "UPDATE api_key SET scopes = '{admin}'",
        "DELETE FROM api_key",
        "DELETE FROM gallery",
    ):
        with serving.database.session() as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(command.encode())


def test_the_documented_update_after_a_restored_dump_ends_reading_all_rows_again(
    gallery: Gallery, database: str
) -> None:
    gallery.upsert(rows(["a", "b"]), space_id=SPACE)
    with psycopg.connect(database) as connection:  # a dump brings transactions of a server that counted further
        connection.execute("ALTER TABLE image DISABLE TRIGGER USER")
        connection.execute("UPDATE image SET written = '999999999999'")
        connection.execute("ALTER TABLE image ENABLE TRIGGER USER")
    assert gallery.changes(gallery.snapshot()).rows.num_rows == 2
    (update,) = re.findall(r"`(UPDATE image .*)`", (REPOSITORY / "docs" / "operations.md").read_text())
    with psycopg.connect(database) as connection:
        connection.execute(update.encode())
    assert gallery.changes(gallery.snapshot()).rows.num_rows == 0 and set(content(gallery)) == {"a", "b"}


def test_a_database_that_is_gone_is_tried_twice(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = 0

    def lose(connection: object) -> None:
        nonlocal attempts
        attempts += 1
        raise psycopg.OperationalError("the connection was lost\nDETAIL: more")

    with pytest.raises(Unavailable, match="expected an answer from the database, got: the connection was lost"):
        gallery.database.run(lose)
    assert attempts == 2


@pytest.mark.parametrize("url", ["postgresql://me:secret@host/db", "postgresql://host/db?password=secret"])
def test_a_password_in_the_description_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"gallery.url: expected no password"):
        load_config(None, [f"gallery.url={json.dumps(url)}"])
    with pytest.raises(ValueError, match=r"gallery.read_url: expected no password"):
        load_config(None, [f"gallery.read_url={json.dumps(url)}", "gallery.url=postgresql://host/db"])
    with pytest.raises(ValueError, match=r"gallery.read_url: expected postgresql://... beside url"):
        load_config(None, ["gallery.read_url=postgresql://host/db"])
    with pytest.raises(ValueError, match=r"gallery.url: expected postgresql://... or a folder, got s3://..."):
        load_config(None, ["gallery.url=s3://bucket/gallery"])
