"""The section `data`: which dataset, where it is, and the size of its images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from tvilfm.config.section import Section

# What is evaluated when `evaluate.protocols` is null; the first also chooses checkpoints.
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "synthetic": ("sysu_mm01/all/single", "sysu_mm01/indoor/single"),
    "sysu_mm01": ("sysu_mm01/all/single", "sysu_mm01/indoor/single"),
    "regdb": ("regdb/infrared-visible", "regdb/visible-infrared"),
    "llcm": ("llcm/infrared-visible", "llcm/visible-infrared"),
    "folder": ("folder/infrared-visible",),
}


class SyntheticSection(Section):
    size: Literal["tiny", "small", "large"] = Field("small", description="identities of the synthetic benchmark")
    seed: int = Field(0, ge=0, description="seed of the rendered people, apart from run.seed")


class DataSection(Section):
    name: Literal["synthetic", "sysu_mm01", "regdb", "llcm", "folder"] = Field(
        "synthetic", description="synthetic (rendered when absent), sysu_mm01, regdb, llcm, or folder (your own)"
    )
    root: Path | None = Field(None, description="dataset folder; null = run.dir/data/<synthetic size and seed>")
    split: int = Field(1, ge=1, le=10, description="RegDB: which of its ten splits to train and test on")
    captions: Path | None = Field(
        None, description="folder of published caption files or a .parquet caption table; null = data.root/Text"
    )
    height: int = Field(288, ge=16, description="pixels after resizing (METHOD 2)")
    width: int = Field(144, ge=8, description="pixels after resizing (METHOD 2)")
    pad: int = Field(10, ge=0, description="padding before the random crop, pixels (METHOD 4)")
    decode_batch: int = Field(64, ge=1, description="images that one Ray Data task decodes at once")
    synthetic: SyntheticSection = SyntheticSection()

    @property
    def reader_options(self) -> dict[str, object]:
        """Further options of `read_dataset` for this dataset."""
        return {"split": self.split} if self.name == "regdb" else {}
