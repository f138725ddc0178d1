"""Training checkpoints: what training changes of the current and the best model, and the optimizer state."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tvilfm.models import TVILFM
from tvilfm.models.weights import OUTDATED

CURRENT, BEST, TRAINER, PROGRESS = "current.safetensors", "best.safetensors", "trainer.pt", "progress.json"
NETWORK = "network"  # in the checkpoint of the last epoch: folder of the whole selected network


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


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a stage after an epoch. It can be written during the next epochs.

    Attributes:
        progress: progress of the stage.
        current: `trained_weights` of the current network.
        best: those of the best network so far; the same object if it is the current one.
        optimizer: copy of `StageOptimizer.state_dict()`.
        scaler: copy of `GradScaler.state_dict()`.
        network: after the last epoch, the network, which is also written whole, with the best weights.
    """

    progress: Progress
    current: dict[str, Tensor]
    best: dict[str, Tensor]
    optimizer: list[dict[str, Any]]
    scaler: dict[str, Any]
    network: TVILFM | None = None

    def write(self, folder: Path) -> None:
        """Write the files of the checkpoint to an existing folder."""
        save_file(self.current, folder / CURRENT)
        if self.best is not self.current:
            save_file(self.best, folder / BEST)
        torch.save({"optimizer": self.optimizer, "scaler": self.scaler}, folder / TRAINER)
        (folder / PROGRESS).write_text(json.dumps(asdict(self.progress)))
        if self.network is not None:
            self.network.save_pretrained(folder / NETWORK, weights=self.best)

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Read a folder of `write`, without the whole network.

        Raises:
            ValueError: another version of this program wrote the folder.
        """
        if not (folder / CURRENT).exists():
            raise ValueError(OUTDATED)
        trainer = torch.load(folder / TRAINER, map_location="cpu", weights_only=True)
        current = load_file(folder / CURRENT)
        return cls(
            progress=Progress(**json.loads((folder / PROGRESS).read_text())),
            current=current,
            best=load_file(folder / BEST) if (folder / BEST).exists() else current,
            optimizer=trainer["optimizer"],
            scaler=trainer["scaler"],
        )
