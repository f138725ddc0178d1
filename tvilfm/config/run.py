"""The section `run`: name, folders, seed and trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from tvilfm.config.section import Section, check_no_secret


class RunSection(Section):
    name: str = Field("demo", pattern=r"^\w[\w.-]*$", description="folder of this run, in run.dir")
    dir: Path = Field(Path("runs"), description="folder of all runs")
    stages_dir: Path | None = Field(
        None, description="folder of finished stages that runs share; null = inside the run folder"
    )
    seed: int = Field(0, ge=0, description="seed of all random draws of training and evaluation")
    trackers: tuple[Literal["mlflow", "wandb"], ...] = Field(
        (), description="further trackers: mlflow, wandb; JSON lines and TensorBoard are always written"
    )
    mlflow_uri: str | None = Field(None, description="MLflow server or database; null = an SQLite file in run.dir")

    @model_validator(mode="after")
    def _without_secret(self) -> RunSection:
        advice = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or PGPASSWORD."
        check_no_secret("mlflow_uri", self.mlflow_uri, advice)
        return self

    @property
    def path(self) -> Path:
        return self.dir / self.name
