"""Fine-tuning captioners on Ray Train: the plain loop's weights, whatever is killed, in a folder that loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cluster.cli.app import main
from cluster.stages.captioner_training import fit_captioner
from cluster.stages.pixels import decode_dataset
from tests.processes import kill
from tvilfm.captioning.captioner import Captioner
from tvilfm.captioning.colors import find_colors
from tvilfm.captioning.conv_captioner import build_conv_captioner
from tvilfm.captioning.finetune import caption_pairs, finetune
from tvilfm.captioning.scores import Marks
from tvilfm.config import CaptionerSection, Config, load_config
from tvilfm.data.pixels import open_pixels
from tvilfm.datasets import read_dataset
from tvilfm.datasets.caption_files import read_published
from tvilfm.datasets.synthetic.layouts import Size, write_sysu_layout

EPOCHS = 40  # so that the kill falls between two of them: one takes 0.1 s, and the kill about as long
OVERRIDES = (
    "caption.visible={model: conv, max_new_tokens: 12}",
    "caption.infrared={model: conv, max_new_tokens: 12}",
    f"caption.train={{epochs: {EPOCHS}, batch: 8, lr: 1.0e-3, warmup_steps: 2}}",
    "cluster.cpus_per_train_worker=1",
)


def _config(folder: Path, *overrides: str) -> Config:
    settings = [*OVERRIDES, f"run.dir={folder}", f"data.root={folder / 'data'}", *overrides]
    return load_config(Path("ray_config.yaml"), settings, size="tiny")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Path, dict[str, str]]:
    """A dataset, and what a captioner's training reads of it."""
    folder = tmp_path_factory.mktemp("caption-train")
    write_sysu_layout(folder / "data", Size(train=4, val=2, test=2, images_per_camera=1), seed=3)
    manifest = read_dataset("synthetic", folder / "data")
    (folder / "pixels").mkdir()
    decode_dataset(folder / "pixels", folder / "data", manifest, _config(folder).data)
    pq.write_table(read_published(folder / "data", manifest), folder / "captions.parquet")
    paths = {"pixels": "pixels", "captions": "captions.parquet", "truth": "data"}
    return folder, {name: str(folder / path) for name, path in paths.items()}


class _Silence:
    def on_step(self, record: dict[str, float | int]) -> None: ...

    def on_epoch(self, record: dict[str, float | int], write: object) -> None: ...


@pytest.fixture(scope="module")
def plain(lab: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    """The visible captioner of the plain loop, without Ray."""
    folder, inputs = lab
    config, start = _config(folder), tmp_path_factory.mktemp("plain") / "start"
    pairs = caption_pairs(
        pq.read_table(Path(inputs["pixels"]) / "manifest.parquet"),
        pq.read_table(inputs["captions"]),
        open_pixels(Path(inputs["pixels"]) / "pixels.npy"),
        modality="visible",
        split="train",
        infrared_pairs="infrared",
    )
    build_conv_captioner(start, pairs.texts, height=config.data.height, width=config.data.width, seed=config.run.seed)
    captioner = Captioner.load(config.caption.visible.model_copy(update={"model": str(start)}))
    finetune(captioner, pairs, config.caption.train, seed=config.run.seed, listener=_Silence())
    return captioner


# A training whose driver can be killed, in a process of its own on a Ray of its own.
DRIVER = """
import json, sys
from pathlib import Path
from cluster.stages.captioner_training import fit_captioner
from cluster.session import session
from tvilfm.config import Config
config, folder, inputs = Config.model_validate_json(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
with session(config.cluster):
    fit_captioner(folder, config, "visible", inputs)
"""


@pytest.mark.long
def test_killed_between_epochs_it_goes_on_and_ends_with_the_weights_of_the_plain_loop(
    lab: tuple[Path, dict[str, str]], plain: Captioner, tmp_path: Path
) -> None:
    folder, inputs = lab
    config = _config(folder)
    arguments = [sys.executable, "-c", DRIVER, config.model_dump_json(), str(tmp_path), json.dumps(inputs)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    driver = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (tmp_path / "train" / "checkpoint_manager_snapshot.json").exists():
        assert driver.poll() is None, driver.stderr.read()[-2000:] if driver.stderr else ""
        assert time.monotonic() < deadline, "no checkpoint was ever noted"
        time.sleep(0.01)
    kill(driver, deadline=deadline)
    before = metrics.read_text().splitlines()
    assert len(before) < EPOCHS and not (tmp_path / "captioner").exists()
    fit_captioner(tmp_path, config, "visible", inputs)
    state = Captioner.load(CaptionerSection(model=str(tmp_path / "captioner"))).model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.model.state_dict().items())
    after = metrics.read_text().splitlines()
    # Epochs that the kill left a checkpoint of were not done again: their seconds are those of the first attempt.
    assert after[0] == before[0]
    records = [json.loads(line) for line in after]
    assert [record["epoch"] for record in records] == list(range(EPOCHS))
    marks = Marks.read(tmp_path / "marks.json")
    assert marks.pictures == 2 * 4 and 0 < marks.loss < records[0]["loss"]
    assert {"top_colour", "garments"} <= marks.attributes.keys()


@pytest.mark.long
def test_the_command_trains_once_on_two_workers_and_prints_the_marks(
    lab: tuple[Path, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = lab
    overrides = [
        *OVERRIDES,
        f"run.dir={tmp_path}",
        f"data.root={folder / 'data'}",
        "caption.train.infrared_pairs=gray",
        "caption.train.epochs=3",
        "cluster.train_workers=2",
    ]
    command = ["tvilfm", "caption-train", "--modality", "infrared", "--size", "tiny", *overrides]
    printed = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            main()
        printed.append(capsys.readouterr())
        assert not end.value.code, printed[-1].err
    assert "captioner_infrared: done in" in printed[0].err and "done in" not in printed[1].err
    assert printed[0].out == printed[1].out and "BLEU-4" in printed[0].out
    assert "0.0% of sentences with a colour word" in printed[0].out and "top colour" not in printed[0].out
    (found,) = (tmp_path / "tiny" / "stages").glob("captioner_infrared-*/captioner")
    assert str(found) in printed[0].out
    (sentence,) = Captioner.load(CaptionerSection(model=str(found))).caption([np.zeros((48, 24, 3), dtype=np.uint8)])
    assert sentence and not find_colors(sentence)
