"""The main job end to end at its smallest size: what it leaves, what it skips, and what a kill costs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from cluster.run import run
from cluster.stages.registry import stages_of
from tests.paths import REPOSITORY
from tests.processes import kill
from tvilfm.captioning.colors import find_colors
from tvilfm.config import Config, load_config
from tvilfm.data.manifest import select
from tvilfm.datasets import read_dataset
from tvilfm.evaluation.results import Results
from tvilfm.models import TVILFM
from tvilfm.models.tvilfm import parameter_digest
from tvilfm.terms import VOTES

OVERRIDES = ("caption.source=files", "cluster.cpus_per_train_worker=1")
CONFIG = Path("ray_config.yaml")
TINY = REPOSITORY / "runs" / "tiny"


def _config(folder: Path, *overrides: str) -> Config:
    return load_config(CONFIG, [*OVERRIDES, f"run.dir={folder}", *overrides], size="tiny")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """A folder of runs that holds one undisturbed run, `tiny`."""
    folder = tmp_path_factory.mktemp("runs")
    outcome = run(_config(folder))
    assert outcome.made == tuple(stages_of(_config(folder)))
    return folder


def _numbers(path: Path) -> tuple[object, str]:
    info = json.loads((path / "run.json").read_text())
    model = TVILFM.from_pretrained(path / info["stages"]["text"] / "model")
    return json.loads((path / "results.json").read_text())["rows"], parameter_digest(model)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_leaves_everything_that_a_reader_needs(finished: Path) -> None:
    path = finished / "tiny"
    results = json.loads((path / "results.json").read_text())
    cases = {(row["query"], row["text_source"], row["protocol"]) for row in results["rows"]}
    for query in ("text", "fusion", "ensemble"):
        assert (query, "witness", "sysu_mm01/all/single") in cases
        assert (query, "own", "sysu_mm01/all/single") in cases
        # all-search uses every visible camera: no caption is held out there
        assert (query, "witness-heldout", "sysu_mm01/all/single") not in cases
        assert (query, "witness-heldout", "sysu_mm01/indoor/single") in cases
    assert ("infrared", "none", "sysu_mm01/all/single") in cases
    assert all(row["num_trials"] == 10 and 0 <= row["mAP"] <= 1 for row in results["rows"])
    assert results["chance"]["sysu_mm01/all/single"] == pytest.approx(4 / 64, rel=0.15)

    assert load_config(path / "config.yaml") == _config(finished)
    info = json.loads((path / "run.json").read_text())
    assert {"ray", "torch"} <= info["versions"].keys()
    assert info["seed"] == 0 and re.fullmatch(r"[0-9a-f]{16}", info["fingerprints"]["dataset"])
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["stage"], record["epoch"]) for record in records] == [
        *(("base", epoch) for epoch in range(3)),
        *(("text", epoch) for epoch in range(3)),
    ]
    page = (path / "report" / "index.html").read_text()
    assert "witness" in page and "</html>" in page


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_run_makes_nothing_and_a_changed_key_only_what_depends_on_it(finished: Path) -> None:
    assert run(_config(finished)).made == ()
    outcome = run(_config(finished, "evaluate.ensemble.text=3", "cluster.extract_workers=1"))
    assert outcome.made == ("results", "report")
    again = run(_config(finished))
    assert again.made == ()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_copied_dataset_is_the_same_dataset(finished: Path, tmp_path: Path) -> None:
    # As after an unzip or a download: other times, another folder, and a dataset that cannot be written.
    copy = shutil.copytree(finished / "data" / "synthetic-tiny-0", tmp_path / "data", copy_function=shutil.copyfile)
    for path in sorted(copy.rglob("*"), reverse=True):
        os.utime(path, (1, 1))
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert run(_config(finished, f"data.root={copy}")).made == ()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sentences_of_people_are_a_text_source(finished: Path, tmp_path: Path) -> None:
    manifest = read_dataset("synthetic", _config(finished).data_root)
    people = sorted(set(manifest["pid"].to_pylist()))
    (tmp_path / "words.json").write_text(json.dumps({f"{pid:04d}": f"person number {pid}" for pid in people}))
    own = (f"data.human_texts={tmp_path}/words.json", "evaluate.text_sources=[witness,human]", "run.name=human")
    own += ("evaluate.default_text_source=human", "evaluate.text_noise=[chatter,wrong-1]")
    outcome = run(_config(finished, *own, f"run.stages_dir={finished}/tiny/stages"))
    assert outcome.made == ("features", "results", "report") and outcome.results is not None
    assert {row.text_source for row in outcome.results.rows} == {"none", "witness", "human"}
    texts = pq.read_table(outcome.stages["features"] / "query_texts.parquet").to_pylist()
    pid_of = dict(zip(manifest["image"].to_pylist(), manifest["pid"].to_pylist(), strict=True))
    human = [row for row in texts if row["text_source"] == "human" and not row["noise"]]
    assert human and all(row["text"] == f"person number {pid_of[row['image']]}" for row in human)
    assert {row["text_source"] for row in texts if row["noise"]} == {"human"}
    assert list(outcome.results.text_noise) == ["chatter", "wrong-1"]
    validation = Results.read(outcome.path / "validation.json")
    for name in VOTES:
        found, fitted = outcome.results.open_set[name], validation.open_set[name]
        assert found.fitted == fitted.fitted is not None
        assert fitted.fitted_false_accepts is not None and fitted.fitted_false_accepts <= 0.1
    assert "How good must the witness be?" in (outcome.path / "report" / "index.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_evaluation_does_not_depend_on_the_number_of_workers(finished: Path) -> None:
    before = _numbers(finished / "tiny")
    config = _config(finished, "cluster.extract_workers=1")
    info = json.loads((finished / "tiny" / "run.json").read_text())
    for name in ("features", "results", "report"):
        folder = (finished / "tiny" / info["stages"][name]).resolve()
        folder.rename(folder.with_name("kept-" + folder.name))
    assert run(config).made == ("features", "results", "report")
    assert _numbers(finished / "tiny") == before


@pytest.mark.skipif(not (TINY / "results.json").exists(), reason="needs the run of `make demo SIZE=tiny`")
def test_captioners_of_the_runs_own_write_what_it_trains_on() -> None:
    stages = json.loads((TINY / "run.json").read_text())["stages"]
    assert {"captioner_visible", "captioner_infrared", "captions"} <= set(stages)
    captions = pq.read_table(TINY / stages["captions"] / "rephrased" / "captions.parquet").to_pylist()
    manifest = pq.read_table(TINY / stages["pixels"] / "manifest.parquet")
    assert {row["image"] for row in captions} == set(manifest["image"].to_pylist())
    infrared = set(select(manifest, modality="infrared")["image"].to_pylist())
    assert not any(find_colors(row["caption"]) for row in captions if row["image"] in infrared)
    assert "The infrared captioner, on" in (TINY / "report" / "index.html").read_text()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_published_fidelity_trains_on_pixels_and_says_that_it_chose_on_the_test_set(
    finished: Path, tmp_path: Path
) -> None:
    config = _config(
        tmp_path,
        "fidelity=published",
        "train.text.cache_views=0",
        f"data.root={finished / 'data' / 'synthetic-tiny-0'}",
        f"run.stages_dir={finished}/tiny/stages",
        "train.base.epochs=1",
        "train.text.epochs=1",
    )
    outcome = run(config)
    assert outcome.made == ("base", "text", "features", "results", "report")
    base, text = (TVILFM.from_pretrained(outcome.stages[name] / "model") for name in ("base", "text"))
    statistics = "visible_stem.bn1.running_mean"
    moved = not torch.equal(base.backbone.state_dict()[statistics], text.backbone.state_dict()[statistics])
    assert moved, "the released code's frozen BN layers keep updating their statistics"
    assert "selected on the test identities" in (tmp_path / "tiny" / "report" / "index.html").read_text()


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_killed_at_any_stage_it_goes_on_and_ends_with_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    # The dataset is the same files, so that nothing but the kills differs.
    data = finished / "data" / "synthetic-tiny-0"
    command = [sys.executable, "-m", "cluster", "run", "--size", "tiny", *OVERRIDES,
               f"run.dir={tmp_path}", f"data.root={data}", "cluster.extract_workers=1"]  # fmt: skip
    stages = tmp_path / "tiny" / "stages"
    stages.mkdir(parents=True)
    # Pixels, captions and pre-training are there; the rest is made here.
    for folder in (finished / "tiny" / "stages").glob("[pc]*"):
        shutil.copytree(folder, stages / folder.name)

    def epochs_of(stage: str) -> Callable[[], bool]:
        return lambda: any(path.stat().st_size for path in stages.glob(f"{stage}-*.partial/metrics.jsonl"))

    def started(stage: str) -> Callable[[], bool]:
        return lambda: any(stages.glob(f"{stage}-*.partial"))

    for moment in (epochs_of("base"), started("views"), epochs_of("text")):
        _kill_when(command, moment)
    finish = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert finish.returncode == 0, finish.stderr[-2000:]
    assert "base: finished already" in finish.stderr
    assert _numbers(tmp_path / "tiny") == _numbers(finished / "tiny")


def _kill_when(command: list[str], moment: Callable[[], bool]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not moment():
        assert process.poll() is None, process.stderr.read()[-2000:] if process.stderr else ""
        assert time.monotonic() < deadline, "the moment to kill at never came"
        time.sleep(0.02)
    kill(process, deadline=deadline)
