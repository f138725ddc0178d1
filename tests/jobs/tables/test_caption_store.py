"""The captioning job on an object store: images read from it, parts and tables written to it."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import DomainDispatcherApplication
from PIL import Image
from pyarrow import fs

from cluster.tables.captioning import caption_images
from cluster.tables.images import list_images
from cluster.tables.parts import Parts, alone, part_name
from tvilfm.captioning.captioner import Captioner
from tvilfm.captioning.conv_captioner import build_conv_captioner
from tvilfm.config import CaptionerSection, CaptionSection, ClusterSection
from tvilfm.data.pixels import decode
from tvilfm.place import Place

HEIGHT, WIDTH = 32, 16


@pytest.fixture(scope="module")
def store(s3_endpoint: str) -> SimpleNamespace:
    """A bucket of an S3 server; workers get its address and keys from the URI."""
    filesystem = fs.S3FileSystem(
        access_key="key", secret_key="secret", endpoint_override=s3_endpoint, scheme="http", allow_bucket_creation=True
    )
    filesystem.create_dir("bucket")

    def uri(folder: str) -> str:
        return f"s3://key:secret@bucket/{folder}?endpoint_override={s3_endpoint}&scheme=http"

    return SimpleNamespace(filesystem=filesystem, uri=uri)


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.slow
def test_a_job_reads_from_and_writes_to_a_store(store: SimpleNamespace, ray_session: None, tmp_path: Path) -> None:
    build_conv_captioner(tmp_path, ["a man in a coat", "a woman with a bag"], height=HEIGHT, width=WIDTH, seed=0)
    captioner = CaptionerSection(model=str(tmp_path), max_new_tokens=4)
    names = [f"day {day}/{i}.png" for day in (1, 2) for i in range(5)]
    for seed, name in enumerate(names):
        with store.filesystem.open_output_stream(f"bucket/images/{name}") as stream:
            stream.write(picture(seed))
    with store.filesystem.open_output_stream("bucket/images/day 2/torn.png") as stream:
        stream.write(picture(0)[:100])

    rows = list_images(store.uri("images"), "visible")
    assert rows["image"].to_pylist() == [*names, "day 2/torn.png"]
    section = CaptionSection(visible=captioner, batch=4)
    summary = caption_images(rows, store.uri("images"), store.uri("out"), section, ClusterSection(), seed=0)
    assert (summary.captioned, summary.bad, summary.unread) == (10, 1, 0)
    assert summary.table == "s3://bucket/out/captions.parquet"

    plain = Captioner.load(captioner)
    pixels = [decode(picture(seed), height=HEIGHT, width=WIDTH, name="") for seed in range(10)]
    expected = [text for start in (0, 4, 8) for text in plain.caption(pixels[start : start + 4])]
    table = pq.read_table("bucket/out/captions.parquet", filesystem=store.filesystem).sort_by("image")
    assert table["image"].to_pylist() == names
    assert table["caption"].to_pylist() == expected
    quarantine = pq.read_table("bucket/out/quarantine.parquet", filesystem=store.filesystem)
    assert quarantine["image"].to_pylist() == ["day 2/torn.png"]

    again = caption_images(rows, store.uri("images"), store.uri("out"), section, ClusterSection(), seed=0)
    assert (again.before, again.captioned, again.bad) == (10, 0, 1)


@pytest.mark.slow
def test_a_job_asks_the_store_once_per_chunk_and_the_next_one_writes_no_part(
    store: SimpleNamespace, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, batch, chunks = 64, 4, 4
    monkeypatch.setattr("cluster.tables.captioning.CHUNKS_PER_WORKER", chunks)
    build_conv_captioner(tmp_path / "model", ["a man in a coat"], height=HEIGHT, width=WIDTH, seed=0)
    (tmp_path / "images").mkdir()
    for seed in range(images):
        (tmp_path / "images" / f"{seed:02d}.png").write_bytes(picture(seed))
    section = CaptionSection(visible=CaptionerSection(model=str(tmp_path / "model"), max_new_tokens=2), batch=batch)
    rows, requests = list_images(str(tmp_path / "images"), "visible"), Counter[str]()
    answer = DomainDispatcherApplication.__call__

    def counted(self: DomainDispatcherApplication, environ: dict[str, Any], respond: Any) -> Any:
        if "/counted/parts/captions/" in environ["PATH_INFO"]:
            requests[environ["REQUEST_METHOD"]] += 1
        return answer(self, environ, respond)

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", counted)
    root, out = str(tmp_path / "images"), store.uri("counted")
    assert caption_images(rows, root, out, section, ClusterSection(), seed=0).captioned == images
    assert requests["PUT"] == chunks < images // batch and requests["POST"] == 0
    assert requests["HEAD"] <= 4 * chunks  # one before the chunk, the others when the parts are read at the end

    parts = Parts(out, "parts", "captions")
    parts.write("merged-by-an-older-version", parts.read())
    (tmp_path / "images" / "new.png").write_bytes(picture(images))
    requests.clear()
    rows = list_images(root, "visible")
    again = caption_images(rows, root, out, section, ClusterSection(), seed=0)
    assert (again.before, again.captioned) == (images, 1)
    assert (requests["PUT"], requests["DELETE"]) == (1, 0)


def test_two_jobs_on_one_folder_of_a_store_do_each_other_no_harm(store: SimpleNamespace) -> None:
    parts, other = Parts(store.uri("shared")), Parts(store.uri("shared"))
    with alone(store.uri("shared")), alone(store.uri("shared")):
        for first in range(0, 12, 3):
            images = [f"{place:02d}" for place in range(first, first + 4)]
            for job in (parts, other):
                job.write(part_name([str(job is parts), *images]), pa.table({"image": images, "caption": images}))
        parts.compact()
        other.write(part_name(["late"]), pa.table({"image": ["late"], "caption": ["late"]}))
        other.compact()
    expected = [f"{place:02d}" for place in range(13)] + ["late"]
    assert parts.read()["image"].to_pylist() == other.read()["image"].to_pylist() == expected
    assert parts.has(part_name(["late"]))


def test_keys_of_a_store_are_not_shown() -> None:
    assert str(Place("s3://key:secret@bucket/out?scheme=http&endpoint_override=host:1")) == "s3://bucket/out"
    assert str(Place("runs/captions")) == "runs/captions"


@pytest.mark.parametrize("uri", ["s3://AKIA:sec/ret@bucket/x", "nowhere://key:secret@bucket/x"])
def test_keys_of_a_store_are_not_in_an_error(uri: str) -> None:
    with pytest.raises(ValueError, match="expected a local path or a URI") as caught:
        assert Place(uri).path
    assert "bucket" in str(caught.value)
    assert not any(secret in str(caught.value) for secret in ("AKIA", "sec/ret", "key:", "secret"))
