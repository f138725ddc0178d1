"""The stage that captions every image and optionally rephrases the captions."""

from __future__ import annotations

from pathlib import Path

from cluster.progress import ProgressFile
from cluster.stages.stage import DATASET, Stage, StageJob
from cluster.tables.captioning import caption_images
from cluster.tables.rephrasing import rephrase_table
from tvilfm.config import CaptionerSection, Config
from tvilfm.datasets.caption_files import read_captions
from tvilfm.place import Place
from tvilfm.terms import MODALITIES


class Captions(Stage):
    """Caption every image with the captioners of the config or with those that the run fine-tuned."""

    name = "captions"
    keys = (
        *("caption.source", "caption.visible", "caption.infrared", "caption.batch", "caption.dtype"),
        *("caption.filter_colors", "caption.rephrase", "caption.seed", "data.depth_range"),
    )
    unit = "images"

    def applies(self, config: Config) -> bool:
        return config.caption.source != "files"

    def inputs(self, config: Config) -> tuple[str, ...]:
        finetuned = config.caption.source == "finetuned"
        return (DATASET, *(f"captioner_{modality}" for modality in MODALITIES if finetuned))

    def make(self, folder: Path, job: StageJob) -> None:
        section, progress = job.config.caption, ProgressFile(folder / "progress.json")
        if section.source == "finetuned":
            captioners: dict[str, CaptionerSection] = {
                modality: getattr(section, modality).model_copy(
                    update={"model": str(job.input(f"captioner_{modality}") / "captioner"), "revision": None}
                )
                for modality in MODALITIES
            }
            section = section.model_copy(update=captioners)
        # Workers write captions to storage that the driver can read.
        out = str(folder) if job.depot is None else job.depot.uri_of(folder)
        summary = caption_images(
            job.manifest.select(["image", "modality"]),
            str(job.data_root.absolute()),
            out,
            section,
            depot=job.depot,
            cluster=job.config.cluster,
            seed=section.seed,
            depth_range=job.config.data.depth_range,
            progress=progress,
        )
        summary.check(section.max_bad_share)
        job.bring(folder / "captions.parquet", folder / "quarantine.parquet")
        if section.rephrase.engine != "none":
            rephrase_table(
                read_captions(job.manifest, job.data_root, folder / "captions.parquet"),
                job.manifest["modality"].to_pylist(),
                (Place(out) / "rephrased").uri,
                section.rephrase,
                dtype=section.dtype,
                cluster=job.config.cluster,
                seed=section.seed,
                progress=progress,
            )
            job.bring(folder / "rephrased" / "captions.parquet")


def captions_path(folder: Path, config: Config) -> Path:
    """Return the caption table in the folder of the finished stage."""
    rephrased = config.caption.rephrase.engine != "none"
    return (folder / "rephrased" if rephrased else folder) / "captions.parquet"
