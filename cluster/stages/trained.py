"""The stage that uses a trained model instead of training one."""

from __future__ import annotations

from pathlib import Path

from cluster.stages.stage import MODEL, Stage, StageJob
from tvilfm.config import Config
from tvilfm.evaluation.provenance import Provenance
from tvilfm.models.opening import open_model


class Trained(Stage):
    """Copy the network of `model.trained`, and write what is known about its training."""

    name = "trained"
    keys = ()

    def applies(self, config: Config) -> bool:
        return config.model.trained is not None

    def inputs(self, config: Config) -> tuple[str, ...]:
        return (MODEL,)

    def make(self, folder: Path, job: StageJob) -> None:
        path = job.config.model.trained
        assert path is not None
        opened = open_model(path)
        opened.model.save_pretrained(folder / "model")
        Provenance.of(opened).write(folder)
