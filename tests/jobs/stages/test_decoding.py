"""Decoding is cut into blocks: each is a task of its own, on any CPU, and is repeated if its worker is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray

from cluster.stages import pixels
from tvilfm.config import DataSection
from tvilfm.data.pixels import decode_files, open_pixels
from tvilfm.datasets import read_dataset


@pytest.mark.parametrize(("block", "lost"), [(1000, 0), (10, 0), (10, 1)])
def test_every_block_is_a_task_and_a_lost_worker_costs_its_block(
    block: int, lost: int, tiny_benchmark: Path, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest: pa.Table = read_dataset("synthetic", tiny_benchmark)
    decode = pixels._decode
    tasks = tmp_path / "tasks"
    tasks.mkdir()

    def noted(batch: dict[str, object], **options: object) -> dict[str, object]:
        task = ray.get_runtime_context().get_task_id()
        (tasks / f"{task}-{os.getpid()}").touch()  # a task that is repeated runs in another process
        if lost and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(batch, **options)

    monkeypatch.setattr(pixels, "BLOCK_IMAGES", block)
    monkeypatch.setattr(pixels, "_decode", noted)
    section = DataSection(height=24, width=12, decode_batch=5)
    pixels.decode_dataset(tmp_path, tiny_benchmark, manifest, section)
    assert len(list(tasks.iterdir())) == -(-manifest.num_rows // block) + lost
    expected = decode_files(tiny_benchmark, manifest["image"].to_pylist(), height=24, width=12)
    np.testing.assert_array_equal(open_pixels(tmp_path / "pixels.npy"), expected)
