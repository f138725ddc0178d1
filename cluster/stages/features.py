"""The stage that extracts features of the test images and of the query sentences."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq

from cluster.stages.extraction import Images, write_features
from cluster.stages.stage import (
    ATTRIBUTES,
    DATASET,
    HUMAN_TEXTS,
    Stage,
    StageJob,
    captions_input,
    evaluated_splits,
    network_stage,
)
from cluster.stages.views import Views, evaluated_images, pool_of
from tvilfm.config import Config
from tvilfm.evaluation.features import IMAGES_FILE
from tvilfm.evaluation.query_texts import QUERY_TEXTS_FILE, draw_query_texts, sentences_of, with_noise
from tvilfm.models import TVILFM


class Features(Stage):
    """Draw the query texts, and extract features of the query texts and of the test images.

    If the stage `views` exists, the features of images are copied from it.
    """

    name = "features"
    keys = (
        *("run.seed", "evaluate.protocols", "evaluate.text_sources", "evaluate.witness_draw"),
        *("evaluate.default_text_source", "evaluate.text_noise"),
        *("train.base.use_val", "train.text.use_val"),
    )
    unit = "rows"

    def inputs(self, config: Config) -> tuple[str, ...]:
        views = ("views",) if Views().applies(config) else ()
        human = (HUMAN_TEXTS,) if "human" in config.evaluate.text_sources else ()
        truth = (ATTRIBUTES,) if config.evaluate.reads_attributes else ()
        return (DATASET, "pixels", *views, network_stage(config), captions_input(config), *human, *truth)

    def make(self, folder: Path, job: StageJob) -> None:
        images: Images = {}
        if job.has("views"):
            shutil.copy(job.input("views") / IMAGES_FILE, folder)
        else:
            images = evaluated_images(job.manifest)
        seed = job.config.run.seed
        splits = evaluated_splits(job.manifest, job.config)
        human = None
        if "human" in job.config.evaluate.text_sources:
            human = dict(zip(*(job.human_texts[name].to_pylist() for name in ("pid", "text")), strict=True))
        query_texts = draw_query_texts(
            job.manifest, job.captions, job.config.evaluate, seed=seed, splits=splits, human=human
        )
        if job.config.evaluate.text_noise:
            truth = None
            if job.config.evaluate.reads_attributes:
                truth = {row.pop("pid"): row for row in job.attributes.to_pylist()}
            query_texts = with_noise(query_texts, job.manifest, job.config.evaluate, seed=seed, attributes=truth)
        pq.write_table(query_texts, folder / QUERY_TEXTS_FILE)
        network = network_stage(job.config)
        with_text = TVILFM.from_pretrained(job.input(network) / "model").spec.with_text
        sentences = sentences_of(query_texts) if with_text else []
        write_features(folder, images, sentences, **pool_of(job, network))
