"""The section `data`: which dataset, where it is, and the size of its images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from tvilfm.config.section import Section
from tvilfm.terms import DepthRange

# Protocols that are evaluated when `evaluate.protocols` is null; the first one also selects checkpoints.
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "synthetic": ("sysu_mm01/all/single", "sysu_mm01/indoor/single"),
    "sysu_mm01": ("sysu_mm01/all/single", "sysu_mm01/indoor/single"),
    "regdb": ("regdb/infrared-visible", "regdb/visible-infrared"),
    "llcm": ("llcm/infrared-visible", "llcm/visible-infrared"),
    "folder": ("folder/infrared-visible",),
}


class SyntheticSection(Section):
    size: Literal["tiny", "small", "large"] = Field(
        "small", description="identities of the synthetic benchmark: tiny, small, large"
    )
    seed: int = Field(0, ge=0, description="seed of the rendered people, independent of run.seed")


class DataSection(Section):
    name: Literal["synthetic", "sysu_mm01", "regdb", "llcm", "folder"] = Field(
        "synthetic", description="synthetic (rendered if missing), sysu_mm01, regdb, llcm, folder (your own images)"
    )
    root: Path | None = Field(None, description="dataset folder; null = run.dir/data/synthetic-<size>-<seed>")
    split: int = Field(1, ge=1, le=10, description="RegDB: number of the split (1 to 10) to train and test on")
    captions: Path | None = Field(
        None,
        description="folder of published caption files or caption table (.parquet, .csv); null = data.root/Text",
    )
    human_texts: Path | None = Field(
        None, description="JSON file {identity: sentence} of people's own words, for the text source human"
    )
    height: int = Field(288, ge=16, description="image height after resizing, pixels (METHOD 2)")
    width: int = Field(144, ge=8, description="image width after resizing, pixels (METHOD 2)")
    depth_range: DepthRange = Field(
        None, description="[low, high] of images above 8 bits; percentiles = per image; null = the full 16 bits"
    )
    pad: int = Field(10, ge=0, description="padding before the random crop, pixels (METHOD 4)")
    distractors: bool = Field(
        False, description="folder: keep visible images with a negative pid in the gallery; false = leave them out"
    )
    decode_batch: int = Field(64, ge=1, description="images per decoding task of Ray Data")
    synthetic: SyntheticSection = SyntheticSection()

    @field_validator("depth_range")
    @classmethod
    def _ascending(cls, value: DepthRange) -> DepthRange:
        if isinstance(value, tuple) and value[0] >= value[1]:
            raise ValueError(f"expected [low, high] with low below high, got {list(value)}. Exchange them.")
        return value

    @property
    def reader_options(self) -> dict[str, object]:
        """Options that the reader of this dataset takes."""
        options: dict[str, dict[str, object]] = {
            "regdb": {"split": self.split},
            "folder": {"distractors": self.distractors},
        }
        return options.get(self.name, {})
