"""The section `run`: names, folders, seed and trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from tvilfm.config.section import Section


class RunSection(Section):
    name: str = Field("demo", pattern=r"^\w[\w.-]*$", description="folder under run.dir that holds this run")
    dir: Path = Field(Path("runs"), description="folder that holds the runs")
    stages_dir: Path | None = Field(
        None, description="folder of finished stages, which runs share; null = inside the run folder"
    )
    seed: int = Field(0, ge=0, description="every random draw of training and evaluation follows from it")
    trackers: tuple[Literal["mlflow", "wandb"], ...] = Field(
        (), description="also log to mlflow, wandb (JSON lines and TensorBoard always)"
    )
    mlflow_uri: str | None = Field(None, description="MLflow server or database; null = SQLite file in run.dir")

    @property
    def path(self) -> Path:
        return self.dir / self.name
