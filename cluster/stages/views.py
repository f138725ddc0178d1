"""The stage that caches features of the frozen visual part, for augmented training views and evaluated images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.stages.extraction import Images, write_views
from cluster.stages.stage import DATASET, Stage, StageJob
from tvilfm.config import Config
from tvilfm.data.manifest import rows_of, select
from tvilfm.data.splits import TEST_SPLITS
from tvilfm.data.transforms import Recipe
from tvilfm.data.tri_modal import RECIPES, TrainingRows
from tvilfm.terms import MODALITIES


class Views(Stage):
    """Extract features of augmented views of the training images, and of the images to evaluate."""

    name = "views"
    keys = ("run.seed", "data.pad", "train.text.cache_views", "train.text.use_val")
    unit = "images"

    def applies(self, config: Config) -> bool:
        return bool(config.train.text.cache_views) and config.model.trained is None

    def inputs(self, config: Config) -> tuple[str, ...]:
        return (DATASET, "pixels", "base")

    def make(self, folder: Path, job: StageJob) -> None:
        config = job.config
        rows = TrainingRows.from_manifest(job.manifest, use_val=config.train.text.use_val)
        pixel_rows: dict[Recipe, list[int]] = {
            recipe: rows_of(job.manifest, rows.infrared if recipe == "infrared" else rows.visible).tolist()
            for recipe in RECIPES
        }
        write_views(
            folder,
            pixel_rows,
            config.train.text.cache_views,
            evaluated_images(job.manifest),
            pad=config.data.pad,
            seed=config.run.seed,
            **pool_of(job, "base"),
        )


def evaluated_images(manifest: pa.Table) -> Images:
    """Return modality -> names and pixel rows of the images that any protocol may evaluate."""
    images: dict[str, tuple[list[str], list[int]]] = {}
    for modality in MODALITIES:
        subset = select(manifest, split=("val", *TEST_SPLITS), modality=modality)
        images[modality] = (subset["image"].to_pylist(), rows_of(manifest, subset).tolist())
    return images


def pool_of(job: StageJob, model: str) -> dict[str, Any]:
    """Return the arguments of `encode_chunks` for an extraction with the model of a stage."""
    return {
        "model": job.input(model) / "model",
        "pixels": job.input("pixels") / "pixels.npy",
        "section": job.config.cluster,
        "depot": job.depot,
        "chunk_size": job.config.evaluate.batch,
    }
