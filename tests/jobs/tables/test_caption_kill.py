"""Real kills of the captioning job: nothing is lost, nothing is there twice, one chunk an actor is done again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.tables.parts import Parts
from tests.paths import REPOSITORY

IMAGES, BATCH, CHUNKS_PER_WORKER = 96, 4, 4


def chunk_of(workers: int) -> int:
    """Images that an actor captions before it writes their part."""
    return IMAGES // (workers * CHUNKS_PER_WORKER)


# A job in a process of its own, on a Ray of its own, whose captioner writes down every picture it is given. The
# sentence names the picture's first pixel, so that a mix-up would show.
DRIVER = """
import json, os, sys, time

job = json.loads(sys.argv[1])


def replace_captioner():
    import types

    class Captioner:
        input_size = (16, 8)
        provenance = {"model": "counting", "revision": "0", "prompt_hash": "0", "settings": "{}"}

        @classmethod
        def load(cls, section, *, device, dtype):
            return cls()

        def caption(self, images, *, seed):
            import ray

            names = [int(image[0, 0, 0]) for image in images]
            node = ray.get_runtime_context().get_node_id()
            with open(job["log"], "a") as file:
                file.write(json.dumps({"pid": os.getpid(), "node": node, "images": names}) + "\\n")
            time.sleep(job["seconds"])
            return [f"number {name}" for name in names]

    module = types.ModuleType("tvilfm.captioning.captioner")
    module.Captioner = Captioner
    sys.modules[module.__name__] = module


if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    from cluster.tables import captioning
    from cluster.tables.images import list_images
    from tvilfm.config import CaptionSection, ClusterSection

    hook = {"worker_process_setup_hook": replace_captioner}
    options = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": hook}
    if job["nodes"] > 1:
        nodes = Cluster()
        for _ in range(job["nodes"]):
            node = nodes.add_node(num_cpus=2, include_dashboard=False)
            print(json.dumps({"node": node.node_id, "raylet": node.all_processes["raylet"][0].process.pid}), flush=True)
        ray.init(address=nodes.address, **options)
    else:
        ray.init(address="local", num_cpus=2, include_dashboard=False, **options)
    section = CaptionSection(batch=job["batch"], workers=job["workers"])
    rows = list_images(job["images"], "visible")
    captioning.CHUNKS_PER_WORKER = job["chunks"]
    summary = captioning.caption_images(rows, job["images"], job["out"], section, ClusterSection(), seed=0)
    print(json.dumps({"before": summary.before, "captioned": summary.captioned}), flush=True)
    ray.shutdown()
    if job["nodes"] > 1:
        nodes.shutdown()
"""


class Lab:
    """Images, an output folder, and runs of the job."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.log = folder, folder / "out", folder / "log.jsonl"
        self.drivers: list[subprocess.Popen[str]] = []
        (folder / "images").mkdir()
        for number in range(IMAGES):
            pixels = np.full((16, 8, 3), number, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{number:03d}.png")
        (folder / "driver.py").write_text(DRIVER)
        self.log.touch()

    def start(self, *, seconds: float, workers: int = 1, nodes: int = 1) -> subprocess.Popen[str]:
        job = {
            "images": str(self.folder / "images"),
            "out": str(self.out),
            "log": str(self.log),
            "seconds": seconds,
            "workers": workers,
            "nodes": nodes,
            "batch": BATCH,
            "chunks": CHUNKS_PER_WORKER,
        }
        driver = subprocess.Popen(
            [sys.executable, str(self.folder / "driver.py"), json.dumps(job)],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_BACKEND_LOG_LEVEL": "fatal"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.drivers.append(driver)
        return driver

    def calls(self) -> list[dict[str, Any]]:
        """What the captioner was given, call by call; a line that is being written is not there yet."""
        return [json.loads(line) for line in self.log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def num_captioned(self) -> int:
        return sum(len(call["images"]) for call in self.calls())

    def num_written(self) -> int:
        return len(Parts(str(self.out), "parts", "captions").done())

    def wait_for(self, condition: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert driver.poll() is None, driver.communicate()[1]
            assert time.monotonic() < deadline, "the job does not come on"
            time.sleep(0.05)

    def check_table(self) -> None:
        rows = pq.read_table(self.out / "captions.parquet").sort_by("image").to_pylist()
        found = [(row["image"], row["caption"]) for row in rows]
        assert found == [(f"{number:03d}.png", f"number {number}") for number in range(IMAGES)]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    for driver in lab.drivers:  # its Ray dies with it
        driver.kill()
        driver.communicate()


def finish(driver: subprocess.Popen[str]) -> dict[str, int]:
    out, err = driver.communicate(timeout=240)
    assert driver.returncode == 0, err
    return json.loads(next(line for line in out.splitlines() if "captioned" in line))


@pytest.mark.long
def test_after_every_kill_of_the_driver_the_next_run_captions_what_is_missing(lab: Lab) -> None:
    before, workers = 0, 2
    for kills, moment in enumerate((2 * BATCH, IMAGES - 4 * BATCH), start=1):  # early, late
        driver = lab.start(seconds=0.1, workers=workers)
        lab.wait_for(lambda moment=moment: lab.num_written() >= moment, driver)
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
        settled = -1
        while settled != (settled := lab.num_written() + lab.num_captioned()):  # its workers need a moment to die
            time.sleep(1.0)
        assert before < lab.num_written() < IMAGES
        assert lab.num_captioned() <= lab.num_written() + kills * workers * chunk_of(workers)
        before = lab.num_written()
        assert not (lab.out / "captions.parquet").exists()

    captioned = lab.num_captioned()
    assert finish(lab.start(seconds=0.0, workers=workers)) == {"before": before, "captioned": IMAGES - before}
    assert lab.num_captioned() - captioned == IMAGES - before
    lab.check_table()


@pytest.mark.long
def test_a_killed_actor_costs_the_chunk_under_way(lab: Lab) -> None:
    driver = lab.start(seconds=0.15)
    lab.wait_for(lambda: len(lab.calls()) >= 3, driver)
    os.kill(lab.calls()[-1]["pid"], signal.SIGKILL)
    assert finish(driver) == {"before": 0, "captioned": IMAGES}
    assert len({call["pid"] for call in lab.calls()}) == 2
    assert IMAGES <= lab.num_captioned() <= IMAGES + chunk_of(1)
    lab.check_table()


@pytest.mark.long
def test_a_killed_node_costs_its_chunk_under_way(lab: Lab) -> None:
    driver = lab.start(seconds=0.3, workers=2, nodes=2)
    assert driver.stdout is not None
    raylets = {node["node"]: node["raylet"] for node in (json.loads(driver.stdout.readline()) for _ in range(2))}
    head, second = raylets
    lab.wait_for(lambda: {call["node"] for call in lab.calls()} == {head, second}, driver)
    os.kill(raylets[second], signal.SIGKILL)
    killed = len(lab.calls())
    assert finish(driver) == {"before": 0, "captioned": IMAGES}
    # An orphaned actor needs a moment to die, in which it may end its chunk and begin one more.
    late = [call for call in lab.calls()[killed:] if call["node"] == second]
    assert len(late) <= 2 * chunk_of(2) // BATCH
    assert IMAGES <= lab.num_captioned() <= IMAGES + 2 * chunk_of(2)
    lab.check_table()
