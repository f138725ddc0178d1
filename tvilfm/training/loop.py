"""Run a training stage from the first epoch, or from a checkpoint, to the last.

This module does not depend on Ray: the caller provides the batches and receives the events of every epoch. All random
choices depend only on (seed, epoch, batch), so a stage that is killed and resumed ends with the same weights as an
uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from tvilfm.config import LossSection, OptimSection, ScheduleSection, TrainSection
from tvilfm.data.pk_sampler import PKSampler
from tvilfm.data.tri_modal import TriModalDataset
from tvilfm.losses.objective import JointObjective
from tvilfm.models import TVILFM
from tvilfm.models.backbone import image_format
from tvilfm.models.weights import load_trained, on_host, trained_weights
from tvilfm.training.checkpoint import Checkpoint, Progress
from tvilfm.training.distributed import average_rows, rank, synchronise_batch_norm, world_size
from tvilfm.training.optim import TOKEN_EMBEDDING, StageOptimizer, lr_factor
from tvilfm.training.prefetch import prefetch
from tvilfm.training.readings import LossReadings
from tvilfm.training.step import StageStep

AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Listener(Protocol):
    """Receiver of the events of a stage; every worker calls it in the same way."""

    def on_step(self, record: Mapping[str, float | int]) -> None:
        """Receive epoch, step, num_steps, steps_per_s and the loss terms of each step, once they are read."""

    def on_epoch(self, record: Mapping[str, float | int], write: Callable[[Path], None] | None) -> None:
        """Receive the mean loss terms and validation scores after each epoch.

        Rank 0 also passes a function that writes the checkpoint to a folder. It may be called later and by
        another thread, during the next epochs. Other ranks pass None.
        """


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """The config sections that a stage uses."""

    train: TrainSection
    schedule: ScheduleSection
    loss: LossSection
    optim: OptimSection
    pad: int
    freeze_visual: bool
    freeze_batch_norm: bool


def train_stage(
    model: TVILFM,
    sampler: PKSampler,
    dataset: TriModalDataset,
    settings: StageSettings,
    *,
    device: torch.device,
    validate: Callable[[TVILFM], dict[str, float]] | None,
    listener: Listener,
    resume: Path | None = None,
) -> TVILFM:
    """Run a stage.

    Args:
        model: the network at the start of the stage. Resuming overwrites what the stage trains.
        sampler: sampler of the global batches.
        dataset: dataset that turns them into this worker's batches.
        settings: the stage's config sections.
        device: device of this worker.
        validate: function that scores the model (rank 0 only); the model with the highest `score` is kept as the best.
            None keeps the last model.
        listener: receiver of step and epoch events.
        resume: folder of `Checkpoint.write`.

    Returns:
        The trained network of the last epoch, in eval mode.

    Raises:
        FloatingPointError: when a loss is not finite; the message names the term, epoch and batch.
    """
    schedule = settings.schedule
    progress, best, optimizer, scaler = _start(model, settings, device, resume)
    one = StageStep(model, JointObjective(settings.loss), pad=settings.pad)
    step = one if world_size() == 1 else distributed(one, settings.loss, device, dataset.token_ids())

    for epoch in range(progress.epochs_done, schedule.epochs):
        sampler.set_epoch(epoch)
        optimizer.set_lr_factor(lr_factor(epoch, warmup_epochs=schedule.warmup_epochs, milestones=schedule.milestones))
        if settings.freeze_visual:
            model.train_text_stage(freeze_batch_norm=settings.freeze_batch_norm)
        else:
            model.train()
        record = _run_epoch(step, sampler, dataset, optimizer, scaler, settings, device, epoch, listener)
        model.eval()
        last = epoch + 1 == schedule.epochs
        if validate is not None and rank() == 0 and (last or _evaluates(schedule, epoch)):
            record |= validate(model)
        progress = _progress_after(epoch, record, progress, schedule, selects=validate is not None)
        if rank() != 0:
            listener.on_epoch(record, None)
            continue
        current = trained_weights(model)
        if progress.best_epoch in (epoch, -1):
            best = current
        checkpoint = Checkpoint(
            progress=progress,
            current=current,
            best=best,
            optimizer=on_host(optimizer.state_dict()),
            scaler=dict(scaler.state_dict()),
            network=model if last else None,
        )
        listener.on_epoch(record, checkpoint.write)
    return model


def _start(
    model: TVILFM, settings: StageSettings, device: torch.device, resume: Path | None
) -> tuple[Progress, dict[str, Tensor], StageOptimizer, torch.amp.GradScaler]:
    """Prepare the network and return progress, best weights, optimizer and scaler, as a checkpoint left them if any.

    Args:
        model: network, moved to the device; resuming overwrites what the stage trains.
        settings: the stage's config sections.
        device: device of this worker.
        resume: folder of the checkpoint.
    """
    model.to(device).to(memory_format=image_format(device))
    if settings.freeze_visual:
        model.freeze_visual()
    synchronise_batch_norm(model.backbone, device)
    optimizer = StageOptimizer(model, settings.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and settings.train.autocast == "float16")
    if resume is None:
        return Progress(epochs_done=0, best_score=-1.0, best_epoch=-1), {}, optimizer, scaler
    checkpoint = Checkpoint.read(resume)
    load_trained(model, checkpoint.current)
    optimizer.load_state_dict(checkpoint.optimizer)
    scaler.load_state_dict(checkpoint.scaler)
    return checkpoint.progress, checkpoint.best, optimizer, scaler


def distributed(step: StageStep, loss: LossSection, device: torch.device, token_ids: Tensor) -> nn.Module:
    """Return the step with gradients averaged over all workers.

    Frozen parameters are not sent, and of the token embedding only the rows of `token_ids`.

    Args:
        step: the step, frozen as it will be trained.
        loss: the stage's losses.
        device: device of this worker.
        token_ids: `TriModalDataset.token_ids`.
    """
    if step.model.text is not None:
        average_rows(step.model.text.tower.token_embedding.weight, token_ids)
        # The method that torch's own libraries use for this; there is no argument.
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(step, [f"model.{TOKEN_EMBEDDING}"])  # type: ignore[no-untyped-call]
    return DistributedDataParallel(
        step,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        find_unused_parameters=not loss.id_weight,
    )


def _progress_after(
    epoch: int, record: Mapping[str, float | int], before: Progress, schedule: ScheduleSection, *, selects: bool
) -> Progress:
    """Return the progress after an epoch, whose model is the best so far if its score says so.

    Args:
        epoch: counted from 0.
        record: the epoch's record, with `score` if it was validated.
        before: progress before the epoch.
        schedule: how the best model is chosen.
        selects: whether models are chosen by a score; otherwise the last one is kept.
    """
    if not selects:
        return Progress(epochs_done=epoch + 1, best_score=before.best_score, best_epoch=epoch)
    score = record.get("score", -math.inf)
    tie = schedule.select_by == "rank1" and score == before.best_score  # published: a tie goes to the later epoch
    if score > before.best_score or tie:
        return Progress(epochs_done=epoch + 1, best_score=score, best_epoch=epoch)
    return Progress(epochs_done=epoch + 1, best_score=before.best_score, best_epoch=before.best_epoch)


def _evaluates(schedule: ScheduleSection, epoch: int) -> bool:
    """Return whether to validate after an epoch, counted from 0."""
    return epoch + 1 >= schedule.eval_from and (epoch + 1) % schedule.eval_every == 0


def _run_epoch(
    step: nn.Module,
    sampler: PKSampler,
    dataset: TriModalDataset,
    optimizer: StageOptimizer,
    scaler: torch.amp.GradScaler,
    settings: StageSettings,
    device: torch.device,
    epoch: int,
    listener: Listener,
) -> dict[str, float | int]:
    dtype = AUTOCAST_DTYPES.get(settings.train.autocast) if device.type == "cuda" else None
    # The released soft margin is infinite for distant pairs; the gradient scaler then skips the step.
    skips_overflow = scaler.is_enabled() and settings.loss.wrt_numerics == "published"
    readings = LossReadings(epoch, len(sampler), listener.on_step, may_overflow=skips_overflow)
    loader = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=settings.train.loader_workers,
        multiprocessing_context="spawn" if settings.train.loader_workers else None,
    )
    for batch in prefetch(loader, device):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            terms = step(batch)
            total = readings.add(terms)
        scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        optimizer.step(scaler)
        scaler.update()
    return readings.means()
