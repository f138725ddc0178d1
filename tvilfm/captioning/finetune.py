"""Fine-tune a captioner on (image, sentence) pairs, with teacher forcing through the model's `labels` input.

This module does not depend on Ray: the caller provides the pairs and receives the events of every epoch. All random
choices depend only on (seed, epoch, worker), so training that is killed and resumed ends with the same weights as
uninterrupted training.

Shapes: B images, P tokens of the prompt, A tokens of the answer.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tvilfm.captioning.captioner import CONTINUES, DROPS_LAST, Captioner
from tvilfm.captioning.colors import remove_colors
from tvilfm.config import CaptionTrainSection
from tvilfm.data.captions import texts_of
from tvilfm.data.manifest import rows_of, select
from tvilfm.models.weights import OUTDATED, load_trained, on_host, trained_weights
from tvilfm.terms import Modality

IGNORED = -100  # label that the loss ignores
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow's conversion to gray


class Listener(Protocol):
    """Receiver of the events of fine-tuning; every worker calls it in the same way."""

    def on_step(self, record: Mapping[str, float | int]) -> None:
        """Receive epoch, step, num_steps and loss after each step."""

    def on_epoch(self, record: Mapping[str, float | int], write: Callable[[Path], None] | None) -> None:
        """Receive the mean loss and the seconds after each epoch.

        Worker 0 also passes a function that writes the checkpoint to a folder. It may be called later and by
        another thread, during the next epochs. Other workers pass None.
        """


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The training pairs of a captioner.

    Attributes:
        pixels: uint8 (N, H, W, 3), often memory-mapped.
        rows: row in `pixels` of each pair's image.
        texts: sentence of each pair.
        gray: whether to show the images without colour.
    """

    pixels: npt.NDArray[np.uint8]
    rows: npt.NDArray[np.int64]
    texts: tuple[str, ...]
    gray: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def thin(self, count: int) -> Pairs:
        """Return at most `count` evenly spaced pairs."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int))
        return replace(self, rows=self.rows[chosen], texts=tuple(self.texts[i] for i in chosen))

    def images(self, chosen: Sequence[int] | npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8]]:
        """Return the images (H, W, 3) of some pairs."""
        images = [np.asarray(self.pixels[self.rows[i]]) for i in chosen]
        return [to_gray(image) for image in images] if self.gray else images


def to_gray(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the image's luminance in three equal channels; (H, W, 3) uint8 in and out."""
    luminance = (image @ np.array(LUMINANCE) + 0.5).astype(np.uint8)
    return np.repeat(luminance[:, :, None], 3, axis=2)


def caption_pairs(
    manifest: pa.Table,
    captions: pa.Table,
    pixels: npt.NDArray[np.uint8],
    *,
    modality: Modality,
    split: str,
    infrared_pairs: Literal["infrared", "gray"],
) -> Pairs:
    """Return the pairs of a modality from a dataset's captions.

    Colour words are removed from infrared sentences. For datasets without captioned infrared images, an infrared
    captioner can be trained on visible images without colour (`infrared_pairs="gray"`).

    Args:
        manifest: rows in the order of `pixels`.
        captions: caption table.
        pixels: uint8 (N, H, W, 3).
        modality: modality of the captioner.
        split: train or val.
        infrared_pairs: training images of an infrared captioner, `caption.train.infrared_pairs`.

    Raises:
        ValueError: the split has no such images.

    Source: METHOD 5. Differs: none known.
    """
    gray = modality == "infrared" and infrared_pairs == "gray"
    shown = select(manifest, split=split, modality="visible" if gray else modality)
    if not shown.num_rows:
        raise ValueError(
            f"caption.train: expected {modality} images with captions in the {split} split, got none. Caption some, "
            "or set caption.train.infrared_pairs=gray to learn infrared captions from visible images."
        )
    texts, _ = texts_of(captions, shown["image"].to_pylist())
    if modality == "infrared":
        texts = [remove_colors(text) for text in texts]
    return Pairs(pixels=pixels, rows=rows_of(manifest, shown), texts=tuple(texts), gray=gray)


def training_inputs(
    captioner: Captioner, images: Sequence[npt.NDArray[np.uint8]], texts: Sequence[str]
) -> dict[str, Tensor]:
    """Return inputs and labels for teacher forcing: the prompt, followed by the sentence; only the sentence is scored.

    Args:
        captioner: captioner whose model is trained.
        images: uint8 (H, W, 3) each.
        texts: one sentence per image, truncated to the section's `max_new_tokens`.

    Returns:
        Arguments of the model's `forward`, including `labels`.
    """
    inputs = captioner.prompt_inputs(images)
    config, tokenizer = captioner.model.config, captioner.tokenizer
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    answers = [[*ids, end] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    encoder_gets_prompt = config.is_encoder_decoder and config.model_type not in CONTINUES
    first = captioner.model.generation_config.forced_bos_token_id
    if encoder_gets_prompt and first is not None:
        answers = [[first, *ids] for ids in answers]
    rows = [torch.tensor(ids[: captioner.section.max_new_tokens]) for ids in answers]
    labels_BA = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED).to(captioner.model.device)
    if encoder_gets_prompt:
        return inputs | {"labels": labels_BA}
    name = CONTINUES.get(config.model_type, "input_ids")
    prompt_BP = inputs[name]
    if config.model_type in DROPS_LAST:
        prompt_BP = prompt_BP[:, :-1]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    ids = torch.cat([prompt_BP, labels_BA.masked_fill(labels_BA == IGNORED, padding)], dim=1)
    labels = torch.cat([torch.full_like(prompt_BP, IGNORED), labels_BA], dim=1)
    if config.is_encoder_decoder:
        # These decoders compare outputs and labels position by position; all other models shift the labels themselves.
        return inputs | {name: ids[:, :-1], "labels": labels[:, 1:]}
    mask_BP = inputs.get("attention_mask", torch.ones_like(prompt_BP))
    mask = torch.cat([mask_BP, (labels_BA != IGNORED).to(mask_BP.dtype)], dim=1)
    # Extend other per-token inputs (token types) with zeros: the sentence's tokens are plain text.
    kinds = {key: value for key, value in inputs.items() if value.shape == prompt_BP.shape and key != "attention_mask"}
    longer = {key: torch.cat([value, torch.zeros_like(labels_BA)], dim=1) for key, value in kinds.items()}
    return inputs | longer | {name: ids, "attention_mask": mask, "labels": labels}


def mean_loss(captioner: Captioner, pairs: Pairs, *, batch: int) -> float:
    """Return the mean loss of held-out sentences; sets the model to evaluation mode."""
    captioner.model.eval()
    losses = []
    for start in range(0, len(pairs), batch):
        chosen = range(start, min(start + batch, len(pairs)))
        inputs = training_inputs(captioner, pairs.images(chosen), pairs.texts[start : start + batch])
        with torch.inference_mode():
            losses.append(float(captioner.model(**inputs).loss) * len(chosen))
    return sum(losses) / len(pairs)


def learning_rate_factor(step: int, *, warmup_steps: int, num_steps: int) -> float:
    """Return the learning-rate factor: linear warm-up to 1 over `warmup_steps`, then linear decay to 0 at `num_steps`.

    Args:
        step: counted from 0.
        warmup_steps: number of steps until the peak.
        num_steps: number of steps of the whole training.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (num_steps - step) / max(1, num_steps - warmup_steps)


def finetune(
    captioner: Captioner,
    pairs: Pairs,
    section: CaptionTrainSection,
    *,
    seed: int,
    listener: Listener,
    autocast: torch.dtype | None = None,
    rank: int = 0,
    workers: int = 1,
    resume: Path | None = None,
) -> None:
    """Train a captioner in place.

    With several workers, each processes its share of every batch, and the gradients are averaged.

    Args:
        captioner: captioner in float32 on this worker's device.
        pairs: training pairs.
        section: epochs, batch size and learning rates.
        seed: seed of order, flips and dropout.
        listener: receiver of step and epoch events.
        autocast: half-precision type on CUDA; None = float32.
        rank: rank of this worker.
        workers: number of workers; more than one must have joined a process group.
        resume: checkpoint folder to continue from: `trainer.pt` (weights, optimizer and scaler) and `progress.json`.
            After the last epoch, a checkpoint also has `model/`, a transformers folder.

    Raises:
        FloatingPointError: when the loss is not finite; the message names the epoch and batch.
    """
    model: nn.Module = captioner.model
    device = captioner.model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=section.lr, weight_decay=section.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
    epochs_done = 0 if resume is None else _restore(resume, captioner, optimizer, scaler)
    wrapped = _averaging(model, device) if workers > 1 else model
    for epoch in range(epochs_done, section.epochs):
        wrapped.train()
        started, losses = time.monotonic(), []
        batches = _batches(pairs, section.batch, np.random.default_rng([seed, 31, epoch]))
        torch.manual_seed(int(np.random.default_rng([seed, 32, epoch, rank]).integers(2**31)))
        for step, batch in enumerate(batches):
            factor = learning_rate_factor(
                epoch * len(batches) + step, warmup_steps=section.warmup_steps, num_steps=section.epochs * len(batches)
            )
            for group in optimizer.param_groups:
                group["lr"] = section.lr * factor
            inputs = training_inputs(captioner, *_shown(pairs, batch[rank::workers]))
            losses.append(_step(wrapped, inputs, optimizer, scaler, autocast, f"epoch {epoch}, batch {step}"))
            listener.on_step({"epoch": epoch, "step": step + 1, "num_steps": len(batches), "loss": losses[-1]})
        record = {"epoch": epoch, "loss": float(np.mean(losses)), "seconds": time.monotonic() - started}
        if rank:
            listener.on_epoch(record, None)
            continue
        states = on_host({"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})
        states["weights"] = trained_weights(model)
        whole = captioner if epoch + 1 == section.epochs else None
        listener.on_epoch(record, partial(_save, states=states, epochs_done=epoch + 1, whole=whole))
    model.eval()


def _averaging(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with gradients averaged over all workers."""
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)


def _save(folder: Path, *, states: dict[str, Any], epochs_done: int, whole: Captioner | None) -> None:
    """Write a checkpoint: `trainer.pt`, `progress.json` and, for the whole captioner, `model/`."""
    torch.save(states, folder / "trainer.pt")
    (folder / "progress.json").write_text(json.dumps({"epochs_done": epochs_done}))
    if whole is not None:
        whole.save(folder / "model")


def _restore(folder: Path, captioner: Captioner, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
    """Load a checkpoint and return how many epochs it has done."""
    states = torch.load(folder / "trainer.pt", map_location=captioner.model.device, weights_only=True)
    if "weights" not in states:
        raise ValueError(OUTDATED)
    load_trained(captioner.model, states["weights"])
    optimizer.load_state_dict(states["optimizer"])
    scaler.load_state_dict(states["scaler"])
    return int(json.loads((folder / "progress.json").read_text())["epochs_done"])


def _batches(pairs: Pairs, size: int, rng: np.random.Generator) -> list[list[tuple[int, bool]]]:
    """Return an epoch's batches: each pair's index, and whether its image is flipped.

    The last, incomplete batch is skipped, so that every step has the same weight.
    """
    order, flipped = rng.permutation(len(pairs)), rng.random(len(pairs)) < 0.5
    size = min(size, len(pairs))
    drawn = [(int(i), bool(flipped[i])) for i in order]
    return [drawn[start : start + size] for start in range(0, len(pairs) - size + 1, size)]


def _shown(pairs: Pairs, batch: list[tuple[int, bool]]) -> tuple[list[npt.NDArray[np.uint8]], list[str]]:
    """Return the images of a batch, flipped where drawn, and their sentences."""
    images = pairs.images([index for index, _ in batch])
    turned = [image[:, ::-1] if flip else image for image, (_, flip) in zip(images, batch, strict=True)]
    return turned, [pairs.texts[index] for index, _ in batch]


def _step(
    model: nn.Module,
    inputs: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: torch.dtype | None,
    where: str,
) -> float:
    """Update the model and return the loss of the batch; `where` names it in an error."""
    optimizer.zero_grad()
    with torch.autocast(inputs["labels"].device.type, dtype=autocast, enabled=autocast is not None):
        loss = model(**inputs).loss
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(
            f"caption.train loss: expected a finite number, got {value} in {where}. "
            "Lower caption.train.lr or check this batch's images."
        )
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return value
