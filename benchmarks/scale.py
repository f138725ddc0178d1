"""`scale_efficiency`: images/s of captioning and feature extraction on n nodes over n times those on one.

Nodes are simulated on this machine (`ray.cluster_utils.Cluster`): real raylets, workers and transfers between object
stores, and a model that takes a fixed time a batch and no CPU, as a GPU would. What could spoil the scaling, and is
measured, is everything else: decoding, handing out, transfer, writing parts, the driver. All nodes share this
machine's cores, so the figure is a lower bound as far as CPU goes. The claim is the lower of the two jobs at `NODES`'
last. Beside it stand the same jobs with real networks at one and two workers on this machine, where on two cores the
second worker competes with decoding, the driver and Ray's servers.

A rate is taken over the time in which all workers work: from when the last has begun its second batch to when the
first has ended its last; starting Ray and loading models is paid once a job.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from benchmarks.claim import Claim
from benchmarks.gpu.captioning import CROP_HEIGHT, CROP_WIDTH, build_blip, crops
from tvilfm.config import CaptionerSection, CaptionSection, ClusterSection
from tvilfm.models import TVILFM, ModelSpec

NODES = (1, 2, 3, 4)
WORKERS = (1, 2)
BATCH, LATENCY_S, BATCHES_A_WORKER = 32, 0.5, 40
REAL_BATCHES_A_WORKER = 8
DIM = 2048  # of ResNet-50, whose vectors are the larger transfer
CROPS = 256  # different images; names repeat them
GOAL = 0.9
JOBS = ("captioning", "extraction")


def scale_efficiency() -> Claim:
    """Efficiency of both jobs on simulated nodes, and their rates with real networks on this machine."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder)
        simulated = {nodes: _measure(folder, nodes, simulated=True) for nodes in NODES}
        real = {workers: _measure(folder, workers, simulated=False) for workers in WORKERS}
    efficiencies = {job: _efficiency(simulated, job) for job in JOBS}
    shown = "; ".join(
        f"{job} {', '.join(f'{rates[job]:.0f}' for rates in simulated.values())} images/s on "
        f"{', '.join(map(str, NODES))} nodes ({100 * efficiencies[job]:.0f} %)"
        for job in JOBS
    )
    here = "; ".join(
        f"{job} {', '.join(f'{rates[job]:.1f}' for rates in real.values())} images/s with "
        f"{' and '.join(map(str, WORKERS))} workers ({100 * _efficiency(real, job):.0f} %)"
        for job in JOBS
    )
    ideal = BATCH / LATENCY_S
    return Claim(
        name="scale_efficiency",
        ratio=min(efficiencies.values()),
        goal=GOAL,
        ours=f"{shown}; real networks on {os.cpu_count()} cores: {here}",
        baseline=f"n times one node; {ideal:.0f} images/s a node is what a batch of {BATCH} in {LATENCY_S} s allows",
    )


def _efficiency(rates: dict[int, dict[str, float]], job: str) -> float:
    most = max(rates)
    return rates[most][job] / (most / min(rates) * rates[min(rates)][job])


def _prepare(folder: Path) -> None:
    build_blip("small").save(folder / "captioner")
    (folder / "images").mkdir()
    contents = crops(CROPS)
    for number in range(max(NODES) * BATCHES_A_WORKER * BATCH):
        (folder / "images" / f"{number:05d}.jpg").write_bytes(contents[number % CROPS])
    torch.manual_seed(0)
    spec = ModelSpec(backbone="resnet18_half", num_classes=4, text_width=32, text_layers=1, text_heads=2)
    TVILFM(spec).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    np.save(folder / "pixels.npy", rng.integers(0, 256, (CROPS, CROP_HEIGHT, CROP_WIDTH, 3), dtype=np.uint8))


def _measure(folder: Path, workers: int, *, simulated: bool) -> dict[str, float]:
    """Images/s of both jobs, in a driver and on a Ray of their own."""
    command = [sys.executable, "-m", "benchmarks.scale", str(folder), str(workers), "simulated" * simulated]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return rates


def _drive(folder: Path, workers: int, simulated: bool) -> dict[str, float]:
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logs = Path(tempfile.mkdtemp(dir=folder))
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"worker_process_setup_hook": _hook(str(logs), simulated)},
    }
    if simulated:
        nodes = Cluster()
        nodes.add_node(num_cpus=0, include_dashboard=False)
        for _ in range(workers):
            # As many CPUs as processes, or Ray would end an idle decoder and start another, at seconds of CPU each.
            nodes.add_node(num_cpus=4, num_gpus=1, include_dashboard=False, object_store_memory=200 * 1024**2)
        ray.init(address=nodes.address, **options)
    else:
        ray.init(address="local", num_cpus=2 * workers, include_dashboard=False, **options)
    batches = BATCHES_A_WORKER if simulated else REAL_BATCHES_A_WORKER
    section = ClusterSection(extract_workers=workers, gpus_per_worker=int(simulated))
    jobs: dict[str, Callable[[], None]] = {
        "captioning": lambda: _caption(folder, logs / "out", section, batches),
        "extraction": lambda: _extract(folder, section, batches),
    }
    rates = {}
    for name, job in jobs.items():
        job()
        rates[name] = _rate([json.loads(line) for path in logs.glob("*.jsonl") for line in path.open()], workers)
        for path in logs.glob("*.jsonl"):
            path.unlink()
    ray.shutdown()
    if simulated:
        nodes.shutdown()
    return rates


def _caption(folder: Path, out: Path, cluster: ClusterSection, batches: int) -> None:
    from cluster.session import session
    from cluster.tables.captioning import caption_images

    workers = cluster.extract_workers
    names = [f"{number:05d}.jpg" for number in range(workers * batches * BATCH)]
    captioner = CaptionerSection(model=str(folder / "captioner"), max_new_tokens=20)
    section = CaptionSection(visible=captioner, batch=BATCH, workers=workers)
    rows = pa.table({"image": names, "modality": ["visible"] * len(names)})
    with session(cluster):
        caption_images(rows, str(folder / "images"), str(out), section, cluster, seed=0)


def _extract(folder: Path, cluster: ClusterSection, batches: int) -> None:
    from cluster.progress import ProgressFile
    from cluster.session import session
    from cluster.stages.extraction import encode_chunks, image_chunks

    rows = [number % CROPS for number in range(cluster.extract_workers * batches * BATCH)]
    pool: dict[str, Any] = {"model": folder / "model", "pixels": folder / "pixels.npy", "pad": 0, "seed": 0}
    chunks = image_chunks("visible", rows, "visible", size=BATCH)
    with session(cluster):
        for _ in encode_chunks(chunks, section=cluster, progress=ProgressFile(folder / "progress.json"), **pool):
            pass


def _hook(logs: str, simulated: bool) -> Callable[[], None]:
    """Return what a worker process calls first: its models note their calls, and simulated ones only wait."""

    def noted(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, items: Any, *arguments: Any, **more: Any) -> Any:
            begun = time.time()
            answer = work(self, items, *arguments, **more)
            with open(f"{logs}/{os.getpid()}.jsonl", "a") as file:
                line = {"pid": os.getpid(), "begun": begun, "ended": time.time(), "images": len(answer)}
                file.write(json.dumps(line) + "\n")
            return answer

        return call

    return (lambda: _simulate(noted)) if simulated else (lambda: _observe(noted))


def _simulate(noted: Callable[..., Any]) -> None:
    """Replace the networks by ones that wait as long as a GPU would compute; torch is not imported."""

    class Captioner:
        input_size = (CROP_HEIGHT, CROP_WIDTH)
        provenance = {"model": "waits", "revision": "0", "prompt_hash": "0", "settings": "{}"}  # noqa: RUF012

        @classmethod
        def load(cls, section: Any, *, device: str, dtype: str) -> Captioner:
            return cls()

        @noted
        def caption(self, images: Any, *, seed: Any) -> list[str]:
            time.sleep(LATENCY_S * len(images) / BATCH)
            return ["a person in a coat"] * len(images)

    class Network:
        @classmethod
        def from_pretrained(cls, folder: Any) -> Network:
            return cls()

        def to(self, device: str) -> Network:
            return self

        def eval(self) -> Network:
            return self

    @noted
    def encode(network: Any, pixels: Any, modality: str) -> Any:
        time.sleep(LATENCY_S * len(pixels) / BATCH)
        return np.zeros((len(pixels), DIM), dtype=np.float32)

    parts: dict[str, dict[str, Any]] = {
        "tvilfm.captioning.captioner": {"Captioner": Captioner},
        "tvilfm.models": {"TVILFM": Network},
        "tvilfm.models.encode": {"encode_pixels": encode, "encode_texts": None},
    }
    for name, contents in parts.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)


def _observe(noted: Callable[..., Any]) -> None:
    import tvilfm.captioning.captioner
    import tvilfm.models.encode

    torch.set_num_threads(1)
    captioner = tvilfm.captioning.captioner.Captioner
    captioner.caption = noted(captioner.caption)  # type: ignore[method-assign]
    tvilfm.models.encode.encode_pixels = noted(tvilfm.models.encode.encode_pixels)


def _rate(calls: list[dict[str, float]], workers: int) -> float:
    """Images/s while all workers worked."""
    of_worker: dict[float, list[dict[str, float]]] = defaultdict(list)
    for call in sorted(calls, key=lambda call: call["begun"]):
        of_worker[call["pid"]].append(call)
    if len(of_worker) != workers:
        raise RuntimeError(f"expected {workers} workers at work, got {len(of_worker)}")
    first = max(calls[1]["begun"] for calls in of_worker.values())
    last = min(calls[-1]["ended"] for calls in of_worker.values())
    within = 0.0
    for call in calls:
        overlap = min(call["ended"], last) - max(call["begun"], first)
        within += call["images"] * max(0.0, overlap) / (call["ended"] - call["begun"])
    return within / (last - first)


CLAIMS = {"scale_efficiency": scale_efficiency}

if __name__ == "__main__":
    print(json.dumps(_drive(Path(sys.argv[1]), int(sys.argv[2]), bool(sys.argv[3]))))
