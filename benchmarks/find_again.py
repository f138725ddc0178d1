"""`find_again`: `tvilfm find` over 1,000 images for the first time, against the same command run again.

Both are whole processes on a model of the paper's size with random weights. The first encodes the folder and the query;
the second reads their vectors from the store.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.claim import Claim
from tvilfm.models import TVILFM, ModelSpec

IMAGES, GOAL = 1_000, 20.0
PAPER = ModelSpec(backbone="resnet50", num_classes=395, text_width=512, text_layers=12, text_heads=8)


def find_again() -> Claim:
    """How many times faster the second call is."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        model, folder = Path(place) / "model", Path(place) / "images"
        TVILFM(PAPER).save_pretrained(model)
        folder.mkdir()
        for number in range(IMAGES):
            noise = Image.fromarray(rng.integers(0, 256, (16, 8, 3), dtype=np.uint8))
            noise.resize((64, 128)).save(folder / f"{number:04d}.jpg")
        query = ["--image", str(folder / "0000.jpg"), "--text", "a woman in a red coat"]
        command = [sys.executable, "-m", "cluster", "find", str(model), "--in", str(folder), *query]
        seconds, tables = [], []
        for _ in range(2):
            started = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds.append(time.perf_counter() - started)
            tables.append(done.stdout)
    first_s, again_s = seconds
    return Claim(
        name="find_again",
        ratio=first_s / again_s,
        goal=GOAL,
        ours=f"{again_s:.1f} s again",
        baseline=f"{first_s:.1f} s the first time, {IMAGES:,} images",
        fault=None if tables[0] == tables[1] else "the two rankings differ",
    )


CLAIMS = {"find_again": find_again}
