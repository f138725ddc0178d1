"""The stage that extracts features of the test images and of the sentences that they meet."""

from __future__ import annotations

import shutil
from pathlib import Path

from cluster.stages.extraction import Images, write_features
from cluster.stages.stage import DATASET, Stage, StageJob, captions_input, evaluated_splits
from cluster.stages.views import evaluated_images, pool_of
from tvilfm.config import Config
from tvilfm.evaluation.evaluator import all_texts
from tvilfm.evaluation.features import IMAGES_FILE


class Features(Stage):
    """Extract features of test images and texts; those of images are copied where `views` has them."""

    name = "features"
    keys = (
        *("run.seed", "evaluate.protocols", "evaluate.text_sources"),
        *("train.base.use_val", "train.text.use_val"),
    )
    unit = "rows"

    def inputs(self, config: Config) -> tuple[str, ...]:
        views = ("views",) if config.train.text.cache_views else ()
        return (DATASET, "pixels", *views, "text", captions_input(config))

    def make(self, folder: Path, job: StageJob) -> None:
        images: Images = {}
        if job.has("views"):
            shutil.copy(job.input("views") / IMAGES_FILE, folder)
        else:
            images = evaluated_images(job.manifest)
        seed = job.config.run.seed
        texts = {
            text
            for split in evaluated_splits(job.manifest, job.config)
            for text in all_texts(job.manifest, job.captions, job.config.evaluate, seed=seed, split=split)
        }
        write_features(folder, images, sorted(texts), **pool_of(job, "text"))
