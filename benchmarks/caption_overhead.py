"""`caption_overhead`: images/s of the captioning job against a plain batched loop on the same core.

All of the job's workers (the one captioning actor, the decoding tasks, Ray's helper actors) share the core that the
plain loop, which reads, decodes and captions, has for itself; driver and Ray's servers run on the machine's other
cores, as on a cluster. The captioner is BLIP's architecture with random weights and 1 % of the work of the paper's
BLIP-large, so that the share of everything else is far larger than in earnest. Rates are taken between the first part
that the job writes and its last: the start of Ray and of the actor (ten seconds) is left out, as it is paid once a
job. The ten chunks or so that are decoded meanwhile flatter the job by 1 %.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from benchmarks.claim import Claim
from benchmarks.gpu.captioning import build_blip, crops
from cluster.session import session
from cluster.tables.captioning import caption_images
from tvilfm.captioning.captioner import Captioner
from tvilfm.config import CaptionerSection, CaptionSection, ClusterSection
from tvilfm.data.pixels import decode_files

IMAGES, BATCH, TOKENS = 1280, 32, 20
PLAIN_IMAGES, SINGLE_IMAGES = 320, 32


def caption_overhead() -> Claim:
    """Images/s three ways: the job, the plain loop before and after it, and one image at a time."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _measure(Path(folder), core=max(cores), others=cores - {max(cores)} or cores)
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores)


def _measure(folder: Path, core: int, others: set[int]) -> Claim:
    captioner = build_blip("small")
    captioner.save(folder / "captioner")
    (folder / "images").mkdir()
    names = [f"{number:05d}.jpg" for number in range(IMAGES)]
    for name, content in zip(names, crops(IMAGES), strict=True):
        (folder / "images" / name).write_bytes(content)
    size = captioner.input_size
    assert size is not None

    os.sched_setaffinity(0, {core})
    _plain(captioner, folder / "images", names[: 2 * BATCH], size, BATCH)
    single = _plain(captioner, folder / "images", names[:SINGLE_IMAGES], size, 1)
    before = _plain(captioner, folder / "images", names[:PLAIN_IMAGES], size, BATCH)
    os.sched_setaffinity(0, others)
    job = _job(folder, names, core)
    os.sched_setaffinity(0, {core})
    after = _plain(captioner, folder / "images", names[:PLAIN_IMAGES], size, BATCH)
    plain = statistics.mean([before, after])
    return Claim(
        name="caption_overhead",
        ratio=job / plain,
        goal=0.9,
        ours=f"{job:.1f} images/s (job, one actor, one core), {job / single:.1f} times one image at a time",
        baseline=f"{plain:.1f} images/s (plain loop, batches of {BATCH}); {single:.1f} one at a time",
    )


def _plain(captioner: Captioner, root: Path, names: Sequence[str], size: tuple[int, int], batch: int) -> float:
    started = time.perf_counter()
    for start in range(0, len(names), batch):
        pictures = decode_files(root, names[start : start + batch], height=size[0], width=size[1])
        captioner.caption(list(pictures))
    return len(names) / (time.perf_counter() - started)


def _job(folder: Path, names: Sequence[str], core: int) -> float:
    def pin() -> None:
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.sched_setaffinity(int(thread), {core})

    captioner = CaptionerSection(model=str(folder / "captioner"), max_new_tokens=TOKENS)
    section = CaptionSection(visible=captioner, batch=BATCH)
    rows = pa.table({"image": names, "modality": ["visible"] * len(names)})
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray.init(address="local", runtime_env={"worker_process_setup_hook": pin}, **options)
    try:
        with session(ClusterSection()):
            caption_images(rows, str(folder / "images"), str(folder / "out"), section, ClusterSection(), seed=0)
    finally:
        ray.shutdown()
    times = np.unique(pq.read_table(folder / "out" / "captions.parquet")["time"].to_numpy())
    return BATCH * (len(times) - 1) / float((times[-1] - times[0]) / np.timedelta64(1, "s"))


CLAIMS = {"caption_overhead": caption_overhead}
