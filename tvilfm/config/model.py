"""The section `model`: the network and its initial weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from tvilfm.config.section import Section


class TextModelSection(Section):
    width: int = Field(512, ge=8, description="width of the text tower; CLIP RN50: 512")
    layers: int = Field(12, ge=1, description="layers of the text tower; CLIP RN50: 12")
    heads: int = Field(8, ge=1, description="attention heads of the text tower; CLIP RN50: 8")
    weights: str = Field(
        "openai", description="openai (open_clip's CLIP RN50), random, or a local state dict of that tower"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TextModelSection:
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of width {self.width}, got {self.heads}. Change one of them.")
        return self


class ModelSection(Section):
    backbone: Literal["resnet50", "resnet18_half"] = Field(
        "resnet50", description="resnet50, or resnet18_half for CPUs"
    )
    weights: str = Field(
        "imagenet",
        description="imagenet (torchvision), attributes (synthetic pre-training), random, or a local file",
    )
    trained: Path | None = Field(
        None,
        description="trained model to evaluate instead of training: run folder, model folder, checkpoint",
    )
    text: TextModelSection = TextModelSection()
