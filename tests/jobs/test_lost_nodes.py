"""Nodes that go for good while a job runs: it ends with the numbers of the undisturbed one.

Several nodes on this machine (`ray.cluster_utils.Cluster`): each has a raylet and workers of its own, and loses all of
them at once. Captioning with a lost node: tests/jobs/tables/test_caption_kill.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cluster.stages.base import fit_base
from cluster.stages.pixels import decode_dataset
from tests.paths import REPOSITORY
from tests.processes import alive, command_line, descendants, kill_all, kill_tree
from tests.quick import QUICK, copy_stages, records_of, space_of
from tvilfm.config import Config, load_config
from tvilfm.data.pixels import decode_files, open_pixels
from tvilfm.datasets import read_dataset
from tvilfm.datasets.caption_files import read_published
from tvilfm.datasets.synthetic.layouts import Size, write_sysu_layout
from tvilfm.models import TVILFM

EPOCHS = 4
OVERRIDES = (
    f"train.base={{epochs: {EPOCHS}, warmup_epochs: 1, milestones: [2], eval_every: 1}}",
    "model.weights=random",
    "cluster.cpus_per_train_worker=1",
    "cluster.train_workers=2",
)
# A driver with a cluster of its own. Its head has no room for work, so that what is lost is never the driver's node.
NODES = """
import json, os, sys
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from ray.cluster_utils import Cluster

job = json.loads(sys.argv[1])
nodes = Cluster()
nodes.add_node(num_cpus=0, memory=100 * 2**20, include_dashboard=False)
for _ in range(job["nodes"]):
    node = nodes.add_node(num_cpus=job["cpus"], include_dashboard=False)
    print(node.all_processes["raylet"][0].process.pid, flush=True)
ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
"""
FIT = """
from cluster.stages.base import fit_base
from tvilfm.config import Config

fit_base(Path(job["folder"]), Config.model_validate(job["config"]), job["inputs"])
"""
# Every node decodes three blocks and then waits in its next one until the test has lost a node.
DECODE = """
import time

from cluster.stages import pixels
from tvilfm.config import DataSection
from tvilfm.datasets import read_dataset

folder, root, decode = Path(job["folder"]), Path(job["root"]), pixels._decode


def noted(batch, **options):
    of_node = folder / f"raylet-{os.getppid()}"
    with of_node.open("a") as file:
        file.write(f"{batch['row'][0]}\\n")
    while len(of_node.read_text().split()) > 3 and not (folder / "lost").exists():
        time.sleep(0.02)
    return decode(batch, **options)


pixels._decode, pixels.BLOCK_IMAGES = noted, job["block"]
section = DataSection(height=job["height"], width=job["width"], decode_batch=job["block"])
pixels.decode_dataset(folder, root, read_dataset("synthetic", root), section)
"""
SWEEP = """
from cluster.sweep import sweep_space
from tvilfm.sweeps.space import Space

sweep_space(
    Space.model_validate(job["space"]), name="rows", config_path=Path("ray_config.yaml"), overrides=job["overrides"],
    size="tiny",
)
"""
END = """
ray.shutdown()
nodes.shutdown()
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Drivers that are gone, with all that they started, after the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        kill_tree(process)
        process.communicate()


def lose(raylet: int) -> None:
    """A machine goes: its raylet and every process that it started, at once."""
    lost = [raylet, *descendants(raylet)]
    kill_all(lost)
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in lost):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def named(raylet: int, title: bytes) -> bool:
    """Whether a node runs a process of that title."""
    return any(command_line(pid).startswith(title) for pid in descendants(raylet))


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def start(
    body: str, job: dict[str, Any], processes: list[subprocess.Popen[str]], *, nodes: int, cpus: int
) -> tuple[subprocess.Popen[str], list[int]]:
    """A driver that does something on a cluster of its own, and the raylets of the nodes below its head."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    driver = subprocess.Popen(
        [sys.executable, "-c", NODES + body + END, json.dumps({**job, "nodes": nodes, "cpus": cpus})],
        cwd=REPOSITORY,
        env={**plain, "PYTHONPATH": str(REPOSITORY), "RAY_BACKEND_LOG_LEVEL": "fatal"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    processes.append(driver)
    assert driver.stdout is not None
    return driver, [int(driver.stdout.readline()) for _ in range(nodes)]


def _config(*overrides: str) -> Config:
    return load_config(Path("ray_config.yaml"), [*OVERRIDES, *overrides], size="tiny")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("lost-nodes")
    write_sysu_layout(folder / "data", Size(train=8, val=2, test=2, images_per_camera=1), seed=3)
    manifest = read_dataset("synthetic", folder / "data")
    (folder / "pixels").mkdir()
    decode_dataset(folder / "pixels", folder / "data", manifest, _config().data)
    pq.write_table(read_published(folder / "data", manifest), folder / "captions.parquet")
    return {"pixels": str(folder / "pixels"), "captions": str(folder / "captions.parquet")}


@pytest.mark.long
def test_a_node_lost_in_training_costs_no_epoch_and_no_number(
    inputs: dict[str, str], processes: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    lost, undisturbed = tmp_path / "lost", tmp_path / "undisturbed"
    undisturbed.mkdir()
    lost.mkdir()
    fit_base(undisturbed, _config(), inputs)

    job = {"config": _config().model_dump(mode="json"), "folder": str(lost), "inputs": inputs}
    # One node more than workers: the lost one's work has a place to go.
    driver, raylets = start(FIT, job, processes, nodes=3, cpus=1)
    noted, metrics = lost / "train" / "checkpoint_manager_snapshot.json", lost / "metrics.jsonl"
    wait_for(lambda: noted.exists() and metrics.exists(), driver, "no checkpoint was ever noted")
    before = metrics.read_text().splitlines()
    busy = [raylet for raylet in raylets if named(raylet, b"ray::RayTrainWorker")]
    assert len(busy) == 2 and 1 <= len(before) < EPOCHS
    lose(busy[0])
    _, error = driver.communicate(timeout=400)
    assert driver.returncode == 0, error

    ours, theirs = (TVILFM.from_pretrained(folder / "model").state_dict() for folder in (lost, undisturbed))
    assert [name for name, value in theirs.items() if not torch.equal(value, ours[name])] == []
    assert records(lost) == records(undisturbed)
    # What the loss left a checkpoint of was not trained again.
    assert (lost / "metrics.jsonl").read_text().splitlines()[0] == before[0]


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(EPOCHS))
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


@pytest.mark.long
def test_a_node_lost_in_decoding_costs_its_blocks_only(
    tiny_benchmark: Path, processes: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    block, height, width = 4, 128, 64  # a block above 100 KB is kept in the store of its node, and lost with it
    job = {"folder": str(tmp_path), "root": str(tiny_benchmark), "block": block, "height": height, "width": width}
    driver, raylets = start(DECODE, job, processes, nodes=2, cpus=1)

    def blocks(raylet: int) -> list[int]:
        file = tmp_path / f"raylet-{raylet}"
        return [int(row) for row in file.read_text().split()] if file.exists() else []

    wait_for(lambda: all(len(blocks(raylet)) > 3 for raylet in raylets), driver, "a node decodes nothing")
    kept, lost = raylets
    lose(lost)
    (tmp_path / "lost").touch()
    _, error = driver.communicate(timeout=400)
    assert driver.returncode == 0, error

    manifest = read_dataset("synthetic", tiny_benchmark)
    expected = decode_files(tiny_benchmark, manifest["image"].to_pylist(), height=height, width=width)
    np.testing.assert_array_equal(open_pixels(tmp_path / "pixels.npy"), expected)
    assert set(blocks(kept)) | set(blocks(lost)) == set(range(0, manifest.num_rows, block))
    # The block under way is decoded again, and at most those whose pixels the driver had not read; no other is.
    again = [row for row, count in Counter(blocks(kept) + blocks(lost)).items() if count > 1]
    assert blocks(lost)[-1] in again and set(again) <= set(blocks(lost))
    assert len(blocks(kept)) == len(set(blocks(kept)))


@pytest.mark.long
def test_a_node_lost_in_a_sweep_leaves_its_table_as_it_is(
    undisturbed: Path, tiny_benchmark: Path, processes: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    stages = tmp_path / "rows" / "stages"
    copy_stages(undisturbed, stages)
    overrides = [*QUICK, f"data.root={tiny_benchmark}", f"run.dir={tmp_path}"]
    job = {"space": space_of("joint", "not joint"), "overrides": overrides}
    driver, raylets = start(SWEEP, job, processes, nodes=2, cpus=2)
    wait_for(lambda: any(stages.glob("text-*.partial/train/checkpoint_manager_snapshot.json")), driver, "no checkpoint")
    (busy,) = (raylet for raylet in raylets if named(raylet, b"ray::ImplicitFunc"))  # the trial's own process
    lose(busy)
    _, error = driver.communicate(timeout=500)
    assert driver.returncode == 0, error
    before, after = (records_of(folder) for folder in (undisturbed, tmp_path / "rows"))
    assert {setting: record.metrics for setting, record in after.items()} == {
        setting: before[setting].metrics for setting in ("joint", "not joint")
    }
    assert {record.status for record in after.values()} == {"done"}
