"""Training batches of three modalities: pixels or cached features of images, and tokens of their captions.

Every worker makes all random draws for the global batch and keeps its own part, which may split an identity. The
batches of all workers together are therefore the batch that a single worker would get.

Shapes: B rows per modality on this worker, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tvilfm.data.captions import texts_of
from tvilfm.data.manifest import column, rows_of, select
from tvilfm.data.pk_sampler import PKBatch, PKSampler
from tvilfm.data.tokens import tokenize
from tvilfm.data.transforms import Draws, Recipe, draw

RECIPES: tuple[Recipe, ...] = ("visible", "visible_augmented", "infrared")


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """The training rows of a manifest, with labels from 0 to num_classes - 1."""

    visible: pa.Table
    infrared: pa.Table
    visible_labels: npt.NDArray[np.int64]
    infrared_labels: npt.NDArray[np.int64]
    num_classes: int

    @classmethod
    def from_manifest(cls, manifest: pa.Table, *, use_val: bool) -> TrainingRows:
        """Return the rows of `train` (and `val` if `use_val`); labels are the positions of the sorted pids."""
        splits = ("train", "val") if use_val else ("train",)
        visible = select(manifest, split=splits, modality="visible")
        infrared = select(manifest, split=splits, modality="infrared")
        pids = np.unique(np.concatenate([column(visible, "pid"), column(infrared, "pid")]))
        return cls(
            visible=visible,
            infrared=infrared,
            visible_labels=np.searchsorted(pids, column(visible, "pid")),
            infrared_labels=np.searchsorted(pids, column(infrared, "pid")),
            num_classes=len(pids),
        )

    def sampler(self, p: int, k: int, *, seed: int) -> PKSampler:
        return PKSampler(p, k, visible_labels=self.visible_labels, infrared_labels=self.infrared_labels, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Input of one training step on one worker: pixels and their draws, or cached features; tokens in the text stage.

    Attributes:
        labels: int64 (B,).
        pixels: recipe -> uint8 (B, H, W, 3); empty if features are cached.
        draws: recipe -> augmentation of the pixels.
        features: recipe -> float32 (B, D) raw features of one cached view; empty if no features are cached.
        tokens: int64 (B, L) visible captions.
        filter_tokens: int64 (B, L') infrared captions.
    """

    labels: Tensor
    pixels: dict[Recipe, Tensor]
    draws: dict[Recipe, Draws]
    features: dict[Recipe, Tensor]
    tokens: Tensor | None = None
    filter_tokens: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in memory from which a GPU copies by itself."""
        return self._map(lambda tensor: tensor.pin_memory())

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch."""
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self._map(keep)
        return found

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            labels=change(self.labels),
            pixels={key: change(value) for key, value in self.pixels.items()},
            draws={key: value.map(change) for key, value in self.draws.items()},
            features={key: change(value) for key, value in self.features.items()},
            tokens=None if self.tokens is None else change(self.tokens),
            filter_tokens=None if self.filter_tokens is None else change(self.filter_tokens),
        )


class Captions:
    """Tokenized captions and rephrases of images.

    Args:
        captions: caption table.
        images: images in the order of the rows.
        with_rephrases: also tokenize the rephrases.
    """

    def __init__(self, captions: pa.Table, images: list[str], *, with_rephrases: bool) -> None:
        sentences = texts_of(captions, images)[: 2 if with_rephrases else 1]
        # int32 halves the memory of every loader process.
        self._tokens = torch.stack([tokenize(texts, pad_to_context=True).int() for texts in sentences])
        self._lengths = self._tokens.argmax(dim=2) + 1

    def token_ids(self) -> npt.NDArray[np.int32]:
        """Return the ids of all tokens that occur, sorted."""
        return np.unique(self._tokens.numpy())

    def batch(self, rows: npt.NDArray[np.int64], rephrased: npt.NDArray[np.bool_]) -> Tensor:
        """Return (B, L) int64 tokens of the captions of rows, or of the rephrases where `rephrased`; L = longest."""
        which, index = torch.from_numpy(rephrased).long(), torch.from_numpy(rows)
        longest = int(self._lengths[which, index].max())
        return self._tokens[which, index, :longest].long()


class TriModalDataset(Dataset[Batch]):
    """Turn the rows of a `PKBatch` into the `Batch` of one worker.

    Args:
        rows: the training rows.
        manifest: the complete manifest.
        pixels: uint8 (N, H, W, 3), memory-mapped, in the order of `manifest`; used if `views` is None.
        pad: border of the augmentation, pixels.
        seed: seed of the run.
        rank, world_size: rank of this worker and number of workers, which share the images of a batch.
        captions: caption table; None in the base stage.
        llm_probability: probability of replacing a caption by its rephrase, independently for both captions of a row.
        views: recipe -> float (V, N, D) cached features of the N rows of a modality; None = read pixels.
    """

    def __init__(
        self,
        rows: TrainingRows,
        manifest: pa.Table,
        pixels: npt.NDArray[np.uint8],
        *,
        pad: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        captions: pa.Table | None = None,
        llm_probability: float = 0.0,
        views: dict[Recipe, npt.NDArray[np.float32]] | None = None,
    ) -> None:
        self._pixels, self._pad, self._seed = pixels, pad, seed
        self._rank, self._world_size = rank, world_size
        self._visible = rows_of(manifest, rows.visible)
        self._infrared = rows_of(manifest, rows.infrared)
        self._llm_probability = llm_probability
        self._views = views
        self._visible_captions = self._infrared_captions = None
        if captions is not None:
            self._visible_captions, self._infrared_captions = (
                Captions(captions, part["image"].to_pylist(), with_rephrases=llm_probability > 0)
                for part in (rows.visible, rows.infrared)
            )

    def token_ids(self) -> Tensor:
        """Return the ids of all tokens that a batch of any worker may have, int64, sorted; none in the base stage."""
        captions = [part for part in (self._visible_captions, self._infrared_captions) if part is not None]
        ids = np.concatenate([np.empty(0, dtype=np.int64), *(part.token_ids() for part in captions)])
        return torch.from_numpy(np.unique(ids))

    def __getitem__(self, batch: PKBatch) -> Batch:
        count = len(batch.labels)
        share = count // self._world_size
        mine = slice(self._rank * share, (self._rank + 1) * share)
        rng = np.random.default_rng([self._seed, 12, batch.epoch, batch.index])
        rows = {"visible": batch.visible, "visible_augmented": batch.visible, "infrared": batch.infrared}
        pixels: dict[Recipe, Tensor] = {}
        draws: dict[Recipe, Draws] = {}
        features: dict[Recipe, Tensor] = {}
        for recipe in RECIPES:
            if self._views is not None:
                views = self._views[recipe]
                view = rng.integers(0, len(views), count)
                features[recipe] = torch.from_numpy(views[view[mine], rows[recipe][mine]])
            else:
                index = self._infrared if recipe == "infrared" else self._visible
                _, height, width, _ = self._pixels.shape
                draws[recipe] = draw(recipe, count, rng, height=height, width=width, pad=self._pad)[mine]
                pixels[recipe] = torch.from_numpy(self._pixels[index[rows[recipe][mine]]])
        tokens = filter_tokens = None
        if self._visible_captions is not None and self._infrared_captions is not None:
            rephrased = rng.random((2, count)) < self._llm_probability
            tokens = self._visible_captions.batch(batch.visible[mine], rephrased[0, mine])
            filter_tokens = self._infrared_captions.batch(batch.infrared[mine], rephrased[1, mine])
        return Batch(
            labels=torch.from_numpy(batch.labels[mine]),
            pixels=pixels,
            draws=draws,
            features=features,
            tokens=tokens,
            filter_tokens=filter_tokens,
        )
