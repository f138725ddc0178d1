"""The stages that fine-tune one captioner per modality."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from cluster.stages.stage import CAPTION_FILES, Stage, StageJob
from tvilfm.config import Config
from tvilfm.terms import Modality


class Captioner(Stage):
    """Fine-tune the captioner of a modality on the training images and their captions from files."""

    unit = "steps"
    trains = True

    def __init__(self, modality: Modality) -> None:
        self.modality = modality
        self.name = f"captioner_{modality}"
        self.keys = (
            *("caption.train", "caption.dtype", "caption.seed", "caption.batch", f"caption.{modality}"),
            *("data.name", "data.height", "data.width"),
        )

    def applies(self, config: Config) -> bool:
        return config.caption.source == "finetuned"

    def inputs(self, config: Config) -> tuple[str, ...]:
        return ("pixels", CAPTION_FILES)

    def make(self, folder: Path, job: StageJob) -> None:
        # Imported here: transformers takes seconds to import, and most runs train no captioner.
        from cluster.stages.captioner_training import fit_captioner

        captions = folder.absolute() / "captions.parquet"
        pq.write_table(job.caption_files, captions)
        job.share(captions)
        inputs = {"pixels": str(job.input("pixels")), "captions": str(captions)}
        if job.config.data.name == "synthetic":
            inputs["truth"] = str(job.data_root.absolute())
        fit_captioner(folder, job.config, self.modality, inputs, job.depot)
