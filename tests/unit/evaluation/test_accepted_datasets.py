"""Whatever `data check` accepts is trained on and evaluated, and every number of it is that of the tree."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tvilfm.config import Config, load_config
from tvilfm.data.manifest import select
from tvilfm.data.pixels import decode_files
from tvilfm.datasets import read_dataset
from tvilfm.datasets.caption_files import read_captions
from tvilfm.evaluation.evaluator import CaseResult, Evaluator
from tvilfm.evaluation.feasibility import check_config, require_feasible
from tvilfm.evaluation.features import FeatureTable
from tvilfm.evaluation.query_texts import draw_query_texts, sentences_of
from tvilfm.models import TVILFM
from tvilfm.models.encode import encode_pixels, encode_texts
from tvilfm.report.build import build_results
from tvilfm.training.stages import StageData, train_base, train_text

# A dataset of the folder layout that works, and what may be odd about it; most oddities make the check refuse it.
PEOPLE = ("0001", "1b", "alice", "p10", "7", "Zo\u00eb", "a b")
ODD = (None, None, None, "one camera", "junk", "no val", "no test", "blank caption", "no caption", "single")


@dataclass(frozen=True)
class Shot:
    """One image of the tree."""

    person: str
    split: str
    modality: str
    camera: int
    path: str


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[Shot], str | None]:
    odd = draw(st.sampled_from(ODD))
    split_of = dict(zip(PEOPLE, ("train", "train", "train", "val", "test", "test", "test"), strict=True))
    moved = draw(st.sampled_from(PEOPLE))
    split_of[moved] = draw(st.sampled_from(["train", "val", "test"]))
    if odd in ("no val", "no test"):
        split_of = {person: "train" if f"no {split}" == odd else split for person, split in split_of.items()}
    suffix = draw(st.sampled_from([".png", ".JPG", ".tiff"]))
    shots = []
    for person, split in split_of.items():
        for modality, cameras in (("visible", (1, 2)), ("infrared", (3,))):
            for camera in (1,) if odd == "one camera" else cameras:
                missing = odd == "single" and modality == "visible" and split == "test"
                for number in range(0 if missing else draw(st.integers(1, 2))):
                    name = f"{modality}/{person}/{camera}/{number}{suffix}"
                    shots.append(Shot(person, split, modality, camera, name))
    if odd == "junk":
        shots.append(Shot("-1", "test", "visible", 1, f"visible/junk/1/0{suffix}"))
    return shots, odd


# Three people to train on, one to validate on, three to test, each seen by every camera once.
TIDY = (
    [
        Shot(person, split, modality, camera, f"{modality}/{person}/{camera}/0.png")
        for person, split in zip(PEOPLE, ("train", "train", "train", "val", "test", "test", "test"), strict=True)
        for modality, camera in (("visible", 1), ("visible", 2), ("infrared", 3))
    ],
    None,
)


def write(root: Path, shots: list[Shot], odd: str | None, *, deep: bool) -> None:
    rng = np.random.default_rng(len(shots))
    for shot in shots:
        path = root / shot.path
        path.parent.mkdir(parents=True, exist_ok=True)
        gray = shot.modality == "infrared"
        pixels = rng.integers(0, 256, (20, 10) if gray else (20, 10, 3)).astype(np.uint8)
        sixteen = deep and gray and path.suffix != ".JPG"
        Image.fromarray(pixels.astype(np.uint16) * 257 if sixteen else pixels).save(path)
    with (root / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "pid", "camid", "modality", "split"))
        writer.writerows((shot.path, shot.person, shot.camera, shot.modality, shot.split) for shot in shots)
    texts = [f"a person in coat number {number}" for number in range(len(shots))]
    images = [shot.path for shot in shots]
    if odd == "blank caption":
        texts[0] = "\u200b "
    if odd == "no caption":
        images, texts = images[1:], texts[1:]
    columns = {"image": images, "caption": texts} | dict.fromkeys(
        ("rephrased", "captioner", "revision"), pa.nulls(len(images), pa.string())
    )
    pq.write_table(pa.table(columns), root / "captions.parquet")


def usable(shots: list[Shot], odd: str | None, *, p: int, selects: bool) -> bool:
    """Whether a run needs nothing that the dataset does not have."""
    people = Counter(split for _, split in {(shot.person, shot.split) for shot in shots if shot.person != "-1"})
    enough = people["train"] >= p and people["test"] >= 2 and (people["val"] >= 1 or not selects)
    return enough and odd not in ("one camera", "blank caption", "no caption", "single")


class _Silence:
    def on_step(self, record: object) -> None: ...

    def on_epoch(self, record: object, write: object) -> None: ...


def run_through(config: Config) -> list[CaseResult]:
    """What a run does, in this process: read, decode, train both stages, encode, evaluate."""
    manifest = read_dataset(config.data.name, config.data_root, **config.data.reader_options)
    captions = read_captions(manifest, config.data_root, config.data.captions)
    require_feasible(config, manifest, captions)
    names = manifest["image"].to_pylist()
    pixels = decode_files(config.data_root, names, height=config.data.height, width=config.data.width)
    data = StageData(manifest=manifest, pixels=pixels, captions=captions)
    options = {"device": torch.device("cpu"), "listener": _Silence()}
    base = train_base(config, data, backbone=None, **options)
    model: TVILFM = train_text(config, data, base=base, views=None, **options)
    vectors = [
        encode_pixels(model, pixels[[row]], modality) for row, modality in enumerate(manifest["modality"].to_pylist())
    ]
    query_texts = draw_query_texts(manifest, captions, config.evaluate, seed=0)
    texts = sentences_of(query_texts)
    images = FeatureTable(keys=tuple(names), vectors_ND=np.concatenate(vectors))
    sentences = FeatureTable(keys=tuple(texts), vectors_ND=encode_texts(model, texts))
    tables = (manifest, query_texts, images, sentences, config.evaluate)
    evaluator = Evaluator(model, *tables, filter_text=True)
    build_results(evaluator, config)
    if select(manifest, split="val", modality="infrared").num_rows:
        build_results(Evaluator(model, *tables, filter_text=True, split="val"), config)
    return evaluator.evaluate()


@settings(
    max_examples=25,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # to shrink an example would train dozens of networks
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(tree=TIDY, deep=True, p=3, chosen="val")
@example(tree=TIDY, deep=False, p=4, chosen="last")
@given(tree=trees(), deep=st.booleans(), p=st.sampled_from([2, 3, 4]), chosen=st.sampled_from(["val", "last"]))
def test_a_dataset_that_the_check_accepts_runs_through_with_the_counts_of_its_tree(
    tmp_path_factory: pytest.TempPathFactory, tree: tuple[list[Shot], str | None], deep: bool, p: int, chosen: str
) -> None:
    shots, odd = tree
    root = tmp_path_factory.mktemp("dataset")
    write(root, shots, odd, deep=deep)
    overrides = [
        *("data.name=folder", f"data.root={root}", f"data.captions={root}/captions.parquet", "caption.source=files"),
        *("model.weights=random", f"train.p={p}", "train.text.cache_views=0", f"run.dir={root}/runs"),
        *(f"train.{stage}={{epochs: 1, warmup_epochs: 0, milestones: [], select: {chosen}}}" for stage in
          ("base", "text")),
    ]  # fmt: skip
    config = load_config(Path("ray_config.yaml"), overrides, size="tiny")
    findings = check_config(config)
    assert findings.sound == usable(shots, odd, p=p, selects=chosen == "val"), findings.faults
    if not findings.sound:
        with pytest.raises(ValueError):
            run_through(config)
        return
    people = [shot for shot in shots if shot.person != "-1"]
    found = {count.what: count.found for count in findings.counts}
    images = Counter((shot.modality, "test" if shot.split == "test" else "train") for shot in people)
    for (modality, part), number in images.items():
        assert found[f"{modality} {part} images"] == number
    assert found["captions"] == len(people)
    assert found["test identities"] == len({shot.person for shot in people if shot.split == "test"})
    manifest = read_dataset("folder", root)
    assert select(manifest, split="test", modality="infrared").num_rows == images["infrared", "test"]
    cases = run_through(config)
    assert {case.query for case in cases} >= {"infrared", "text", "fusion", "ensemble"}
    assert all(0 <= value <= 1 for case in cases for trial in case.trials for value in (trial.rank1, trial.mAP))
