"""Training checkpoints: the current model, the best model so far, and the optimizer state."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tvilfm.models import TVILFM


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a stage after an epoch.

    Attributes:
        epochs_done: number of completed epochs.
        best_score: validation score of the best model, 0-1; -1 before the first validation.
        best_epoch: epoch of the best model, counted from 0; -1 before the first validation.
    """

    epochs_done: int
    best_score: float
    best_epoch: int


def save_checkpoint(
    folder: Path,
    model: TVILFM,
    best: Path,
    progress: Progress,
    optimizer: list[dict[str, Any]],
    scaler: dict[str, Any],
) -> None:
    """Write `model/`, `best/`, `trainer.pt` (optimizer and scaler state) and `progress.json`.

    Args:
        folder: folder to write; created if missing.
        model: the current network.
        best: folder of the best model so far.
        progress: progress of the stage.
        optimizer: `StageOptimizer.state_dict()`.
        scaler: `GradScaler.state_dict()`.
    """
    model.save_pretrained(folder / "model")
    shutil.copytree(best, folder / "best", dirs_exist_ok=True)
    torch.save({"optimizer": optimizer, "scaler": scaler}, folder / "trainer.pt")
    (folder / "progress.json").write_text(json.dumps(asdict(progress)))


def load_trainer(folder: Path) -> tuple[Progress, list[dict[str, Any]], dict[str, Any]]:
    """Return the progress, optimizer state and scaler state from a checkpoint folder."""
    state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    progress = Progress(**json.loads((folder / "progress.json").read_text()))
    return progress, state["optimizer"], state["scaler"]
