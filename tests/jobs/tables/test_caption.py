"""The captioning job: the plain loop's sentences, bad images set aside, and nothing captioned twice."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from cluster.cli.app import main
from cluster.tables.caption_worker import (
    PART_SCHEMA,
    QUARANTINE_SCHEMA,
    CaptionActor,
    CaptionJob,
    decode_images,
)
from cluster.tables.captioning import Summary, caption_images
from cluster.tables.images import list_images
from cluster.tables.parts import Parts, alone
from tvilfm.captioning.captioner import Captioner
from tvilfm.captioning.colors import find_colors, remove_colors
from tvilfm.captioning.conv_captioner import build_conv_captioner
from tvilfm.config import CaptionerSection, CaptionSection, ClusterSection
from tvilfm.data.pixels import decode_files
from tvilfm.datasets.caption_files import read_captions
from tvilfm.place import Place

HEIGHT, WIDTH, BATCH = 48, 24, 8
VISIBLE, INFRARED = 30, 12
TEXTS = [f"a {who} in a {colour} coat" for who in ("man", "woman") for colour in ("red", "dark blue", "green", "gray")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A captioner whose sentences differ from picture to picture, good images and bad ones."""
    folder = tmp_path_factory.mktemp("caption")
    build_conv_captioner(folder / "captioner", TEXTS, height=HEIGHT, width=WIDTH, seed=0)
    captioner = CaptionerSection(model=str(folder / "captioner"), max_new_tokens=8)
    loaded = Captioner.load(captioner)
    with torch.no_grad():  # fresh weights are so small that every picture gets the same sentence
        for name, parameter in loaded.model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3 if name.startswith("encoder") else 30 if "cross" in name else 10)
    loaded.save(folder / "captioner")
    root, rng = folder / "images", np.random.default_rng(0)
    names = [f"cam1/{i:02d}.png" for i in range(VISIBLE)] + [f"cam3/{i:02d}.png" for i in range(INFRARED)]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        patches = Image.fromarray(rng.integers(0, 256, (3, 2, 3), dtype=np.uint8))
        patches.resize(tuple(rng.integers(30, 90, 2).tolist()), Image.Resampling.NEAREST).save(root / name)
    whole = (root / names[0]).read_bytes()
    bad = {
        "cam1/bad_truncated.png": whole[: len(whole) // 2],
        "cam1/bad_empty.png": b"",
        "cam1/bad_page.jpg": b"<html>404</html>",
    }
    for name, content in bad.items():
        (root / name).write_bytes(content)
    Image.new("RGB", (1, 1)).save(root / "cam1/bad_dot.png")
    Image.new("1", (10_000, 10_000)).save(root / "cam1/bad_bomb.png")
    bad_names = [*bad, "cam1/bad_dot.png", "cam1/bad_bomb.png", "cam1/bad_missing.png"]
    # Bad images stand among the good ones, and one chunk has nothing else.
    visible = [*names[:4], *bad_names[:2], *names[4 : VISIBLE - 2], *bad_names[2:], *names[VISIBLE - 2 : VISIBLE]]
    images = [*visible, *names[VISIBLE:]]
    rows = pa.table({"image": images, "modality": ["visible"] * len(visible) + ["infrared"] * INFRARED})
    return SimpleNamespace(root=root, rows=rows, captioner=captioner, names=names, bad=bad_names)


def plain_loop(lab: SimpleNamespace) -> dict[str, str]:
    """The same chunks without Ray."""
    captioner = Captioner.load(lab.captioner)
    found: dict[str, str] = {}
    for modality in ("visible", "infrared"):
        images = [row["image"] for row in lab.rows.to_pylist() if row["modality"] == modality]
        for start in range(0, len(images), BATCH):
            good = [name for name in images[start : start + BATCH] if name not in lab.bad]
            pictures = decode_files(lab.root, good, height=HEIGHT, width=WIDTH) if good else []
            sentences = captioner.caption(list(pictures)) if good else []
            found |= zip(good, sentences, strict=True)
    return {name: remove_colors(text) if name.startswith("cam3") else text for name, text in found.items()}


def caption(
    lab: SimpleNamespace,
    out: Path,
    *,
    rows: pa.Table | None = None,
    root: Path | None = None,
    captioner: CaptionerSection | None = None,
    workers: int = 1,
    retry_bad: bool = False,
) -> Summary:
    captioner = captioner or lab.captioner
    section = CaptionSection(visible=captioner, infrared=captioner, batch=BATCH, workers=workers)
    rows = lab.rows if rows is None else rows
    return caption_images(rows, str(root or lab.root), str(out), section, ClusterSection(), seed=0, retry_bad=retry_bad)


@pytest.fixture(scope="module")
def done(lab: SimpleNamespace, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("done") / "out"
    return SimpleNamespace(out=out, summary=caption(lab, out))


@pytest.mark.slow
def test_captions_equal_the_plain_loop_row_for_row(lab: SimpleNamespace, done: SimpleNamespace, tmp_path: Path) -> None:
    expected = plain_loop(lab)
    assert len(set(expected.values())) > 4
    table = pq.read_table(done.out / "captions.parquet").sort_by("image")
    assert dict(zip(table["image"].to_pylist(), table["caption"].to_pylist(), strict=True)) == expected
    assert table["image"].to_pylist() == sorted(lab.names)

    visible = lab.rows.slice(0, len(lab.rows) - INFRARED)
    assert caption(lab, tmp_path / "two", rows=visible, workers=2).captioned == VISIBLE
    two = pq.read_table(tmp_path / "two" / "captions.parquet").sort_by("image")
    assert two.select(["image", "caption"]).equals(table.slice(0, VISIBLE).select(["image", "caption"]))


@pytest.mark.slow
def test_infrared_sentences_have_lost_their_colours(lab: SimpleNamespace, done: SimpleNamespace) -> None:
    rows = pq.read_table(done.out / "captions.parquet").sort_by("image").to_pylist()
    colours = {
        modality: [find_colors(row["caption"]) for row in rows if row["modality"] == modality]
        for modality in ("visible", "infrared")
    }
    assert any(colours["visible"])
    assert not any(colours["infrared"])


@pytest.mark.slow
def test_the_table_is_a_caption_table_with_provenance(lab: SimpleNamespace, done: SimpleNamespace) -> None:
    good = pa.table({"image": lab.names})
    assert read_captions(good, lab.root, done.out / "captions.parquet")["image"].to_pylist() == lab.names
    table = pq.read_table(done.out / "captions.parquet").sort_by("image")
    assert table.schema.equals(PART_SCHEMA)
    provenance = Captioner.load(lab.captioner).provenance
    row = table.to_pylist()[0]
    assert {key: row[key] for key in ("captioner", "revision", "prompt_hash", "settings", "rephrased", "modality")} == {
        "captioner": str(lab.captioner.model),
        "revision": provenance["revision"],
        "prompt_hash": provenance["prompt_hash"],
        "settings": provenance["settings"],
        "rephrased": None,
        "modality": "visible",
    }
    assert row["time"] is not None


@pytest.mark.slow
def test_bad_images_are_set_aside_with_their_reasons(lab: SimpleNamespace, done: SimpleNamespace) -> None:
    table = pq.read_table(done.out / "quarantine.parquet")
    assert table.schema.equals(QUARANTINE_SCHEMA)
    reasons = {row["image"]: row["reason"] for row in table.to_pylist()}
    assert sorted(reasons) == sorted(lab.bad)
    for name, reason in (
        ("truncated", "truncated"),
        ("empty", "got zero bytes"),
        ("dot", "expected at least 8 pixels per side, got 1 x 1"),
        ("bomb", "expected at most 64000000 pixels, got 10000 x 10000"),
        ("missing", "expected a file, got none"),
    ):
        (image,) = [image for image in lab.bad if f"bad_{name}" in image]
        assert reason in reasons[image]
    assert reasons["cam1/bad_page.jpg"].startswith("expected an image, got a file that begins with b'<html>40")
    summary = done.summary
    assert (summary.total, summary.before, summary.captioned) == (len(lab.rows), 0, len(lab.names))
    assert (summary.bad, summary.unread) == (len(lab.bad), 0)
    assert sum(summary.reasons.values()) == len(lab.bad)
    share = len(lab.bad) / len(lab.rows)
    summary.check(share + 0.001)
    with pytest.raises(ValueError, match=r"^caption\.max_bad_share: expected at most .* got 6 of 48"):
        summary.check(share - 0.001)


@pytest.mark.slow
def test_the_next_run_starts_no_worker_and_only_retry_bad_tries_bad_images_again(
    lab: SimpleNamespace, done: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = (done.out / "captions.parquet").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("ray.data.from_arrow", lambda tables: pytest.fail("a second run captioned something"))
        again = caption(lab, done.out)
    assert (again.before, again.captioned, again.bad) == (len(lab.names), 0, len(lab.bad))
    assert (done.out / "captions.parquet").read_bytes() == table

    mended = "cam1/bad_empty.png"
    (lab.root / mended).write_bytes((lab.root / lab.names[0]).read_bytes())
    try:
        retried = caption(lab, done.out, retry_bad=True)
    finally:
        (lab.root / mended).write_bytes(b"")
    assert (retried.captioned, retried.bad) == (1, len(lab.bad) - 1)
    images = pq.read_table(done.out / "captions.parquet").sort_by("image")["image"].to_pylist()
    assert sorted(images) == sorted([*lab.names, mended])
    assert mended not in pq.read_table(done.out / "quarantine.parquet")["image"].to_pylist()


@pytest.mark.slow
def test_another_captioner_is_refused_on_the_same_folder(
    lab: SimpleNamespace, done: SimpleNamespace, tmp_path: Path
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "new.png")
    rows = pa.table({"image": ["new.png"], "modality": ["visible"]})
    longer = lab.captioner.model_copy(update={"max_new_tokens": 9})
    with pytest.raises(ValueError, match=r"expected visible captions of one captioner, got settings=.* instead of "):
        caption(lab, done.out, rows=rows, root=tmp_path, captioner=longer)
    nowhere = lab.captioner.model_copy(update={"model": "/nowhere"})
    with pytest.raises(ValueError, match=r"^caption\.visible\.model: expected a transformers"):
        caption(lab, tmp_path / "out", rows=rows, root=tmp_path, captioner=nowhere)


def job_of(lab: SimpleNamespace, folder: Path, **keys: object) -> CaptionJob:
    job = CaptionJob(
        images=Place(str(lab.root)),
        captions=Parts(str(folder), "captions"),
        quarantine=Parts(str(folder), "quarantine"),
        modality="visible",
        captioner=lab.captioner,
        device="cpu",
        dtype="float32",
        filter_colors=True,
        seed=0,
    )
    return replace(job, **keys)


def chunk_of(*images: str, start: int = 0) -> pa.Table:
    return pa.table({"start": [start], "image": [list(images)], "place": [list(range(start, start + len(images)))]})


def actor_of(job: CaptionJob, *, batch: int = BATCH, size: tuple[int, int] | None = (HEIGHT, WIDTH)) -> CaptionActor:
    return CaptionActor(job, batch=batch, decoders=2, size=size)


def captions_of(job: CaptionJob) -> dict[str, str]:
    found = job.captions.read()
    return dict(zip(found["image"].to_pylist(), found["caption"].to_pylist(), strict=True))


def expected_of(lab: SimpleNamespace, names: list[str]) -> dict[str, str]:
    pictures = decode_files(lab.root, names, height=HEIGHT, width=WIDTH)
    return dict(zip(names, Captioner.load(lab.captioner).caption(list(pictures)), strict=True))


def test_a_chunk_that_is_handed_out_again_finds_its_part(
    lab: SimpleNamespace, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(lab, tmp_path)
    actor, chunk = actor_of(job), chunk_of(lab.names[0], lab.bad[0], lab.names[1])
    first = actor(chunk)
    assert first.to_pylist() == [{"done": 3, "unread": []}]
    assert sorted(captions_of(job)) == lab.names[:2]
    assert job.quarantine.read()["image"].to_pylist() == [lab.bad[0]]
    monkeypatch.setattr(Captioner, "caption", lambda *arguments, **keys: pytest.fail("captioned twice"))
    assert actor(chunk).equals(first)
    assert len(list((tmp_path / "captions").iterdir())) == 1


def test_a_chunk_that_is_handed_out_again_keeps_what_has_become_readable(
    lab: SimpleNamespace, ray_session: None, tmp_path: Path
) -> None:
    """An image that cannot be read is neither captioned nor in quarantine, and tried again."""
    root = tmp_path / "images"
    (root / "later.png").mkdir(parents=True)
    shutil.copy(lab.root / lab.names[0], root / "first.png")
    job = job_of(lab, tmp_path, images=Place(str(root)))
    actor, chunk = actor_of(job), chunk_of("first.png", "later.png")
    assert actor(chunk).to_pylist() == [{"done": 1, "unread": ["expected a readable file, got OSError"]}]
    assert list(captions_of(job)) == ["first.png"] and not job.quarantine.read().num_rows
    (root / "later.png").rmdir()
    shutil.copy(lab.root / lab.names[1], root / "later.png")
    assert actor(chunk)["done"].to_pylist() == [2]
    assert sorted(captions_of(job)) == ["first.png", "later.png"]


def test_sampling_follows_the_seed_and_the_place_in_the_list(
    lab: SimpleNamespace, ray_session: None, tmp_path: Path
) -> None:
    sampling = lab.captioner.model_copy(update={"temperature": 5.0})

    def sentences(folder: str, seed: int, start: int) -> list[str]:
        job = job_of(lab, tmp_path / folder, captioner=sampling, seed=seed)
        actor_of(job)(chunk_of(*lab.names[:BATCH], start=start))
        return job.captions.read()["caption"].to_pylist()

    assert sentences("first", 0, 0) == sentences("again", 0, 0)
    assert len({tuple(sentences(f"{seed}-{start}", seed, start)) for seed in (0, 1) for start in (0, BATCH)}) == 4


def test_batches_are_cut_at_fixed_places_whatever_is_missing(
    lab: SimpleNamespace, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, caption_all = [], Captioner.caption

    def noted(self: Captioner, images: list[np.ndarray], *, seed: int = 0) -> list[str]:
        sizes.append(len(images))
        return caption_all(self, images, seed=seed)

    monkeypatch.setattr(Captioner, "caption", noted)
    chunk = pa.table({"start": [8], "image": [lab.names[:5]], "place": [[9, 11, 12, 14, 15]]})
    actor_of(job_of(lab, tmp_path), batch=4)(chunk)
    assert sizes == [2, 3]
    assert len(list((tmp_path / "captions").iterdir())) == 1


def test_pictures_keep_their_size_for_a_captioner_that_squashes_none(
    lab: SimpleNamespace, ray_session: None, tmp_path: Path
) -> None:
    job, names = job_of(lab, tmp_path), lab.names[:3]
    sizes = [Image.open(lab.root / name).size for name in names]
    found = [picture.pixels.shape for picture in decode_images(names, job, None) if picture.pixels is not None]
    assert found == [(height, width, 3) for width, height in sizes]
    actor_of(job, size=None)(chunk_of(*names))
    plain = Captioner.load(lab.captioner)
    expected = plain.caption([np.asarray(Image.open(lab.root / name)) for name in names])
    assert job.captions.read()["caption"].to_pylist() == expected


def test_a_lack_of_memory_is_no_images_fault(
    lab: SimpleNamespace, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(lab, tmp_path)

    def killed(*_: object) -> None:
        raise ray.exceptions.OutOfMemoryError("killed")

    def full(*_: object, **__: object) -> list[str]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "caption", full)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            actor_of(job)(chunk_of(*lab.names[:2]))
    monkeypatch.setattr(ray, "get", killed)
    report = actor_of(job)(chunk_of(*lab.names[:2]))
    assert report["done"].to_pylist() == [0] and len(report["unread"].to_pylist()[0]) == 2
    assert not job.quarantine.read().num_rows


@pytest.mark.parametrize("part", ["prompt_inputs", "caption"])
@pytest.mark.parametrize("poisoned", [[2], [0, 7]])
def test_images_with_which_the_captioner_fails_go_into_quarantine_alone(
    lab: SimpleNamespace,
    ray_session: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    poisoned: list[int],
) -> None:
    """Whatever fails, and whatever it raises: the batch is halved until the images are found."""
    job, names = job_of(lab, tmp_path), lab.names[:BATCH]
    poison = [picture.pixels for picture in decode_images([names[row] for row in poisoned], job, (HEIGHT, WIDTH))]
    works = getattr(Captioner, part)

    def fails(self: Captioner, images: list[np.ndarray], **keys: object) -> object:
        if any(np.array_equal(image, bad) for image in images for bad in poison):
            raise RuntimeError("aspect ratio must be smaller than 200\nat line 7")
        return works(self, images, **keys)

    monkeypatch.setattr(Captioner, part, fails)
    assert actor_of(job)(chunk_of(*names)).to_pylist() == [{"done": BATCH, "unread": []}]
    bad = job.quarantine.read().to_pylist()
    assert [row["image"] for row in bad] == [names[row] for row in poisoned]
    reason = (
        f"expected an image that the captioner accepts, got {WIDTH} x {HEIGHT} pixels (aspect ratio must be smaller"
    )
    assert all(row["reason"] == f"{reason} than 200)" for row in bad)
    monkeypatch.undo()
    assert captions_of(job) == expected_of(lab, [name for row, name in enumerate(names) if row not in poisoned])


def test_a_captioner_that_fails_with_every_image_ends_the_job_and_blames_none(
    lab: SimpleNamespace, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Captioner, images: list[np.ndarray]) -> object:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(Captioner, "prompt_inputs", fails)
    job = job_of(lab, tmp_path)
    with pytest.raises(RuntimeError, match="the device is lost"):
        actor_of(job)(chunk_of(*lab.names[:4]))
    assert not job.quarantine.read().num_rows and not job.captions.read().num_rows


def test_an_image_that_kills_its_decoder_goes_into_quarantine_alone(
    lab: SimpleNamespace, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = lab.names[2]

    @ray.remote(num_cpus=0.1, max_retries=0)
    def dies(names: list[str], job: CaptionJob, size: tuple[int, int]) -> object:
        if poison in names:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode_images(names, job, size)

    monkeypatch.setattr("cluster.tables.caption_worker.decode_batch", dies)
    job = job_of(lab, tmp_path)
    assert actor_of(job)(chunk_of(*lab.names[:4]))["done"].to_pylist() == [4]
    ((bad,),) = (job.quarantine.read().to_pylist(),)
    assert bad["image"] == poison and bad["reason"].startswith("expected an image that can be decoded, got ")
    assert sorted(captions_of(job)) == [name for name in lab.names[:4] if name != poison]


def test_no_file_stops_a_decoding_task(lab: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(name: str) -> str | None:
        (picture,) = decode_images([name], job_of(lab, tmp_path), (HEIGHT, WIDTH))
        return picture.fault

    assert fault(lab.names[0]) is None
    monkeypatch.setattr("cluster.tables.caption_worker.MAX_BYTES", 10)
    assert str(fault(lab.names[0])).startswith("expected at most 0 MiB, got")
    monkeypatch.undo()

    def fails(*arguments: object, **keys: object) -> None:
        raise KeyError("a decoder's own fault")

    monkeypatch.setattr("cluster.tables.caption_worker.decode", fails)
    assert "a decoder's own fault" in str(fault(lab.names[0]))


@pytest.mark.slow
def test_the_command_ends_with_an_error_above_the_share_of_bad_images_alone(
    lab: SimpleNamespace,
    done: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def status(*arguments: str) -> int:
        command = ["tvilfm", "caption", "--out", str(done.out), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    images = ("--images", str(lab.root), "--modality", "visible", "caption.batch=8")
    assert status(*images, "caption.max_bad_share=0.5") == 0
    assert "captioned 0 of 47 images" in capsys.readouterr().out
    assert status(*images, "caption.max_bad_share=0.05") == 2
    output = capsys.readouterr()
    assert "in quarantine" in output.out and "error: caption.max_bad_share: expected at most 0.05" in output.err
    assert status("--images", str(lab.root)) == 2
    assert "--modality: expected visible or infrared with --images" in capsys.readouterr().err


def test_a_second_job_on_a_folder_that_is_being_filled_is_refused(lab: SimpleNamespace, tmp_path: Path) -> None:
    with alone(str(tmp_path)), pytest.raises(ValueError, match="expected a folder that no other job fills"):
        caption(lab, tmp_path)


@pytest.mark.parametrize(
    ("images", "modality", "message"),
    [
        (["a.png", "a.png"], ["visible", "visible"], "image: expected each image once"),
        (["a.png"], ["thermal"], "modality: expected visible or infrared, got thermal"),
    ],
)
def test_rows_are_checked_before_anything_starts(
    lab: SimpleNamespace, tmp_path: Path, images: list[str], modality: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        caption(lab, tmp_path / "out", rows=pa.table({"image": images, "modality": modality}))
    assert not (tmp_path / "out").exists()


def test_images_are_found_in_folders_below_and_nothing_else_is(tmp_path: Path) -> None:
    for name in ("b.JPG", "deep/er/a.png", "notes.txt", "Thumbs.db"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert list_images(str(tmp_path), "infrared").to_pydict() == {
        "image": ["b.JPG", "deep/er/a.png"],
        "modality": ["infrared", "infrared"],
    }
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--images: expected \.jpg"):
        list_images(str(tmp_path / "empty"), "visible")
