"""`python -m benchmarks.gpu.steps`: what a training step costs, and how much of that time the GPU computes.

Random weights, images and captions, as speed does not depend on them: SYSU-MM01's number of people, the paper's network
and batch. Three kinds of step: the base stage, the text stage from cached features, and the text stage from pixels (the
paper's recipe). For each kind and precision:

* `loop_ms`: the training loop as it is, with batches prepared from the dataset;
* `step_ms`: the same loop with one batch that is ready in memory, so only its copy and the step remain;
* `device_ms` and `kernels`: sum of the kernels' times, and their number, in one step (operations on a CPU).

`--tiny` runs on a CPU in seconds. No Ray.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.profiler import ProfilerActivity, profile

from tvilfm.config import Config, load_config
from tvilfm.data.manifest import CAPTION_SCHEMA, build_manifest
from tvilfm.data.tri_modal import RECIPES, Batch, TrainingRows, TriModalDataset
from tvilfm.models import TVILFM, spec_from_config
from tvilfm.training.loop import StageSettings, train_stage
from tvilfm.training.stages import StageData, train_base, train_text

RESULTS = Path(__file__).parent.parent / "results"
CAMERAS = {"visible": (1, 2, 4, 5), "infrared": (3, 6)}
WORDS = np.array(
    [
        "a",
        "man",
        "woman",
        "wearing",
        "black",
        "white",
        "gray",
        "red",
        "blue",
        "jacket",
        "shirt",
        "trousers",
        "shorts",
        "carrying",
        "backpack",
        "in",
        "hallway",
    ]
)
KINDS = ("base", "text, cached features", "text, pixels")


@dataclass(frozen=True)
class Setting:
    """Size of a measurement: people, images per modality and person, image size, steps, and keys of the config."""

    people: int
    images: int
    height: int
    width: int
    steps: int
    overrides: tuple[str, ...] = ()


PAPER = Setting(people=395, images=12, height=288, width=144, steps=150)
TINY = Setting(
    people=6,
    images=4,
    height=48,
    width=24,
    steps=3,
    overrides=(
        *("model.backbone=resnet18_half", "model.text.width=32", "model.text.layers=1", "model.text.heads=2"),
        *("train.p=3", "train.k=2"),
    ),
)


class _Rate:
    """Listener that keeps the steps per second of the last epoch."""

    def __init__(self) -> None:
        self.steps_per_s = 0.0

    def on_step(self, record: Mapping[str, float | int]) -> None:
        self.steps_per_s = record["steps_per_s"]

    def on_epoch(self, record: Mapping[str, float | int], write: object) -> None:
        pass


class _Again:
    """Sampler and dataset of one batch, again and again."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self._batch, self._steps = batch, steps

    def set_epoch(self, epoch: int) -> None:
        pass

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._steps))

    def __getitem__(self, index: int) -> Batch:
        return self._batch


class _Lab:
    """The data of a setting, and the three kinds of step on it."""

    def __init__(self, setting: Setting, folder: Path, device: torch.device) -> None:
        self._setting, self._device = setting, device
        rng = np.random.default_rng(0)
        rows = [
            {
                "image": f"cam{cameras[number % len(cameras)]}/{pid:04d}/{number:04d}.jpg",
                "pid": pid,
                "camid": cameras[number % len(cameras)],
                "modality": modality,
                "split": "train",
            }
            for modality, cameras in CAMERAS.items()
            for pid in range(1, setting.people + 1)
            for number in range(setting.images)
        ]
        captions = [
            {"image": row["image"], "caption": _words(rng), "rephrased": _words(rng), "captioner": "", "revision": ""}
            for row in rows
        ]
        path = folder / "pixels.npy"
        shape = (len(rows), setting.height, setting.width, 3)
        pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        for row in range(len(rows)):
            pixels[row] = rng.integers(0, 256, pixels.shape[1:], dtype=np.uint8)
        pixels.flush()
        self._data = StageData(
            manifest=build_manifest(rows),
            pixels=np.load(path, mmap_mode="r"),
            captions=pa.Table.from_pylist(captions, schema=CAPTION_SCHEMA),
        )
        self._rows = TrainingRows.from_manifest(self._data.manifest, use_val=True)

    def measure(self, kind: str, autocast: str) -> dict[str, Any]:
        """Return one record of the results."""
        config = self._config(f"train.autocast={autocast}")
        loop, ready = _Rate(), _Rate()
        self._loop(kind, config, loop)
        self._ready(kind, config, ready, self._setting.steps)
        short, long = (self._kernels(kind, config, steps) for steps in (3, 6))
        return {
            "kind": kind,
            "autocast": autocast,
            "loop_ms": round(1000 / loop.steps_per_s, 2),
            "step_ms": round(1000 / ready.steps_per_s, 2),
            "device_ms": round((long[0] - short[0]) / 3, 2),
            "kernels": round((long[1] - short[1]) / 3),
        }

    def _config(self, *overrides: str) -> Config:
        size = (f"data.height={self._setting.height}", f"data.width={self._setting.width}")
        schedule = [f"train.{stage}.{key}" for stage in ("base", "text") for key in ("epochs=2", "select=last")]
        weights = ("model.weights=random", "model.text.weights=random", "data.name=sysu_mm01", "data.root=.")
        return load_config(None, [*size, *schedule, *weights, *self._setting.overrides, *overrides])

    def _model(self, config: Config) -> TVILFM:
        return TVILFM(spec_from_config(config.model, self._rows.num_classes, with_text=False))

    def _views(self, config: Config) -> dict[Any, Any]:
        dim, rng = self._model(config).spec.dim, np.random.default_rng(1)
        count = {"visible": self._rows.visible.num_rows, "infrared": self._rows.infrared.num_rows}
        return {
            recipe: rng.standard_normal((2, count[recipe.removesuffix("_augmented")], dim), dtype=np.float32)
            for recipe in RECIPES
        }

    def _loop(self, kind: str, config: Config, rate: _Rate) -> None:
        if kind == "base":
            train_base(config, self._data, backbone=None, device=self._device, listener=rate)
        else:
            views = self._views(config) if "cached" in kind else None
            model = self._model(config)
            train_text(config, self._data, base=model, views=views, device=self._device, listener=rate)

    def _ready(self, kind: str, config: Config, rate: _Rate, steps: int) -> None:
        """Train on one batch that is prepared before, for two epochs."""
        text = None if kind == "base" else config.train.text
        model = self._model(config)
        if text is not None:
            model.start_text_stage(config.model.text, train_pool=config.trains_gem)
        dataset = TriModalDataset(
            self._rows,
            self._data.manifest,
            self._data.pixels,
            pad=config.data.pad,
            seed=0,
            captions=None if text is None else self._data.captions,
            llm_probability=0.0 if text is None else text.llm_probability,
            views=self._views(config) if "cached" in kind else None,
        )
        sampler = self._rows.sampler(config.train.p, config.train.k, seed=0)
        batches: Any = _Again(dataset[next(iter(sampler))], steps)
        settings = StageSettings(
            train=config.train,
            schedule=text or config.train.base,
            loss=config.loss,
            optim=config.optim,
            pad=config.data.pad,
            freeze_visual=text is not None,
            freeze_batch_norm=text is not None and text.freeze_batch_norm,
        )
        train_stage(model, batches, batches, settings, device=self._device, validate=None, listener=rate)

    def _kernels(self, kind: str, config: Config, steps: int) -> tuple[float, int]:
        """Return milliseconds and number of the kernels of two epochs of `steps`, halved, and of their preparation."""
        cuda = self._device.type == "cuda"
        activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
        with profile(activities=activities) as profiler:
            self._ready(kind, config, _Rate(), steps)
        events = [event for event in profiler.events() or [] if not cuda or str(event.device_type).endswith("CUDA")]
        times = [event.device_time_total if cuda else event.self_cpu_time_total for event in events]
        return sum(times) / 2000, len(events) // 2


def _words(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, 22))


def _facts(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on besides the program."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit.stdout.strip()}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a line per kind of step and precision, and add the records to the results."""
    parser = argparse.ArgumentParser(description="What a training step costs on a GPU.")
    parser.add_argument("--tiny", action="store_true", help="tiny networks on the CPU, to check that it runs")
    parser.add_argument("--out", type=Path, help="JSON lines file; default benchmarks/results, none with --tiny")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("gpu.steps: expected a CUDA device, got none. Use --tiny to check that it runs.")
    device = torch.device("cpu" if options.tiny else "cuda")
    out = options.out or (None if options.tiny else RESULTS / "gpu_steps.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        lab = _Lab(TINY if options.tiny else PAPER, Path(folder), device)
        for autocast in ("off",) if options.tiny else ("float16", "bfloat16"):
            for kind in KINDS:
                record = lab.measure(kind, autocast)
                print(", ".join(f"{name} {value}" for name, value in record.items()), flush=True)
                if out:
                    with out.open("a") as file:
                        file.write(json.dumps({**_facts(device), **record}) + "\n")


if __name__ == "__main__":
    main()
