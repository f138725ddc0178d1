"""Find a person among loose images: ranking, features kept between calls, models of every kind, bad input."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from cluster.cli.app import app
from tests.unit.models.test_released import released
from tests.untrained_run import UntrainedRun, evaluated_rankings
from tvilfm.config import EnsembleWeights
from tvilfm.data.pixels import decode_files
from tvilfm.models.encode import encode_pixels, encode_texts
from tvilfm.models.opening import OpenedModel, open_model
from tvilfm.models.released import load_released
from tvilfm.retrieval import find as finding
from tvilfm.retrieval.contact_sheet import write_contact_sheet
from tvilfm.retrieval.find import find, list_images, rank

SENTENCE, CAPTION = "a woman in a red coat", "a person in a long coat"


@dataclass(frozen=True)
class Loose:
    """A run and a folder of its visible images under names that say nothing."""

    run: Path
    folder: Path
    queries: list[Path]


@pytest.fixture()
def loose(untrained_run: UntrainedRun, tmp_path: Path) -> Loose:
    run = tmp_path / "run"
    shutil.copytree(untrained_run.config.run.path, run, ignore=shutil.ignore_patterns("find"))
    folder = tmp_path / "loose"
    visible = sorted((untrained_run.root / "cam1").rglob("*.jpg")) + sorted(
        (untrained_run.root / "cam2").rglob("*.jpg")
    )
    for number, path in enumerate(visible[:12]):
        target = folder / f"level{number % 3}" / f"{number:02d}.{('jpg', 'JPG', 'jpeg')[number % 3]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return Loose(run=run, folder=folder, queries=sorted((untrained_run.root / "cam3").rglob("*.jpg"))[:2])


@pytest.fixture()
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many visible images each batch encoded."""
    counts: list[int] = []

    def counting(model: object, pixels: np.ndarray, modality: str) -> np.ndarray:
        if modality == "visible":
            counts.append(len(pixels))
        return encode_pixels(model, pixels, modality)  # type: ignore[arg-type]

    monkeypatch.setattr(finding, "encode_pixels", counting)
    return counts


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def through(head: torch.nn.Module, raw: np.ndarray) -> np.ndarray:
    """BN in eval mode and the unit length, by hand in float64."""
    bn = head.bn
    assert isinstance(bn, torch.nn.BatchNorm1d) and bn.running_mean is not None and bn.running_var is not None
    mean, variance = bn.running_mean.double().numpy(), bn.running_var.double().numpy()
    scaled = (raw.astype(np.float64) - mean) / np.sqrt(variance + bn.eps)
    scaled = scaled * bn.weight.detach().double().numpy() + bn.bias.detach().double().numpy()
    return unit(scaled)


@pytest.mark.parametrize("kind", ["image", "images", "text", "both", "filtered"])
def test_ranks_as_direct_similarity_does(loose: Loose, kind: str) -> None:
    opened = open_model(loose.run)
    images = [] if kind == "text" else loose.queries if kind == "images" else loose.queries[:1]
    sentence = None if kind in ("image", "images") else SENTENCE
    caption = CAPTION if kind == "filtered" else None
    ranking, remarks = find(opened, loose.folder, images=images, sentence=sentence, infrared_caption=caption, count=99)

    size = {"height": opened.height, "width": opened.width}
    names = list_images(loose.folder)
    gallery = encode_pixels(opened.model, decode_files(loose.folder, names, **size), "visible")
    raw = {}
    if images:
        pixels = decode_files(Path("/"), [str(path) for path in images], **size)
        raw["infrared"] = encode_pixels(opened.model, pixels, "infrared").mean(axis=0)
    if sentence:
        raw["text"] = encode_texts(opened.model, [sentence])[0]
    if images and sentence:
        raw["fusion"] = raw["infrared"] + raw["text"]
        if caption:
            raw["fusion"] = raw["fusion"] - encode_texts(opened.model, [caption])[0]
    head = opened.model.base_head if set(raw) == {"infrared"} else opened.model.head
    assert head is not None
    shares = {name: through(head, gallery) @ through(head, vector) for name, vector in raw.items()}
    score = np.sum(list(shares.values()), axis=0)
    order = np.argsort(-score, kind="stable")

    assert [row.path for row in ranking] == [names[row] for row in order]
    assert [row.score for row in ranking] == pytest.approx(score[order].tolist(), abs=1e-5)
    for name, of_name in shares.items():
        assert [row.shares[name] for row in ranking] == pytest.approx(of_name[order].tolist(), abs=1e-5)
    assert any("No --infrared-caption" in line for line in remarks) == (kind == "both")


def test_a_text_that_is_cut_is_remarked(loose: Loose) -> None:
    opened = open_model(loose.run)
    for sentence, cut in ((SENTENCE, False), ("long " * 76, True)):
        _, remarks = find(opened, loose.folder, sentence=sentence)
        assert any("longer than 77 tokens" in line for line in remarks) == cut


def test_ranks_as_the_evaluation_does(untrained_run: UntrainedRun, loose: Loose, tmp_path: Path) -> None:
    rankings = list(evaluated_rankings(untrained_run.config, untrained_run.evaluator))
    asked = rankings[:2] + [one for one in rankings if one.sentence][:2]
    opened = open_model(loose.run)
    for expected in asked:
        (tmp_path / "query.jpg").write_bytes(expected.image)
        ranking, _ = find(
            opened,
            untrained_run.root,
            images=[tmp_path / "query.jpg"],
            sentence=expected.sentence,
            infrared_caption=expected.infrared_caption,
            count=999,
        )
        assert [row.path for row in ranking if row.path in set(expected.names)] == expected.names


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_weights_and_temperature_are_those_of_the_run(loose: Loose, temperature: float | None) -> None:
    opened = open_model(loose.run)
    store = finding.Store(finding.store_folders(opened), "space")
    features = finding.folder_features(opened, loose.folder, store)
    parts = finding.encode_query(opened, loose.queries[:1], SENTENCE, None)
    weights = EnsembleWeights(infrared=0.5, text=2.0, fusion=0.0, temperature=temperature)
    ranking = rank(parts, features, weights, 99)
    assert set(ranking[0].shares) == {"infrared", "text"}
    pixels = decode_files(loose.folder, features.names, height=opened.height, width=opened.width)
    raw = torch.from_numpy(encode_pixels(opened.model, pixels, "visible"))
    gallery = opened.model.embed(raw).detach().double()
    total = torch.zeros(len(gallery), dtype=torch.float64)
    for name, weight in (("infrared", 0.5), ("text", 2.0)):
        vote = gallery @ parts[name].double()
        total += weight * (vote if temperature is None else (vote / temperature).softmax(dim=0))
    assert [row.score for row in ranking] == pytest.approx(sorted(total.tolist(), reverse=True), abs=1e-5)
    assert all(row.score == pytest.approx(sum(row.shares.values()), abs=1e-5) for row in ranking)


def test_encodes_an_image_once(loose: Loose, encoded: list[int]) -> None:
    first, _ = find(open_model(loose.run), loose.folder, sentence=SENTENCE)
    assert sum(encoded) == 12
    encoded.clear()
    opened = open_model(loose.run)
    again, _ = find(opened, loose.folder, sentence=SENTENCE)
    assert encoded == [] and again == first and "model" not in vars(opened)  # which was not even read
    by_image = {"images": loose.queries[:1], "sentence": SENTENCE}
    first, _ = find(opened, loose.folder, **by_image)
    for others in ({"images": loose.queries[1:]}, {"sentence": "a man"}, {"infrared_caption": CAPTION}):
        other, _ = find(opened, loose.folder, **by_image | others)  # another query is not answered from the store
        assert other != first

    shutil.copyfile(loose.queries[0], loose.folder / "level0" / "00.jpg")
    find(open_model(loose.run), loose.folder, sentence=SENTENCE)
    shutil.copyfile(loose.queries[1], loose.folder / "added.jpg")
    find(open_model(loose.run), loose.folder, sentence=SENTENCE)
    assert encoded == [1, 1]

    encoded.clear()
    copied = loose.folder.with_name("copied")
    shutil.copytree(loose.folder, copied)
    find(open_model(loose.run), copied, sentence=SENTENCE)
    assert encoded == []


def test_a_damaged_store_costs_time_alone(loose: Loose, encoded: list[int]) -> None:
    first, _ = find(open_model(loose.run), loose.folder, sentence=SENTENCE)
    for path in (loose.run / "find").rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    encoded.clear()
    again, _ = find(open_model(loose.run), loose.folder, sentence=SENTENCE)
    assert sum(encoded) == 12 and again == first


def test_features_go_to_the_users_cache_beside_a_model_that_cannot_be_written_to(
    loose: Loose, encoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVILFM_CACHE", str(tmp_path / "cache"))
    (loose.run / "find").write_text("a file, so that no folder can be made")
    for _ in range(2):
        find(open_model(loose.run), loose.folder, sentence=SENTENCE)
    assert sum(encoded) == 12 and list((tmp_path / "cache/find").rglob("*.parquet"))


def test_skips_unreadable_images_and_system_files(loose: Loose) -> None:
    for name in ("._00.jpg", "Thumbs.db", "__MACOSX/a.jpg", "@eaDir/a.jpg", "notes.txt"):
        path = loose.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no picture")
    (loose.folder / "bad.png").write_bytes(b"no picture")
    (loose.folder / "empty.webp").write_bytes(b"")
    ranking, remarks = find(open_model(loose.run), loose.folder, sentence=SENTENCE, count=99)
    assert len(ranking) == 12
    assert "2 unreadable images were skipped: bad.png, empty.webp." in remarks


@pytest.mark.parametrize(("wrapper", "prefix"), [("state_dict", "module."), ("model", "module._orig_mod."), (None, "")])
def test_opens_released_checkpoints_as_training_leaves_them(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.rand((1,), generator=generator).expand(shape).clone()

    state = released(random, width=64, layers=1)
    held: object = {f"{prefix}{key}": value for key, value in state.items()}
    path = tmp_path / "checkpoint.pth"
    torch.save(held if wrapper is None else {wrapper: held, "epoch": 3}, path)
    opened = open_model(path)
    expected = load_released(state).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in opened.model.state_dict().items())
    assert not opened.model.training and (opened.height, opened.width) == (288, 144)
    assert any(repr(prefix) in line for line in opened.reported) == bool(prefix)
    assert any(repr(wrapper) in line for line in opened.reported) == (wrapper is not None)


def test_opens_a_model_folder_and_a_run_alike(loose: Loose) -> None:
    run, folder = open_model(loose.run), open_model(loose.run / "stages" / "text-0" / "model")
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in folder.model.state_dict().items())
    assert run.reported == () and len(folder.reported) == 1


def base_only(opened: OpenedModel) -> OpenedModel:
    opened.model.text = None
    return opened


def test_bad_input_is_named(loose: Loose, tmp_path: Path) -> None:
    opened = open_model(loose.run)
    with pytest.raises(ValueError, match="neither"):
        find(opened, loose.folder)
    with pytest.raises(ValueError, match="--in: expected a folder"):
        find(opened, tmp_path / "missing", sentence=SENTENCE)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="--in: expected images"):
        find(opened, tmp_path / "none", sentence=SENTENCE)
    (tmp_path / "none" / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="--in: expected readable images"):
        find(opened, tmp_path / "none", sentence=SENTENCE)
    with pytest.raises(ValueError, match="--image: expected an image file"):
        find(opened, loose.folder, images=[tmp_path / "missing.jpg"])
    with pytest.raises(ValueError, match="-k: expected 1"):
        find(opened, loose.folder, sentence=SENTENCE, count=0)
    with pytest.raises(ValueError, match="--text: expected a model with a text tower"):
        find(base_only(opened), loose.folder, sentence=SENTENCE)
    with pytest.raises(ValueError, match="model: expected a run folder"):
        open_model(tmp_path / "missing")
    (tmp_path / "other.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="checkpoint: expected"):
        open_model(tmp_path / "other.pth")


def test_contact_sheet_escapes_names(loose: Loose, tmp_path: Path) -> None:
    name = "<script>alert('x')&.jpg"
    shutil.copyfile(loose.queries[0], loose.folder / name)
    shutil.copyfile(loose.queries[0], loose.folder / os.fsdecode(b"caf\xe9\n.jpg"))
    ranking, _ = find(open_model(loose.run), loose.folder, sentence="<b>red</b>", count=99)
    write_contact_sheet(ranking, loose.folder, tmp_path / "sheet.html", images=loose.queries, sentence="<b>red</b>")
    page = (tmp_path / "sheet.html").read_text()
    assert "<script" not in page and "<b>red" not in page and "&lt;script&gt;" in page and "&lt;b&gt;red" in page
    assert page.count('src="data:image/jpeg;base64,/9j/') == 14 + 2
    assert "http" not in page


def test_command_writes_its_tables(loose: Loose, tmp_path: Path) -> None:
    out = {kind: tmp_path / f"out.{kind}" for kind in ("html", "csv", "json")}
    options = [text for kind, path in out.items() for text in (f"--{kind}", str(path))]
    query = ["--image", str(loose.queries[0]), "--image", str(loose.queries[1]), "--text", SENTENCE]
    done = CliRunner().invoke(app, ["find", str(loose.run), "--in", str(loose.folder), *query, "-k", "3", *options])
    assert done.exit_code == 0, done.output
    rows = json.loads(out["json"].read_text())
    assert [row["rank"] for row in rows] == [1, 2, 3]
    with out["csv"].open() as file:
        assert [row["path"] for row in csv.DictReader(file)] == [row["path"] for row in rows]
    assert all(row["path"] in done.stdout for row in rows) and "No --infrared-caption" in done.stderr


def test_command_imports_no_ray(loose: Loose) -> None:
    code = "import sys; from cluster.cli.app import app; app(standalone_mode=False); assert 'ray' not in sys.modules"
    command = [sys.executable, "-c", code, "find", str(loose.run), "--in", str(loose.folder), "--text", SENTENCE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "level" in done.stdout, done.stderr
