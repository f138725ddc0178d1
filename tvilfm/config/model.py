"""The section `model`: the network and where its weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from tvilfm.config.section import Section


class TextModelSection(Section):
    width: int = Field(512, ge=8, description="CLIP RN50 text tower: 512")
    layers: int = Field(12, ge=1, description="CLIP RN50 text tower: 12")
    heads: int = Field(8, ge=1, description="CLIP RN50 text tower: 8")
    weights: str = Field(
        "openai", description="openai (open_clip's CLIP RN50), random, or a local state dict of that tower"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TextModelSection:
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of width {self.width}, got {self.heads}.")
        return self


class ModelSection(Section):
    backbone: Literal["resnet50", "resnet18_half"] = Field("resnet50", description="resnet50 or resnet18_half (CPU)")
    weights: str = Field(
        "imagenet",
        description="imagenet (torchvision), attributes (pre-train on synthetic attributes), random, or a local file",
    )
    trained: Path | None = Field(
        None,
        description="trained model to evaluate instead of training one: run folder, model folder or checkpoint",
    )
    text: TextModelSection = TextModelSection()
