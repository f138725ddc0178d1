"""The test of a place before a long job: it leaves no files, and its errors say how to fix the place."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from pyarrow import fs

from cluster.cli.app import main
from cluster.places import check as storage
from cluster.places.check import check_storage
from tvilfm.place import Place


@pytest.fixture(scope="module")
def endpoint(s3_endpoint: str) -> str:
    """Of an S3 server, with a bucket of this file's own."""
    store(s3_endpoint).create_dir("places")
    return s3_endpoint


def store(endpoint: str) -> fs.S3FileSystem:
    return fs.S3FileSystem(
        access_key="key", secret_key="secret", endpoint_override=endpoint, scheme="http", allow_bucket_creation=True
    )


def uri(bucket: str, endpoint: str) -> str:
    return f"s3://key:secret@{bucket}?endpoint_override={endpoint}&scheme=http"


def test_a_place_that_works_is_left_as_it_was(endpoint: str, tmp_path: Path) -> None:
    check_storage(str(tmp_path / "new" / "folder"))
    check_storage(f"file://{tmp_path}")
    check_storage(uri("places/runs", endpoint))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    # pyarrow leaves a mark of the folder, so that it does not vanish with its last file.
    left = store(endpoint).get_file_info(fs.FileSelector("places", recursive=True))
    assert [info.path for info in left if info.type == fs.FileType.File] == []


def test_a_place_that_does_not_is_told_with_its_fix_and_without_its_keys(endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/below: expected a place to write, .* choose another folder\."):
        check_storage(str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match=r"^s3://missing/x: .* Create the bucket, or fix its name\.$") as caught:
        check_storage(uri("missing/x", endpoint))
    assert "key:" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_store_that_does_not_answer_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ANSWER_S", 1.0)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"^gs://bucket/x: expected a place to write, got no answer within 1 s\."):
        check_storage("gs://anonymous@bucket/x?endpoint_override=127.0.0.1:9&scheme=http")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("step", ["read", "delete"])
def test_the_step_that_fails_is_named(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lossy(fs.LocalFileSystem):  # type: ignore[misc]
        def open_input_stream(self, path: str) -> object:
            if step == "read":
                raise OSError("No such file")
            return super().open_input_stream(path)

        def delete_file(self, path: str) -> None:
            raise OSError("ACCESS_DENIED")

    monkeypatch.setattr(Place, "filesystem", property(lambda self: Lossy()))
    with pytest.raises(ValueError, match=f"expected a place to {step}, got .*"):
        check_storage(str(tmp_path))


@pytest.mark.parametrize("arguments", [("caption",), ("rephrase",)])
def test_a_job_that_writes_somewhere_tests_it_first(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(
        sys, "argv", ["tvilfm", *arguments, "--out", str(tmp_path / "file" / "x"), f"run.dir={tmp_path}"]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "expected a place to write" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_run_tests_the_clusters_storage_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(
        sys, "argv", ["tvilfm", "run", f"cluster.storage={tmp_path / 'file' / 'x'}", f"run.dir={tmp_path}"]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "expected a place to write" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
