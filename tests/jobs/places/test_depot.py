"""Runs kept in an object store: another machine continues them, and workers that share no disk work for them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from cluster.places.depot import COMPLETE, Depot, fetched
from cluster.places.finished import finished_run
from cluster.run import run
from cluster.stages.registry import stages_of
from cluster.stages.store import StageStore
from tests.paths import REPOSITORY
from tests.processes import kill, kill_tree
from tests.quick import QUICK, records_of, results_of
from tvilfm.config import Config, load_config
from tvilfm.evaluation.results import Results
from tvilfm.models import TVILFM
from tvilfm.place import Place


@pytest.fixture
def uri(s3_endpoint: str) -> str:
    """A place in an object store that no other test has."""
    options = {"endpoint_override": s3_endpoint, "scheme": "http"}
    for bucket in ("kept", "moved"):
        fs.S3FileSystem(allow_bucket_creation=True, **options).create_dir(bucket)
    return f"s3://kept/{uuid.uuid4().hex}?" + "&".join(f"{key}={value}" for key, value in options.items())


def test_a_copy_is_whole_or_not_there(uri: str, tmp_path: Path) -> None:
    depot = Depot(uri, tmp_path / "here")
    folder = tmp_path / "here" / "base-1"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_bytes(b"w" * 5_000_000)
    (folder / "empty").touch()
    depot.push(folder)
    assert not depot.has(folder)  # half a copy looks like that too
    depot.keep(folder)
    assert depot.has(folder)

    there = Depot(uri, tmp_path / "there")
    copy = tmp_path / "there" / "base-1"
    assert fetched(copy / "model", there) == copy / "model"
    # All of the stage: a part of it must not pass for the stage.
    assert {path.name for path in copy.iterdir()} == {"model", "empty"}
    assert (copy / "model" / "weights").stat().st_size == 5_000_000
    there.pull(copy)  # another worker of the same machine was faster
    assert {path.name for path in copy.parent.iterdir()} == {"base-1", ".locks"}
    with pytest.raises(FileNotFoundError):
        there.pull(tmp_path / "there" / "text-1")
    there.drop(copy)
    with pytest.raises(FileNotFoundError):
        there.pull(copy)
    assert fetched(tmp_path / "dataset", there) == tmp_path / "dataset"  # not a run's: it has to be on the machine


def test_the_workers_of_a_machine_download_a_stage_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "store" / "base-1" / "model"
    source.mkdir(parents=True)
    (source / "weights").write_text("w")
    depot = Depot((tmp_path / "store").as_uri(), tmp_path / "here")
    workers, pulls = 8, []
    together, pull = threading.Barrier(workers), Depot.pull

    def counted(self: Depot, path: Path) -> None:
        pulls.append(path)
        pull(self, path)

    def read(_: int) -> str:
        together.wait()
        return (fetched(tmp_path / "here" / "base-1" / "model", depot) / "weights").read_text()

    monkeypatch.setattr(Depot, "pull", counted)
    with ThreadPoolExecutor(workers) as pool:
        assert list(pool.map(read, range(workers))) == ["w"] * workers
    assert pulls == [tmp_path / "here" / "base-1"]


def test_what_two_runs_work_on_lies_apart(uri: str, tmp_path: Path) -> None:
    one, other = (Depot(uri, tmp_path, owner=name) for name in ("one", "other"))
    half = tmp_path / "base-1.partial" / "captions.parquet"
    half.parent.mkdir()
    half.write_text("of one")
    one.push(half)
    half.unlink()
    with pytest.raises(FileNotFoundError):
        fetched(half, other)
    assert fetched(half, one).read_text() == "of one"
    one.drop(half.parent)
    half.unlink()
    with pytest.raises(FileNotFoundError):
        fetched(half, one)


def test_a_folder_by_its_uri_is_a_store_too(tmp_path: Path) -> None:
    depot = Depot(f"file://{tmp_path}/store/runs", tmp_path / "here")
    (tmp_path / "here" / "base-1").mkdir(parents=True)
    (tmp_path / "here" / "base-1" / "model").write_text("made")
    depot.keep(tmp_path / "here" / "base-1")
    copy = tmp_path / "there" / "base-1"
    assert fetched(copy / "model", Depot(depot.uri, tmp_path / "there")).read_text() == "made"


def test_a_stage_is_made_once_among_machines_and_its_working_folder_does_not_stay(uri: str, tmp_path: Path) -> None:
    here, there = (
        StageStore(tmp_path / name, {"base": "b0"}, Depot(uri, tmp_path / name)) for name in ("here", "there")
    )

    def make(folder: Path) -> None:
        (folder / "model").write_text("made")
        Depot(uri, tmp_path / "here").push(folder / "model")

    assert here.ensure("base", make)
    assert not there.ensure("base", make)
    assert (there.path("base") / "model").read_text() == "made"
    with pytest.raises(FileNotFoundError):
        Depot(uri, tmp_path / "here").pull(here.partial("base") / "model")
    # Made before there was a store, or not copied before a kill.
    shutil.rmtree(tmp_path / "there")
    other = StageStore(tmp_path / "here", {"base": "b0"}, Depot((Place(uri) / "new").uri, tmp_path / "here"))
    assert not other.ensure("base", make)
    assert Depot((Place(uri) / "new").uri, tmp_path / "here").has(here.path("base"))
    assert not any(path.name == COMPLETE for path in (tmp_path / "here").iterdir())


def _config(uri: str, folder: Path, data: Path, *overrides: str) -> Config:
    where = [f"run.dir={folder}", f"data.root={data}", f"cluster.storage={json.dumps(uri)}"]
    return load_config(REPOSITORY / "ray_config.yaml", [*QUICK, *where, *overrides], size="tiny")


def _numbers(path: Path) -> list[object]:
    results: list[object] = json.loads((path / "results.json").read_text())["rows"]
    return results


def _copied(uri: str) -> str:
    """Copy a store to another bucket and return the URI of the copy."""
    place, moved = Place(uri), uri.replace("s3://kept/", "s3://moved/")
    fs.copy_files(place.path, Place(moved).path, place.filesystem, place.filesystem)
    place.filesystem.delete_dir(place.path)
    return moved


def _copied_folder(folder: Path, target: Path) -> Path:
    """Copy a folder as `cp -r` does, with new times of modification."""
    return Path(shutil.copytree(folder, target, copy_function=shutil.copy))


@pytest.mark.long
def test_a_run_copied_to_another_folder_with_its_dataset_is_finished_there(
    undisturbed: Path, tiny_benchmark: Path, tmp_path: Path
) -> None:
    data, sweep = _copied_folder(tiny_benchmark, tmp_path / "data"), _copied_folder(undisturbed, tmp_path / "rows")
    places = (f"data.root={data}", f"run.dir={sweep / 'trials'}", f"run.stages_dir={sweep / 'stages'}")
    name = f"run.name={records_of(undisturbed)['joint'].name}"
    config = load_config(REPOSITORY / "ray_config.yaml", [*QUICK, *places, name], size="tiny")
    outcome = run(config, until="results")
    assert outcome.made == () and outcome.results == results_of(undisturbed, "joint")
    shutil.rmtree(outcome.stages["features"])
    again = run(config, until="results")
    assert again.made == ("features",) and again.results == outcome.results


@pytest.mark.long
def test_another_machine_goes_on_from_the_last_epoch_and_from_finished_stages_of_a_copied_store(
    uri: str, tiny_benchmark: Path, ray_session: None, tmp_path: Path
) -> None:
    epochs = 20  # of a fraction of a second each: workers continue for a moment when their driver is killed
    longer = (f"train.base={{epochs: {epochs}, milestones: []}}", "train.text.cache_views=1")
    first = _config(uri, tmp_path / "first", tiny_benchmark, *longer)
    arguments = [sys.executable, "-m", "cluster", "run", "--size", "tiny", *QUICK, *longer]
    arguments += [f"run.dir={tmp_path / 'first'}", f"data.root={tiny_benchmark}", f"cluster.storage={json.dumps(uri)}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    driver = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    stages, deadline = first.stages_path, time.monotonic() + 300
    while not any(stages.glob("base-*.partial/metrics.jsonl")):
        assert driver.poll() is None, driver.stderr.read()[-2000:] if driver.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill(driver, deadline=deadline)
    (metrics,) = stages.glob("base-*.partial/metrics.jsonl")
    before = metrics.read_text().splitlines()
    assert 1 <= len(before) < epochs
    shutil.rmtree(tmp_path / "first")

    uri, data = _copied(uri), _copied_folder(tiny_benchmark, tmp_path / "data")
    second = _config(uri, tmp_path / "second", data, *longer)
    outcome = run(second)
    assert outcome.made == tuple(stages_of(second)[1:])  # pixels were finished
    # The seconds that an epoch took are those of the machine that is gone: it was not trained again.
    after = (outcome.stages["base"] / "metrics.jsonl").read_text().splitlines()
    assert after[0] == before[0] and len(after) == epochs

    third = _config(uri, tmp_path / "third", data, *longer)
    assert run(third).made == ()
    assert _numbers(third.run.path) == _numbers(second.run.path)
    # A machine that only serves it fetches what it needs, and that does not pass for the run.
    fourth = _config(uri, tmp_path / "fourth", data, *longer)
    served = finished_run(fourth)
    models = (served.here(served.model), outcome.stages["text"] / "model")
    weights = [TVILFM.from_pretrained(model).state_dict() for model in models]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not fourth.stages_path.exists()
    assert run(fourth).made == ()
    assert (fourth.run.path / "metrics.jsonl").read_text() == (second.run.path / "metrics.jsonl").read_text()


# A driver on a head without room for work, and one machine that works and sees nothing of the driver's disk.
APART = """
import json, os, subprocess, sys, time
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from ray.cluster_utils import Cluster

from cluster.run import run
from tvilfm.config import Config

config, disk = Config.model_validate_json(sys.argv[1]), sys.argv[2]
nodes = Cluster()
nodes.add_node(num_cpus=0, include_dashboard=False)
join = [str(Path(sys.executable).parent / "ray"), "start", f"--address={nodes.address}", "--num-cpus=4", "--block"]
command = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', disk, *join]
worker = subprocess.Popen(command, stdout=subprocess.DEVNULL)
ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
while len([node for node in ray.nodes() if node["Alive"]]) < 2:
    assert worker.poll() is None
    time.sleep(0.2)


@ray.remote(num_cpus=1)
def seen():
    return os.listdir(disk)


(Path(disk) / "of-the-driver").touch()
assert ray.get(seen.remote()) == []
print(json.dumps(run(config).made), flush=True)
ray.shutdown()
worker.terminate()
worker.wait()
nodes.shutdown()
"""
MAY_UNSHARE = (
    shutil.which("unshare") is not None
    and subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0
)


@pytest.mark.long
@pytest.mark.skipif(not MAY_UNSHARE, reason="needs the right to mount: a machine with a disk of its own is made so")
def test_workers_on_a_machine_that_shares_no_disk_give_the_numbers_of_this_one(
    uri: str, tiny_benchmark: Path, undisturbed: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    apart = _config(uri, tmp_path / "disk" / "runs", tiny_benchmark)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    driver = subprocess.Popen(
        [sys.executable, "-c", APART, apart.model_dump_json(), str(tmp_path / "disk")],
        cwd=REPOSITORY,
        env={**plain, "PYTHONPATH": str(REPOSITORY), "RAY_BACKEND_LOG_LEVEL": "fatal"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, error = driver.communicate(timeout=400)
        assert driver.returncode == 0, error[-3000:]
    finally:
        kill_tree(driver)
    assert json.loads(out.splitlines()[-1]) == stages_of(apart)
    assert Results.read(apart.run.path / "results.json") == results_of(undisturbed, "joint")
