"""Build and run both stages from a config. `cluster` runs them on Ray workers; they also run without Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from tvilfm.config import PROTOCOLS, Config, EvaluateSection, ScheduleSection, TextStageSection
from tvilfm.data.manifest import rows_of, select
from tvilfm.data.transforms import Recipe
from tvilfm.data.tri_modal import TrainingRows, TriModalDataset
from tvilfm.evaluation.evaluator import Evaluator
from tvilfm.evaluation.features import FeatureTable
from tvilfm.evaluation.query_texts import QUERY_TEXTS_SCHEMA, draw_query_texts, sentences_of
from tvilfm.models import TVILFM, spec_from_config
from tvilfm.models.encode import encode_pixels, encode_texts
from tvilfm.models.tvilfm import load_text_weights, load_visual_weights
from tvilfm.terms import Split
from tvilfm.training.distributed import rank, world_size
from tvilfm.training.loop import Listener, StageSettings, train_stage


@dataclass(frozen=True, kw_only=True)
class StageData:
    """The input of a stage.

    Attributes:
        manifest: all rows, in the order of `pixels`.
        pixels: uint8 (N, H, W, 3), memory-mapped.
        captions: caption table.
        images: raw features of the evaluated images, if the visual part is frozen and they are known; else None.
    """

    manifest: pa.Table
    pixels: npt.NDArray[np.uint8]
    captions: pa.Table
    images: FeatureTable | None = None


def train_base(
    config: Config,
    data: StageData,
    *,
    backbone: dict[str, torch.Tensor] | None,
    device: torch.device,
    listener: Listener,
    resume: Path | None = None,
) -> TVILFM:
    """Train stage 1: backbone, GeM and head, from images alone.

    Args:
        config: config of the run.
        data: tables and pixels.
        backbone: pre-trained backbone if `model.weights` is `attributes`; None loads the weights of `model.weights`.
        device: device of this worker.
        listener: receiver of step and epoch events.
        resume: checkpoint to continue from.

    Returns:
        The network after the last epoch; the last checkpoint's `network/` is the selected one.
    """
    torch.manual_seed(config.run.seed)
    rows = TrainingRows.from_manifest(data.manifest, use_val=config.train.base.use_val)
    model = TVILFM(spec_from_config(config.model, rows.num_classes, with_text=False))
    if backbone is None:
        load_visual_weights(model, config.model)
    else:
        model.backbone.load_state_dict(backbone)
    return _fit(model, config, data, rows, config.train.base, None, 0, device=device, listener=listener, resume=resume)


def train_text(
    config: Config,
    data: StageData,
    *,
    base: TVILFM,
    views: dict[Recipe, npt.NDArray[np.float32]] | None,
    device: torch.device,
    listener: Listener,
    resume: Path | None = None,
) -> TVILFM:
    """Train stage 2 (incremental fine-tuning): text tower and head, with the visual part frozen.

    Args:
        config: config of the run.
        data: tables and pixels.
        base: the base stage's network; the text tower is added to it in place.
        views: recipe -> (V, N, D) cached features of augmented views; None encodes pixels in every step.
        device: device of this worker.
        listener: receiver of step and epoch events.
        resume: checkpoint to continue from.

    Returns:
        The network after the last epoch; the last checkpoint's `network/` is the selected one.
    """
    torch.manual_seed(config.run.seed + 1)
    rows = TrainingRows.from_manifest(data.manifest, use_val=config.train.text.use_val)
    base.start_text_stage(config.model.text, train_pool=config.trains_gem)
    load_text_weights(base, config.model)
    return _fit(base, config, data, rows, config.train.text, views, 1, device=device, listener=listener, resume=resume)


def _fit(
    model: TVILFM,
    config: Config,
    data: StageData,
    rows: TrainingRows,
    schedule: ScheduleSection,
    views: dict[Recipe, npt.NDArray[np.float32]] | None,
    seed_offset: int,
    *,
    device: torch.device,
    listener: Listener,
    resume: Path | None,
) -> TVILFM:
    text = schedule if isinstance(schedule, TextStageSection) else None
    seed = config.run.seed + seed_offset
    settings = StageSettings(
        train=config.train,
        schedule=schedule,
        loss=config.loss,
        optim=config.optim,
        pad=config.data.pad,
        freeze_visual=text is not None,
        freeze_batch_norm=text is not None and text.freeze_batch_norm,
    )
    dataset = TriModalDataset(
        rows,
        data.manifest,
        data.pixels,
        pad=config.data.pad,
        seed=seed,
        rank=rank(),
        world_size=world_size(),
        captions=None if text is None else data.captions,
        llm_probability=0.0 if text is None else text.llm_probability,
        views=views,
    )
    return train_stage(
        model,
        rows.sampler(config.train.p, config.train.k, seed=seed),
        dataset,
        settings,
        device=device,
        validate=_validator(config, data, schedule, with_text=text is not None),
        listener=listener,
        resume=resume,
    )


def _validator(
    config: Config, data: StageData, schedule: ScheduleSection, *, with_text: bool
) -> Callable[[TVILFM], dict[str, float]] | None:
    select_by = schedule.select_by
    if schedule.select == "last":
        return None
    split: Split = "test" if schedule.select == "test" else "val"
    # Independent of `config.evaluate.protocols`: a change of the result table must not change the training.
    section = EvaluateSection(
        protocols=PROTOCOLS[config.data.name][:1],
        text_sources=("witness",),
        default_text_source="witness",
        batch=config.evaluate.batch,
    )
    splits = ("query", "gallery", "test") if split == "test" else (split,)
    table = select(data.manifest, split=splits)
    query_texts = QUERY_TEXTS_SCHEMA.empty_table()
    if with_text:
        section = section.model_copy(update={"witness_draw": config.evaluate.witness_draw})
        query_texts = draw_query_texts(data.manifest, data.captions, section, seed=config.run.seed, splits=(split,))
    texts = sentences_of(query_texts)
    frozen = [] if data.images is None else [data.images]

    def validate(model: TVILFM) -> dict[str, float]:
        images = frozen[0] if frozen else _encode_images(model, data, table, batch=section.batch)
        if with_text and config.freezes_features and not frozen:
            frozen.append(images)
        encoded = None
        if with_text:
            vectors = encode_texts(model, texts, batch=section.batch)
            encoded = FeatureTable(keys=tuple(texts), vectors_ND=vectors)
        evaluator = Evaluator(
            model,
            data.manifest,
            query_texts,
            images,
            encoded,
            section,
            filter_text=with_text and config.loss.filter_text,
            split=split,
        )
        kind = "fusion" if with_text else "infrared"
        (case,) = (case for case in evaluator.evaluate() if case.query == kind)
        rank1, mean_ap = (float(np.mean([getattr(t, name) for t in case.trials])) for name in ("rank1", "mAP"))
        return {"val_rank1": rank1, "val_mAP": mean_ap, "score": rank1 if select_by == "rank1" else mean_ap}

    return validate


def _encode_images(model: TVILFM, data: StageData, table: pa.Table, *, batch: int) -> FeatureTable:
    vectors = np.empty((table.num_rows, model.spec.image_dim), dtype=np.float32)
    modality = np.array(table["modality"].to_pylist())
    for name in ("visible", "infrared"):
        chosen = np.flatnonzero(modality == name)
        pixel_rows = rows_of(data.manifest, table.take(pa.array(chosen)))
        for start in range(0, len(chosen), batch):
            part = slice(start, start + batch)
            vectors[chosen[part]] = encode_pixels(model, data.pixels[pixel_rows[part]], name)
    return FeatureTable(keys=tuple(table["image"].to_pylist()), vectors_ND=vectors)
