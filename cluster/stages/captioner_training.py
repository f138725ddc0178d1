"""Fine-tune captioners on Ray Train, with checkpoints and restarts, and score them on validation images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray.train
import ray.train.torch
import torch

from cluster.places.depot import Depot, fetched
from cluster.stages.learning import METRICS_FILE, write_records
from cluster.stages.trainer import Reporter, bring, fit, last_checkpoint
from tvilfm.captioning.captioner import Captioner
from tvilfm.captioning.conv_captioner import NAME, build_conv_captioner
from tvilfm.captioning.finetune import Pairs, caption_pairs, finetune, mean_loss
from tvilfm.captioning.scores import Marks, attribute_scores, colour_share, language_scores
from tvilfm.config import CaptionerSection, Config
from tvilfm.data.manifest import column
from tvilfm.data.pixels import open_pixels
from tvilfm.datasets.synthetic.layouts import read_truth
from tvilfm.terms import Modality, Record
from tvilfm.training.loop import AUTOCAST_DTYPES

MARKED = 512  # validation images that a captioner is scored on


def fit_captioner(
    folder: Path, config: Config, modality: Modality, inputs: Mapping[str, str], depot: Depot | None = None
) -> None:
    """Fine-tune the captioner of a modality on Ray Train; write `folder/captioner` and its scores to `marks.json`.

    The state of the training is stored in `folder/train`. After an interruption, training resumes from its last
    checkpoint.

    Args:
        folder: working folder; without a depot, on storage that all nodes share.
        config: the run.
        modality: visible or infrared.
        inputs: `pixels` (folder of `pixels.npy` and `manifest.parquet`), `captions` (Parquet caption table) and, for
            the synthetic benchmark, `truth` (folder of its `attributes.json`).
        depot: object store from which workers fetch missing files and to which they write checkpoints; None = machines
            share the folders.

    Raises:
        ValueError: the captioner cannot be loaded, or the dataset has no pairs for it.
        ray.train.TrainingFailedError: a worker failed more often than `cluster.max_failures`.
    """
    captioner: CaptionerSection = getattr(config.caption, modality)
    model = captioner.model
    # Read the validation pairs too, so that missing ones are reported before training.
    pairs, _ = (_pairs(config, modality, inputs, split) for split in ("train", "val"))
    if model == NAME:
        model = str(folder / "start")
        build_conv_captioner(
            Path(model), pairs.texts, height=config.data.height, width=config.data.width, seed=config.caption.seed
        )
        if depot is not None:
            depot.push(Path(model))
    elif Path(model).is_dir():
        model = str(Path(model).absolute())  # workers do not run in the current folder
    job = {
        "folder": str(folder),
        "config": config,
        "captioner": captioner.model_copy(update={"model": model}).model_dump(mode="json"),
        "modality": modality,
        "inputs": dict(inputs),
        "depot": depot,
    }
    workers = config.cluster.train_workers
    (records, marks), last = fit(_worker, job, folder, config.cluster, workers=workers, depot=depot)
    write_records(folder / METRICS_FILE, records)
    marks.write(folder / "marks.json")
    bring(last, "model", folder / "captioner")


def _pairs(config: Config, modality: Modality, inputs: Mapping[str, str], split: str) -> Pairs:
    pixels = Path(inputs["pixels"])
    return caption_pairs(
        pq.read_table(pixels / "manifest.parquet"),
        pq.read_table(inputs["captions"]),
        open_pixels(pixels / "pixels.npy"),
        modality=modality,
        split=split,
        infrared_pairs=config.caption.train.infrared_pairs,
    )


def _worker(job: dict[str, Any]) -> tuple[list[Record], Marks] | None:
    """Return the records of all epochs and the captioner's scores on rank 0, None on others."""
    config, folder, depot = job["config"], Path(job["folder"]), job["depot"]
    modality = job["modality"]
    inputs = {name: str(fetched(Path(path), depot)) for name, path in job["inputs"].items()}
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_train_worker)))
    device = ray.train.torch.get_device()
    context = ray.train.get_context()
    captioner_section = CaptionerSection.model_validate(job["captioner"])
    fetched(Path(captioner_section.model), depot)
    captioner = Captioner.load(captioner_section, device=str(device))
    section = config.caption.train
    with last_checkpoint() as resume:
        reporter = Reporter(folder, section.epochs, resume)
        finetune(
            captioner,
            _pairs(config, modality, inputs, "train"),
            section,
            seed=config.caption.seed,
            listener=reporter,
            autocast=AUTOCAST_DTYPES.get(config.caption.dtype) if device.type == "cuda" else None,
            rank=context.get_world_rank(),
            workers=context.get_world_size(),
            resume=resume,
        )
    if context.get_world_rank() != 0:
        return None
    reporter.wait()  # saving and generating both change the model's generation config
    return reporter.records, _mark(captioner, config, modality, inputs)


def _mark(captioner: Captioner, config: Config, modality: Modality, inputs: Mapping[str, str]) -> Marks:
    pairs = _pairs(config, modality, inputs, "val").thin(MARKED)
    batch = config.caption.batch
    sentences: list[str] = []
    for start in range(0, len(pairs), batch):
        chosen = range(start, min(start + batch, len(pairs)))
        sentences += captioner.caption(pairs.images(chosen), seed=config.caption.seed + start)
    attributes = {}
    if "truth" in inputs:
        truth = read_truth(Path(inputs["truth"]))
        pids = column(pq.read_table(Path(inputs["pixels"]) / "manifest.parquet"), "pid")[pairs.rows]
        attributes = attribute_scores(sentences, [truth[pid] for pid in pids.tolist()], modality)
    return Marks(
        pictures=len(pairs),
        loss=mean_loss(captioner, pairs, batch=batch),
        colour_words=colour_share(sentences),
        attributes=attributes,
        **language_scores(sentences, pairs.texts),
    )
