"""Training on Ray Train: two workers are one worker."""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray.train
import torch

from cluster.stages.base import fit_base
from cluster.stages.learning import read_records
from cluster.stages.pixels import decode_dataset
from cluster.stages.text import fit_text
from cluster.stages.trainer import Reporter, WorkerInputError, _Epochs, bring, fit
from tvilfm.config import ClusterSection, Config, load_config
from tvilfm.datasets import read_dataset
from tvilfm.datasets.caption_files import read_published
from tvilfm.datasets.synthetic.layouts import Size, write_sysu_layout
from tvilfm.models import TVILFM

# 8 identities x 4 visible images and batches of 4 x 2: int(32 / 8) + 1 = 5 steps an epoch.
# The paper's warm-up: at a full rate Adam turns rounding in near-zero gradients into whole steps of either sign;
# tests/unit/training/test_distributed.py shows, in float64, that the gradients themselves are equal.
OVERRIDES = (
    "train.base={epochs: 1, warmup_epochs: 10, select: last}",
    "train.text={epochs: 1, warmup_epochs: 10, select: last, cache_views: 0}",
    "optim={lr: 3.5e-4, text_lr: 3.5e-4}",
    "model.weights=random",
    "cluster.cpus_per_train_worker=1",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("train")
    write_sysu_layout(folder / "data", Size(train=8, val=2, test=2, images_per_camera=1), seed=3)
    manifest = read_dataset("synthetic", folder / "data")
    (folder / "pixels").mkdir()
    decode_dataset(folder / "pixels", folder / "data", manifest, load_config(Path("ray_config.yaml"), size="tiny").data)
    pq.write_table(read_published(folder / "data", manifest), folder / "captions.parquet")
    return {"pixels": str(folder / "pixels"), "captions": str(folder / "captions.parquet")}


def _fit(stage: str, folder: Path, inputs: dict[str, str], *overrides: str) -> tuple[TVILFM, dict[str, float]]:
    config: Config = load_config(Path("ray_config.yaml"), [*OVERRIDES, *overrides], size="tiny")
    folder.mkdir()
    {"base": fit_base, "text": fit_text}[stage](folder, config, inputs)
    record = json.loads((folder / "metrics.jsonl").read_text())
    return TVILFM.from_pretrained(folder / "model"), record


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (ValueError("train.p: expected at most 3, got 8. Lower p."), True),
        (OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"), True),
        (OSError("[Errno 5] Input/output error"), False),
        (RuntimeError("a lost machine"), False),
    ],
)
def test_errors_that_a_restart_would_meet_again_are_those_of_the_input_and_of_full_disks(
    tmp_path: Path, error: Exception, ends: bool
) -> None:
    message = pytest.raises(WorkerInputError, match=f"^{re.escape(str(error))}$") if ends else nullcontext()
    with message:
        _Epochs(tmp_path / "metrics.jsonl").after_exception(None, {1: error})


@pytest.mark.slow
def test_a_workers_bad_input_ends_the_run_at_once(ray_session: None, tmp_path: Path) -> None:
    error, rank = FloatingPointError("epoch 1: not finite"), 1

    def fails(job: dict[str, Any]) -> None:  # inside, so that workers need not import this file
        rank = ray.train.get_context().get_world_rank()
        with (Path(job["folder"]) / "attempts").open("a") as file:
            file.write(f"{rank}\n")
        if rank == job["rank"]:
            raise job["error"]
        time.sleep(600)  # another worker waits for a gradient that does not come

    section = ClusterSection(cpus_per_train_worker=1, max_failures=3)
    job = {"folder": str(tmp_path), "error": error, "rank": rank}
    with pytest.raises(ValueError, match=f"^{re.escape(str(error))}$"):
        fit(fails, job, tmp_path, section, workers=rank + 1, depot=None)
    assert len((tmp_path / "attempts").read_text().split()) <= rank + 1


@pytest.mark.slow
def test_epochs_follow_while_a_checkpoint_is_written_and_checkpoints_count_in_their_order(
    ray_session: None, tmp_path: Path
) -> None:
    def trains(job: dict[str, Any]) -> list[Any]:  # inside, so that workers need not import this file
        reporter, followed, written = Reporter(Path(job["folder"]), 4, None), threading.Event(), []

        def write(folder: Path, epoch: int) -> None:
            assert followed.wait(60), "no epoch follows before the checkpoint is written"
            written.append(epoch)
            (folder / "epoch").write_text(str(epoch))

        for epoch in range(4):
            reporter.on_epoch({"epoch": epoch, "written": list(written)}, partial(write, epoch=epoch))
            followed.set()
        reporter.wait()
        assert written == [0, 1, 2, 3]
        return reporter.records

    job = {"folder": str(tmp_path)}
    records, last = fit(trains, job, tmp_path, ClusterSection(max_failures=0), workers=1, depot=None)
    assert records[0]["written"] == [] and read_records(tmp_path / "metrics.jsonl") == records
    assert [len(record["written"]) >= record["epoch"] - 1 for record in records] == [True] * 4  # at most two in memory
    bring(last, "epoch", tmp_path / "epoch")
    bring(last, "metrics.jsonl", tmp_path / "of-the-last.jsonl")
    assert (tmp_path / "epoch").read_text() == "3" and read_records(tmp_path / "of-the-last.jsonl") == records


@pytest.mark.long
@pytest.mark.timeout(400)
def test_two_workers_give_the_losses_and_weights_of_one(
    inputs: dict[str, str], ray_session: None, tmp_path: Path
) -> None:
    one, one_record = _fit("base", tmp_path / "one", inputs)
    two, two_record = _fit("base", tmp_path / "two", inputs, "cluster.train_workers=2")
    _assert_equal(one, two, one_record, two_record)

    one_text, one_record = _fit("text", tmp_path / "one-text", {**inputs, "base": str(tmp_path / "one")})
    two_text, two_record = _fit(
        "text", tmp_path / "two-text", {**inputs, "base": str(tmp_path / "one")}, "cluster.train_workers=2"
    )
    _assert_equal(one_text, two_text, one_record, two_record)
    moved = [not torch.equal(value, one.state_dict()[key]) for key, value in one_text.state_dict().items()
             if key.startswith("head.")]  # fmt: skip
    assert any(moved)


def _assert_equal(one: TVILFM, two: TVILFM, one_record: dict[str, float], two_record: dict[str, float]) -> None:
    for term in ("id", "wrt"):
        assert two_record[term] == pytest.approx(one_record[term], abs=1e-5)
    state = two.state_dict()
    for name, value in one.state_dict().items():
        other = state[name]
        if name.endswith("in_proj_bias"):
            # A key bias shifts a row's attention scores alike: its gradient is zero but for rounding, which Adam
            # scales up to whole steps. It changes no output; queries' and values' biases are compared.
            value, other = (torch.cat([v.chunk(3)[0], v.chunk(3)[2]]) for v in (value, other))
        torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
