"""The gallery's record: what is written stays, what is deleted goes, and who may write."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
from lance.file import LanceFileSession

from tvilfm.retrieval import gallery as gallery_module
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.rows import vector_column, vectors_of

SPACE, OTHER, DIM = "feed-96x48", "beef-96x48", 8


def rows(ids: list[str], *, seed: int = 0, pid: int | None = None) -> pa.Table:
    """Random rows; every thumbnail says whose it is."""
    rng = np.random.default_rng(seed)
    vectors = {}
    for name in ("vector", "vector_base"):
        values = rng.standard_normal((len(ids), DIM)).astype(np.float32)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        vectors[name] = vector_column(values)
    return pa.table(
        {
            "id": ids,
            **vectors,
            "pid": pa.array([pid] * len(ids), pa.int64()),
            "camid": np.arange(len(ids)) % 6 + 1,
            "thumbnail": [f"the face of {id} ".encode() * 5 for id in ids],
        }
    )


def content(gallery: Gallery) -> dict[str, list[float]]:
    """id -> vector."""
    table = gallery.load(None, ["id", "vector"])
    ids = table["id"].to_pylist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, vectors_of(table["vector"]).tolist(), strict=True))


def expected(table: pa.Table) -> dict[str, list[float]]:
    return dict(zip(table["id"].to_pylist(), vectors_of(table["vector"]).tolist(), strict=True))


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "gallery")


@pytest.fixture
def gallery(uri: str) -> Gallery:
    gallery = Gallery.prepare(uri, space_id=SPACE, dim=DIM)
    gallery.publish()
    return gallery


def test_an_upsert_inserts_and_replaces_and_the_last_one_counts(gallery: Gallery, uri: str) -> None:
    first, second = rows(["b", "a", "c"], seed=1), rows(["a", "d"], seed=2)
    assert gallery.upsert(first, space_id=SPACE) < gallery.upsert(second, space_id=SPACE)
    reader = Gallery.open(uri)
    assert (len(reader), reader.dim, reader.space_id) == (4, DIM, SPACE)
    assert content(reader) == expected(first) | expected(second)
    order = reader.load(None, ["id", "position"]).sort_by("position")
    assert order["id"].to_pylist() == ["b", "c", "a", "d"]
    assert reader.picture("d") == (None, b"the face of d " * 5) and reader.picture("nobody") is None


def test_what_is_left_out_is_null_and_times_and_references_come_back(gallery: Gallery) -> None:
    seen = datetime(2024, 5, 1, 12, tzinfo=UTC)
    table = rows(["a", "b"]).drop_columns(["thumbnail", "pid"])
    table = table.append_column("time", [[seen, None]]).append_column("image", [["s3://photos/a.jpg", None]])
    gallery.upsert(table, space_id=SPACE)
    found = gallery.load(None, ["id", "time", "image", "thumbnail", "pid"]).to_pylist()
    assert found[0] == {"id": "a", "time": seen, "image": "s3://photos/a.jpg", "thumbnail": None, "pid": None}
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
        (lambda table: table.set_column(1, "vector", [[[1.0] * 4] * 2]), "rows: expected the columns of row_schema"),
        (
            lambda table: table.set_column(1, "vector", vector_column(np.ones((2, 1), np.float32))),
            "rows: expected the columns of row",
        ),
        (lambda table: table.set_column(1, "vector", [[[1.0] * DIM] * 2]), "rows.vector: expected unit vectors, got"),
        (
            lambda table: table.set_column(2, "vector_base", [[[float("nan")] * DIM] * 2]),
            "rows.vector_base: expected unit vectors, got one of length nan",
        ),
    ],
)
def test_rows_that_cannot_be_are_refused_and_leave_nothing(gallery: Gallery, change: object, message: str) -> None:
    version = gallery.version
    with pytest.raises(ValueError, match=message):
        gallery.upsert(change(rows(["a", "b"])), space_id=SPACE)  # type: ignore[operator]
    assert (len(gallery), gallery.version) == (0, version)


def test_vectors_of_another_space_are_refused_by_name(gallery: Gallery) -> None:
    with pytest.raises(ValueError, match=rf"space_id: expected vectors of {SPACE}, got {OTHER}"):
        gallery.upsert(rows(["a"]), space_id=OTHER)
    assert len(gallery) == 0


def test_deletes_count_what_was_there(gallery: Gallery, uri: str) -> None:
    gallery.upsert(rows(["a", "b"], pid=1), space_id=SPACE)
    gallery.upsert(rows(["c", "it's; DROP"], pid=2, seed=1), space_id=SPACE)
    version = gallery.version
    assert gallery.delete(["nobody"]) == 0 and gallery.version == version
    assert gallery.delete(["c", "a", "c", "nobody"]) == 2
    assert set(content(Gallery.open(uri))) == {"b", "it's; DROP"}
    assert (gallery.delete_person(2), gallery.delete_person(2), gallery.delete_person(1)) == (1, 0, 1)
    assert len(Gallery.open(uri)) == 0


def test_one_can_look_at_an_old_version_and_go_back_to_it(gallery: Gallery, uri: str) -> None:
    old = gallery.upsert(rows(["a", "b"]), space_id=SPACE)
    gallery.upsert(rows(["a"], seed=1), space_id=SPACE)
    gallery.delete(["b"])
    assert content(gallery.at(old)) == expected(rows(["a", "b"]))
    numbers = [version.number for version in gallery.versions()]
    assert numbers == sorted(numbers) and old in numbers and numbers[-1] == gallery.version
    assert gallery.restore(old) > numbers[-1]
    assert content(Gallery.open(uri)) == expected(rows(["a", "b"]))
    gallery.upsert(rows(["z"], seed=2), space_id=SPACE)
    positions = gallery.load(None, ["position"])["position"].to_pylist()
    assert len(set(positions)) == 3
    with pytest.raises(ValueError, match=r"version: expected one of .* got 99"):
        gallery.at(99)


def test_a_table_has_one_writer_and_readers_do_not_write(gallery: Gallery, uri: str) -> None:
    with pytest.raises(ValueError, match=r"expected one writer of .*, got a second one"):
        Gallery.open(uri, write=True)
    with pytest.raises(ValueError, match="gallery: expected one opened for writing"):
        Gallery.open(uri).delete(["a"])
    gallery.close()
    with pytest.raises(ValueError, match="gallery: expected one opened for writing"):
        gallery.upsert(rows(["a"]), space_id=SPACE)
    Gallery.open(uri, write=True).upsert(rows(["a"]), space_id=SPACE)


def test_the_table_of_a_new_model_is_filled_aside_and_taken_up_at_once(gallery: Gallery, uri: str) -> None:
    gallery.upsert(rows(["a", "b"]), space_id=SPACE)
    reader = Gallery.open(uri)
    assert not reader.refresh()
    new = Gallery.prepare(uri, space_id=OTHER, dim=DIM)
    new.upsert(rows(["a"], seed=3), space_id=OTHER)
    assert not reader.refresh() and reader.space_id == SPACE
    new.publish()
    assert reader.refresh() and reader.space_id == OTHER
    assert content(reader) == expected(rows(["a"], seed=3))
    gallery.publish()
    assert reader.refresh() and len(reader) == 2
    with pytest.raises(ValueError, match=r"gallery.uri: expected vectors of dimension 9 in .*, got 8"):
        new.close()
        Gallery.prepare(uri, space_id=OTHER, dim=9)


def test_no_gallery_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gallery.uri: expected a gallery, got .*nowhere, which has none"):
        Gallery.open(str(tmp_path / "nowhere"))


def test_after_compact_the_deleted_are_on_no_disk(gallery: Gallery, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def holders(needle: bytes) -> list[str]:
        return [str(path) for path in Path(uri).rglob("*") if path.is_file() and needle in path.read_bytes()]

    def codes() -> int:
        statistics = gallery.dataset.stats.index_stats("vector_idx")
        return sum(part["size"] for index in statistics["indices"] for part in index["partitions"])

    other = Gallery.prepare(uri, space_id=OTHER, dim=DIM)
    other.upsert(rows(["erased-1"], pid=7), space_id=OTHER)
    gallery.upsert(rows([f"kept-{n}" for n in range(300)], pid=1), space_id=SPACE)
    gallery.upsert(rows(["erased-1", "erased-2"], pid=7, seed=1), space_id=SPACE)
    gallery.dataset.create_index("vector", "IVF_PQ", metric="cosine", num_partitions=2, num_sub_vectors=4)
    gallery.reload()
    gallery.upsert(rows(["erased-1"], pid=7, seed=2), space_id=SPACE)
    gallery.upsert(rows(["late"], pid=1, seed=3), space_id=SPACE)
    gallery.delete_person(7)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(lance.LanceDataset, "commit", killed)
        gallery.upsert(rows(["erased-3"]), space_id=SPACE)
    assert (
        len(holders(b"the face of erased-3")) == 1
        and len(holders(b"erased-1")) > 2
        and len(holders(b"the face of erased-2")) == 1
        and codes() == 302
    )

    with pytest.raises(ValueError, match="got a second one"):  # somebody writes to the other table
        gallery.compact()
    other.close()
    before = content(gallery)
    gallery.compact()
    assert holders(b"erased") == []
    assert codes() == 301 and len(gallery.versions()) == 1
    assert len(holders(b"the face of kept-7")) == 1
    assert content(gallery) == content(Gallery.open(uri)) == before and len(before) == 301
    for left, row in ((300, "kept-299"), (299, "kept-298")):  # one row of a large piece
        gallery.delete([row])
        gallery.compact()
        assert holders(row.encode()) == [] and codes() == left
    gallery.compact()  # nothing to do
    gallery.upsert(rows(["new"], seed=4), space_id=SPACE)
    assert len(Gallery.open(uri)) == 300


def test_an_old_models_writer_leaves_the_gallery_in_use_alone(
    gallery: Gallery, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.upsert(rows(["old"]), space_id=SPACE)
    new = Gallery.prepare(uri, space_id=OTHER, dim=DIM)
    new.upsert(rows(["new"]), space_id=OTHER)
    lock = gallery_module._lock

    def locked_late(uri: str, space_id: str) -> object:
        new.publish()  # between the first look and the lock
        new.close()
        return lock(uri, space_id)

    with monkeypatch.context() as patch:
        patch.setattr(gallery_module, "_lock", locked_late)
        with pytest.raises(ValueError, match=f"got that of {SPACE} while {OTHER} is in use. Serve the run"):
            gallery.compact()
    with pytest.raises(ValueError, match="expected the table in use to compact"):
        gallery.compact()
    gallery.clean()  # its own files are its own
    assert set(content(gallery)) == {"old"} and set(content(Gallery.open(uri))) == {"new"}
    gallery.close()
    Gallery.open(uri, write=True).compact()
    assert Gallery.open(uri)._spaces() == {OTHER}


def test_rows_without_a_time_are_given_one_once_and_keep_all_else(
    gallery: Gallery, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery_module, "DATED_ROWS", 2)
    seen, now = datetime(2024, 5, 1, 12, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)
    table = rows([f"r{n}" for n in range(5)]).append_column("time", [[None, seen, None, None, None]])
    gallery.upsert(table, space_id=SPACE)
    reader, columns = Gallery.open(uri), [field.name for field in gallery.dataset.schema if field.name != "time"]
    before, stamps = reader.load(None, columns).sort_by("position"), reader.stamps()
    assert (gallery.date_undated(now), gallery.date_undated(seen)) == (4, 0)
    assert reader.refresh() and reader.load(None, columns).sort_by("position") == before
    times = reader.load(None, ["time", "position"]).sort_by("position")["time"].to_pylist()
    assert times == [now, seen, now, now, now]
    assert len(set(reader.stamps().tolist()) - set(stamps.tolist())) == 4  # a searcher loads them again
    assert gallery.delete_before(now) == 1 and len(gallery) == 4


def test_small_writes_are_merged_now_and_then(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery_module, "SMALL_FRAGMENTS", 4)
    written = {}
    for n in range(11):
        one = rows([f"r{n % 9}"], seed=n)
        gallery.upsert(one, space_id=SPACE)
        written |= expected(one)
    assert content(gallery) == written
    assert len(gallery.dataset.get_fragments()) < 4


def test_data_is_on_disk_before_the_commit_that_names_it(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    flush, commit = gallery_module._fsync, lance.LanceDataset.commit

    def flushed(path: str | Path) -> None:
        flush(path)
        events.append(str(path))

    def committed(*arguments: object) -> object:
        events.append("commit")
        return commit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gallery_module, "_fsync", flushed)
    monkeypatch.setattr(gallery_module.lance.LanceDataset, "commit", committed)
    gallery.upsert(rows(["a", "b"]), space_id=SPACE)
    gallery.upsert(rows(["b"], seed=1), space_id=SPACE)
    first, second = [number for number, event in enumerate(events) if event == "commit"]
    assert [event.endswith(".lance") for event in events[:first]].count(True) == 1
    assert any("_deletions/" in event for event in events[first:second])  # of the row that was replaced
    assert any(event.endswith(".manifest") for event in events[first:second])
    assert any(event.endswith(".manifest") for event in events[second:])
    assert not any(event.endswith((".lance", ".arrow")) for event in events[second:])


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of an S3 server of this machine."""
    boto3 = pytest.importorskip("boto3")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT": f"http://{s3_endpoint}",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=f"http://{s3_endpoint}", region_name="us-east-1").create_bucket(Bucket="people")
    return "s3://people/gallery"


def test_an_object_store_holds_a_gallery_and_two_writers_do_not_double_a_row(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a gallery, got s3://people/gallery"):
        Gallery.open(bucket)
    gallery = Gallery.prepare(bucket, space_id=SPACE, dim=DIM)
    gallery.publish()
    old = gallery.upsert(rows(["a", "b"], pid=3), space_id=SPACE)
    reader = Gallery.open(bucket)
    second = Gallery.open(bucket, write=True)

    def write(writer: Gallery, seed: int) -> int:
        start.wait(10)
        try:
            return writer.upsert(rows(["c", f"d{seed}"], seed=seed), space_id=SPACE)
        except OSError:  # the other one was first
            return 0

    start = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        assert any(pool.map(write, (gallery, second), (1, 2)))
    assert reader.refresh() and {"a", "b", "c"} < set(content(reader))  # and none twice
    second.upsert(rows(["c"], seed=1), space_id=SPACE)
    gallery.delete(["d1", "d2"])
    assert gallery.delete_person(3) == 2
    assert reader.refresh() and content(reader) == expected(rows(["c"], seed=1))
    assert reader.picture("c") == (None, b"the face of c " * 5)
    gallery.restore(old)
    other = Gallery.prepare(bucket, space_id=OTHER, dim=DIM)
    other.upsert(rows(["x"]), space_id=OTHER)
    other.publish()
    assert reader.refresh() and set(content(reader)) == {"x"}
    with pytest.raises(ValueError, match=rf"got s3://people/gallery/{SPACE}.lance. Remove it"):
        other.compact()  # no lock says whether somebody fills it
    assert other._spaces() == {SPACE, OTHER}
    lance.LanceDataset.drop(gallery.table_uri)
    store, written = LanceFileSession(other.table_uri), tmp_path / "part"
    written.write_bytes(b"what another process is about to commit")
    store.upload_file(str(written), "data/part.lance")
    other.compact()
    assert store.contains("data/part.lance")
    assert content(reader) == expected(rows(["x"])) and len(other.versions()) == 1


def test_the_record_needs_neither_torch_nor_ray() -> None:
    code = "import sys\nsys.modules['torch'] = sys.modules['ray'] = None\nimport tvilfm.retrieval.gallery"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
